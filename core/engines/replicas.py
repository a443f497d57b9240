"""Engines in processes of their own: one feeder for all, and one that dies or stalls is restarted and what it had asked again."""

import contextlib
import logging
import multiprocessing.connection
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..chat import Chat, load_chat
from ..errors import UserError
from ..hardware import usable_cores, visible_gpus
from ..models import resolve_model
from .base import (
    ChoiceRequest,
    Completion,
    Embedding,
    EmbedRequest,
    EngineConfig,
    EngineDied,
    Request,
    ScoreRequest,
    TokenLogprobs,
)
from .worker import CLOSE, FLUSH

log = logging.getLogger(__name__)

AHEAD = 64  # requests that a process is sent beyond those its engine has taken
BATCHES_AHEAD = 2  # where a request is a batch of texts: there are few, and each takes long
PARTS = 16  # into which the requests are split that one of them must have killed an engine
DEATHS_IN_A_ROW = 8  # without any answer in between: then it is not a request that kills the engine
STARTS_IN_A_ROW = 3
SECONDS_TO_START = 3600.0  # a large model from a slow disk takes half an hour; without an end one that hangs would be waited for for ever
SECONDS_TO_END = 30.0
SECONDS_TO_DUMP = 5.0

Wanted = TypeVar("Wanted", Request, ScoreRequest, ChoiceRequest, EmbedRequest)
Opening = tuple[str, str, EngineConfig, str | None]  # the engine's module, the model, its settings, its revision


class Process:
    """One engine in its process: what it has been sent, and when it last got anywhere."""

    def __init__(self, opening: Opening, connection: multiprocessing.connection.Connection) -> None:
        self.connection = connection
        self.ready: tuple[str, int | None] | None = None  # identity and context of its engine, once that is open
        self.in_flight: dict[str, Any] = {}  # in the order of sending
        self.untaken = 0  # how many of them, the last ones, the engine has not taken
        self.alone = False  # it has the parts of a search, and nothing else
        self.steps = 0
        self.moved = time.monotonic()
        self.ending: str | None = None  # how it ended, where it told or was made to
        self.refused = False  # it ended since its engine refused the settings
        self._round = False  # the engine may be given more
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._send, name="sftkit-send", daemon=True).start()
        self._outbox.put(opening)

    def _send(self) -> None:
        with contextlib.suppress(OSError, TypeError):  # it has ended (TypeError: just now): whoever reads from it learns that, too
            while True:
                self.connection.send(self._outbox.get())

    def ask(self, kind: str, request: Any) -> None:
        """Send a request."""
        if not self.in_flight:
            self.moved = time.monotonic()
        self.in_flight[request.key] = request
        self.untaken += 1
        self._outbox.put(request if self._round else (kind, request))
        self._round = True

    def flush(self) -> None:
        """Tell it that nothing more comes for now."""
        if self._round:
            self._outbox.put(FLUSH)
            self._round = False

    def forget(self) -> None:
        """Let answers that are still to come be nobody's."""
        self.flush()
        self.in_flight.clear()
        self.alone = False

    def dump_and_kill(self) -> None:
        """Let it write where every thread stands, and end it."""
        raise NotImplementedError

    def gone(self, seconds: float) -> str:
        """Wait so long for it to end, then kill it; return how it ended, for people."""
        raise NotImplementedError

    def end(self, seconds: float = 0.0) -> str:
        """Wait so long for it to end, then kill it and let go of it; return how it ended, for people."""
        how = self.gone(seconds)
        self.connection.close()
        self._outbox.put(CLOSE)  # its sender looks up, and finds the connection closed
        return how if self.ending is None else self.ending

    def close(self) -> None:
        """Let it end by itself."""
        self._outbox.put(CLOSE)


class LocalProcess(Process):
    """One on this machine, at the other end of a socket."""

    def __init__(self, opening: Opening, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", "from sftkit.core.engines.worker import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the process that feeds it alone
            )
        super().__init__(opening, multiprocessing.connection.Connection(ours.detach()))

    def dump_and_kill(self) -> None:
        """End it by SIGABRT, at which Python writes where every thread stands, and by SIGKILL if that does not help."""
        import psutil  # type: ignore[import-untyped]  # accelerate brings it

        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._popen.pid)
            engines = [each for each in own.children(recursive=True) if each.name().startswith("VLLM")]
            for each in [*engines, own]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGABRT)
        self.end(SECONDS_TO_DUMP)

    def gone(self, seconds: float) -> str:
        """Wait so long for it to end, then kill it; return how it ended, for people."""
        try:
            code = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of the processes runs, and how it is started there. Those on the same card start one after another."""

    card: str | None
    start: Callable[[], Process]


class Replicas:
    """Several processes with the same model. See `core.engines.base.Engine`.

    A process that dies, gives no token for `stall_seconds`, or does not start within an hour is started anew, and the others go
    on meanwhile. What it was answering is asked again. Requests that were under way at two deaths are then asked apart from the
    others, in ever smaller parts, until the one is found at which the engine dies: that one comes back with its error. Raises
    EngineDied when an engine dies again and again without answering anything.
    """

    def __init__(self, module: str, model: str, config: EngineConfig, *, revision: str | None, chat: Chat | None) -> None:
        self.chat = chat
        self.steps = 0
        self._model, self._stall_seconds = model, config.stall_seconds
        self._places = self._find_places(module, model, config, revision)
        self._processes: list[Process | None] = [None] * len(self._places)  # None: to be started
        self._failed_starts = Counter[int]()
        self._given_up: set[int] = set()
        self._deaths_in_a_row = 0
        try:
            self._start_missing()
            while not any(each and each.ready for each in self._processes):
                for _ in self._listen():
                    pass
        except BaseException:
            self.close()
            raise
        self.identity, self.context_length = next(each.ready for each in self._processes if each and each.ready)

    def _find_places(self, module: str, model: str, config: EngineConfig, revision: str | None) -> list[Place]:
        count, gpus = replica_count(config), [] if config.device == "cpu" else visible_gpus()
        device = config.device
        if gpus and device is not None and device.startswith("cuda:"):
            if not device[5:].isdigit() or int(device[5:]) >= len(gpus):
                raise UserError(f"device {device}: this machine has {len(gpus)} GPUs, from cuda:0")
            gpus, device = [gpus[int(device[5:])]], "cuda"  # the only one that the process sees
        size = config.tensor_parallel_size
        groups = [",".join(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]
        if gpus and not groups:
            raise UserError(f"tensor_parallel_size {size}: this machine has {len(gpus)} GPUs")
        share = -(-count // len(groups)) if groups else 1
        settings = replace(config, replicas=None, device=device, gpu_memory_utilization=config.gpu_memory_utilization / share)
        opening = (module, model, settings, revision)

        def place(slot: int) -> Place:
            if groups:
                card = groups[slot % len(groups)]
                return Place(card, lambda: LocalProcess(opening, {"CUDA_VISIBLE_DEVICES": card}))
            threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
            return Place(None, lambda: LocalProcess(opening, {"OMP_NUM_THREADS": threads}))

        return [place(slot) for slot in range(count)]

    def wait_for_all(self) -> None:
        """Wait until every process is ready, or is given up; asked right away, the first ones answer alone."""
        while any(slot not in self._given_up and not (each and each.ready) for slot, each in enumerate(self._processes)):
            self._start_missing()
            self._listen()

    def close(self) -> None:
        """End all processes."""
        left = [each for each in self._processes if each]
        for each in left:
            each.close()
        deadline = time.monotonic() + SECONDS_TO_END
        for each in left:
            each.end(max(0.0, deadline - time.monotonic()))
        self._processes, self._places = [], []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; each completion is given as it comes, from whichever process."""
        return self._run("generate", requests, lambda key, error: Completion(key=key, finish_reason="error", error=error))

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Score texts; each result is given as it comes, from whichever process."""
        return self._run("logprobs", requests, lambda key, error: TokenLogprobs(key=key, error=error))

    def choices(self, requests: Iterable[ChoiceRequest]) -> Iterator[TokenLogprobs]:
        """Give the log-probabilities of choices; each result is given as it comes, from whichever process."""
        return self._run("choices", requests, lambda key, error: TokenLogprobs(key=key, error=error))

    def embed(self, requests: Iterable[EmbedRequest]) -> Iterator[Embedding]:
        """Embed batches of texts; each result is given as it comes, from whichever process."""
        return self._run("embed", requests, lambda key, error: Embedding(key=key, error=error))

    def _run(self, kind: str, requests: Iterable[Wanted], failure: Any) -> Iterator[Any]:
        try:
            yield from self._answers(kind, requests, failure)
        finally:  # left early: what still comes is not waited for
            for each in self._processes:
                if each:
                    each.forget()

    def _answers(self, kind: str, requests: Iterable[Wanted], failure: Any) -> Iterator[Any]:
        source: Iterator[Wanted] | None = iter(requests)
        again: deque[Wanted] = deque()
        parts: deque[list[Wanted]] = deque()
        deaths = Counter[str]()
        ahead = BATCHES_AHEAD if kind == "embed" else AHEAD
        while True:
            self._start_missing()
            for process in self._processes:
                if process is None or process.ready is None or process.alone:
                    continue
                if parts and not process.in_flight:
                    process.alone = True
                    for request in parts.popleft():
                        process.ask(kind, request)
                while not process.alone and process.untaken < ahead and (again or source is not None):
                    wanted = again.popleft() if again else next(source, None) if source is not None else None
                    if wanted is None:
                        source = None
                    else:
                        process.ask(kind, wanted)
                if process.alone or (source is None and not again):
                    process.flush()
            if source is None and not again and not parts and not any(each and each.in_flight for each in self._processes):
                return
            for event in self._listen():
                if not isinstance(event, Process):
                    self._deaths_in_a_row = 0
                    yield event
                    continue
                left = list(event.in_flight.values())
                taken = max(0, len(left) - event.untaken)
                held, never_taken = left[:taken], left[taken:]
                deaths.update(each.key for each in held)
                again.extendleft(reversed(never_taken))
                if len(held) == 1 and (event.alone or deaths[held[0].key] > 1):
                    times = deaths[held[0].key]
                    yield failure(held[0].key, f"the engine {event.ending} each of the {times} times it answered this request")
                    continue
                suspects = held if event.alone else [each for each in held if deaths[each.key] > 1]
                again.extendleft(each for each in reversed(held) if not event.alone and deaths[each.key] == 1)
                size = -(-len(suspects) // PARTS)
                parts.extend(suspects[first : first + size] for first in range(0, len(suspects), size or 1))
                if suspects:
                    log.info("looking among %s requests for one at which the engine dies", f"{len(suspects):,}")

    def _listen(self) -> list[Any]:
        """Wait a moment for messages; return answers, and processes that have ended while they had work or were ready."""
        events: list[Any] = []
        living = {each.connection: (slot, each) for slot, each in enumerate(self._processes) if each}
        now = time.monotonic()
        for connection in multiprocessing.connection.wait(list(living), timeout=0.5):
            slot, process = living[connection]  # type: ignore[index]
            try:
                while True:  # all that is there, so that a fast one does not wait for the slow ones
                    self._hear(process, process.connection.recv(), events)
                    if not process.connection.poll():
                        break
            except (EOFError, OSError):
                events += self._bury(slot, process)
        for slot, each in enumerate(self._processes):
            if each is None or not (each.in_flight or each.ready is None):
                continue
            limit = SECONDS_TO_START if each.ready is None else self._stall_seconds
            if now - each.moved > limit:
                each.ending = f"gave no {'sign' if each.ready is None else 'token'} for {limit:g} s"
                log.warning("%s: an engine %s; what each of its threads was doing follows", self._model, each.ending)
                each.dump_and_kill()
                events += self._bury(slot, each)
        return events

    def _hear(self, process: Process, message: tuple[Any, ...], events: list[Any]) -> None:
        name, *told = message
        moved = True
        if name == "answer":
            answered = process.in_flight.pop(told[0].key, None)
            process.alone = process.alone and bool(process.in_flight)
            if answered is not None:
                events.append(told[0])
        elif name == "taken":
            process.untaken -= 1
        elif name == "beat":
            steps, waits = told
            moved = waits or steps != process.steps
            self.steps += steps - process.steps
            process.steps = steps
        elif name == "ready":
            process.ready = told[0], told[1]
            self._failed_starts.clear()
        else:  # refused, failed: it ends now
            process.ending = told[0] if name == "refused" else f"stopped ({told[0]})"
            process.refused = name == "refused"
        if moved:
            process.moved = time.monotonic()

    def _bury(self, slot: int, process: Process) -> list[Process]:
        """Take a process that has ended out; return it, if what it had is to be dealt with."""
        self._processes[slot] = None
        process.ending = process.end(SECONDS_TO_DUMP)
        if process.ready is None:
            self._failed_starts[slot] += 1
            others = any(each is not None for each in self._processes)
            first = not hasattr(self, "identity")
            if not others and (first or process.refused or self._failed_starts[slot] >= STARTS_IN_A_ROW):
                raise (
                    UserError(process.ending)
                    if process.refused
                    else EngineDied(f"{self._model}: its engine {process.ending} while it started")
                )
            if others and (process.refused or self._failed_starts[slot] >= STARTS_IN_A_ROW):
                log.warning("%s: going on with one engine fewer, since one cannot be started (%s)", self._model, process.ending)
                self._given_up.add(slot)
            else:
                log.warning("%s: an engine %s while it started; it is started again", self._model, process.ending)
            return []
        if process.refused:
            raise UserError(process.ending)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise EngineDied(
                f"{self._model}: its engine {process.ending}, the {self._deaths_in_a_row}th in a row without an answer; its messages are"
                " above. What finished is kept, and the same command goes on"
            )
        log.warning(
            "%s: an engine %s; it is started again and its %d requests asked again", self._model, process.ending, len(process.in_flight)
        )
        return [process]

    def _start_missing(self) -> None:
        """Start what is missing; on one GPU one after another, since each looks at the memory that is free."""
        starting = {place.card for process, place in zip(self._processes, self._places, strict=True) if process and process.ready is None}
        for slot, (process, place) in enumerate(zip(self._processes, self._places, strict=True)):
            if process is None and slot not in self._given_up and (place.card is None or place.card not in starting):
                self._processes[slot] = place.start()
                starting.add(place.card)


def replica_count(config: EngineConfig) -> int:
    """Return how many processes a config asks for; `auto` is one for each GPU."""
    if config.replicas == "auto":
        return max(1, len(visible_gpus()) // config.tensor_parallel_size)
    return int(config.replicas or 1)


def open_replicas(module: str, model: str, config: EngineConfig, *, revision: str | None = None, talks: bool = True) -> Replicas:
    """Start the processes and wait until the first is ready. Raises UserError for a model that cannot be run.

    One that does not talk, an embedding model, has no chat template.
    """
    chat = load_chat(resolve_model(model, revision=revision)) if talks else None
    return Replicas(module, model, config, revision=revision, chat=chat)
