"""An engine in a process of its own, at the other end of a socket: what `replicas` starts, feeds, watches and restarts."""

import contextlib
import faulthandler
import multiprocessing.connection
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..cli import start_talking
from ..errors import UserError
from .base import Engine, EngineDied, choice_logprobs
from .loading import start

SECONDS_BETWEEN_BEATS = 0.5
SECONDS_TO_CLOSE = 20.0
SECONDS_TO_LEARN = 1.0  # that the other end is gone, which a failure to send to it tells sooner
FLUSH = "flush"  # the engine answers what it has before it looks for anything new
CLOSE = "close"


class Worker:
    """Serves one engine: requests come from the socket in a thread of their own, answers go back as they finish.

    What it sends: `ready` once the engine is open; `taken` for each request that the engine pulls; `answer`; `beat`, with the
    engine's steps so far and whether it waits for a request; and before it ends `refused` for a UserError, `failed` for the rest.
    """

    def __init__(self, connection: multiprocessing.connection.Connection, end: Callable[[], object] = lambda: os._exit(0)) -> None:
        self._connection, self._end = connection, end
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._closing = threading.Event()
        self._waits = True  # for a request: then no step is to be expected

    def send(self, *message: Any) -> None:
        """Send one message."""
        with self._sending:
            self._connection.send(message)

    def _receive(self) -> None:
        """Pass on what comes in, until the other end is gone or says that it is enough."""
        with contextlib.suppress(EOFError, OSError):
            while (message := self._connection.recv()) != CLOSE:
                self._inbox.put(message)
        self._closing.set()
        threading.Timer(SECONDS_TO_CLOSE, os._exit, args=(0,)).start()
        if self._engine is not None:
            self._engine.close()
        self._end()

    def _beat(self, engine: Engine) -> None:
        with contextlib.suppress(OSError):  # the other end is gone
            while True:
                self.send("beat", engine.steps, self._waits)
                time.sleep(SECONDS_BETWEEN_BEATS)

    def _feed(self, first: Any) -> Iterator[Any]:
        message = first
        while message != FLUSH:
            self._waits = False
            self.send("taken")
            yield message
            self._waits = True
            message = self._inbox.get()
        self._waits = False

    def leave(self) -> None:
        """End the process, or leave that to who is closing the engine just now: that is what made it fail."""
        sys.stderr.flush()
        if self._closing.is_set():
            threading.Event().wait()
        self._end()

    def run(self, module: str, model: str, config: Any, revision: str | None) -> None:
        """Open the engine and answer until the other end closes."""
        threading.Thread(target=self._receive, name="sftkit-receive", daemon=True).start()
        try:
            engine = start(module, model, config, revision=revision)
            self._engine = engine
            self.send("ready", engine.identity, engine.context_length)
            threading.Thread(target=self._beat, args=(engine,), name="sftkit-beat", daemon=True).start()
            while True:
                self._waits = True
                kind, first = self._inbox.get()
                ask = partial(choice_logprobs, engine) if kind == "choices" else getattr(engine, kind)
                for answer in ask(self._feed(first)):
                    self.send("answer", answer)
        except EngineDied as error:
            self.send("failed", str(error))
        except UserError as error:
            self.send("refused", str(error))
        except Exception as error:  # noqa: BLE001  the other end decides what becomes of it
            if self._closing.wait(SECONDS_TO_LEARN):  # it failed since it is being closed, or nobody is there to be told
                return
            traceback.print_exc()
            self.send("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main() -> None:
    """Serve the socket whose number is the argument; its first message says what to open."""
    faulthandler.enable(all_threads=True)  # a process that stalls is ended by SIGABRT, which then writes where it stood
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection = multiprocessing.connection.Connection(descriptor)
    start_talking()
    worker = Worker(connection)
    worker.run(*connection.recv())
    worker.leave()
