"""An engine without a model that dies, hangs or stumbles at chosen prompts: what the processes of real ones do, without their start."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sftkit.core.chat import Chat
from sftkit.core.engines.base import Completion, EngineConfig, Request, ScoreRequest, TokenLogprobs
from sftkit.core.errors import UserError

BATCH = 32


class Poisoned:
    """Answers in batches, each with the first id of its prompt; does what the file `poison` says at one that holds an id (`kill 17`)."""

    identity, context_length = os.environ.get("SFTKIT_TEST_IDENTITY", "poisoned"), 512
    chat: Chat | None = None

    def __init__(self, poison: Path) -> None:
        self._poison = poison
        self.steps = 0

    def close(self) -> None:
        pass

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        raise NotImplementedError

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting = iter(requests)
        while batch := list(islice(waiting, BATCH)):
            for request in batch:
                self._act(request)
            for request in batch:
                self.steps += 1
                yield Completion(key=request.key, text=str(request.prompt_ids[0]), num_tokens=1)

    def _act(self, request: Request) -> None:
        for line in self._poison.read_text().splitlines():
            what, first = line.split()
            if int(first) not in request.prompt_ids:
                continue
            with self._poison.with_suffix(".log").open("a") as file:
                file.write(f"{what} {request.key}\n")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "once":  # whatever it was, it does not come again
                self._poison.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "hang":
                threading.Event().wait()
            elif what == "refuse":
                raise UserError("these settings are not taken")
            else:
                raise RuntimeError("a fault\nof the device")


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> Poisoned:
    """Open it, with the poison that the environment names."""
    poison = Path(os.environ["SFTKIT_TEST_POISON"])
    if poison.read_text() == "no start":
        os.kill(os.getpid(), signal.SIGSEGV)
    if poison.read_text() == "no start once":
        with contextlib.suppress(FileExistsError):  # another process has died of it
            poison.with_suffix(".once").mkdir()
            os.kill(os.getpid(), signal.SIGSEGV)
    if poison.read_text() == "never starts":
        threading.Event().wait()
    if poison.read_text().startswith("no memory") and config.gpu_memory_utilization > float(poison.read_text().split()[-1]):
        raise UserError("the model: cannot start with it") from RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return Poisoned(poison)
