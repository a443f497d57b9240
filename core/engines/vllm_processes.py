"""vLLM's own processes: they end when this one does, however it ends, and when they end by themselves it is noticed here."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from .vllm_errors import PLACE, first_error

T = TypeVar("T")

SECONDS_TO_GIVE_UP = 10.0

# Reads process ids until the other end of its input is closed, which the kernel does for a process that is killed as well.
GUARD = """
import os, shutil, signal, sys
for number in sys.stdin.read().split():
    try:
        os.kill(int(number), signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class Processes:
    """The processes that are started by `start`.

    vLLM 0.25 to 0.30 leaves its engine behind, with the GPU's memory, when the process that started it is killed; it waits
    forever for an engine that was killed itself; and Ctrl-C reaches engine and starter at once, so that the engine dies
    in the middle of a step, or a Ctrl-C during the start is lost.
    """

    def __init__(self) -> None:
        self._before = {each.pid for each in multiprocessing.active_children()}
        self._seen: dict[int, multiprocessing.process.BaseProcess] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="sftkit-vllm-"))
        self.errors = self._folder / "errors.jsonl"  # what the processes write of theirs
        # a session of its own: Ctrl-C in the terminal must not reach it
        self._guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(self._folder)], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def start(self, make: Callable[[], T]) -> T:
        """Call `make`, which starts the processes, in a thread of its own; return or raise what comes of it.

        An interruption of the caller kills what has been started so far, and is raised.
        """
        os.environ[PLACE] = str(self.errors)  # the processes inherit it
        multiprocessing.resource_tracker.ensure_running()  # starting it later would take the mask away again
        outcome: Future[T] = Future()

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes inherit it: Ctrl-C is for this one alone
            try:
                outcome.set_result(make())
            except BaseException as error:  # noqa: BLE001  it is raised in the caller's thread
                outcome.set_exception(error)

        thread = threading.Thread(target=work, name="sftkit-vllm-start", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                self._look()  # a start takes minutes, and this process may be killed before it is over
        except BaseException:
            deadline = time.monotonic() + SECONDS_TO_GIVE_UP
            while thread.is_alive() and time.monotonic() < deadline:
                self._look()
                self._kill()
                thread.join(0.1)
            raise
        return outcome.result()

    def _look(self) -> None:
        """Tell the guard of the processes that are new."""
        for each in multiprocessing.active_children():
            if each.pid is not None and each.pid not in self._before and each.pid not in self._seen:
                self._seen[each.pid] = each
                assert self._guard.stdin
                self._guard.stdin.write(f"{each.pid}\n")
                self._guard.stdin.flush()

    def _kill(self) -> None:
        """Kill the processes, and those that they have started."""
        import psutil  # type: ignore[import-untyped]  # vLLM brings it

        for each in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(each.pid).children(recursive=True), each]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            each.join()

    def when_one_ends(self, tell: Callable[[], None]) -> None:
        """Call `tell`, in a thread of its own, as soon as one of the processes ends."""
        sentinels = [each.sentinel for each in self._seen.values()]
        if sentinels:  # none where vLLM was told to run in this process

            def wait() -> None:
                multiprocessing.connection.wait(sentinels)
                tell()

            threading.Thread(target=wait, name="sftkit-vllm-end", daemon=True).start()

    def ending(self) -> str:
        """Say how the process that ended did so, for people."""
        deadline = time.monotonic() + 5
        codes: list[int] = []
        while not codes and time.monotonic() < deadline:  # vLLM's own watcher may be about to learn the code
            codes = [each.exitcode for each in self._seen.values() if each.exitcode is not None]
            time.sleep(0.01)
        told = first_error(self.errors)
        if not codes:
            return "has ended" if told is None else f"has ended: {told}"
        how = f"was killed ({signal.Signals(-codes[0]).name})" if codes[0] < 0 else f"has ended with exit code {codes[0]}"
        return how if told is None else f"{how}: {told}"

    def close(self) -> None:
        """Kill what is left of the processes."""
        self._look()
        self._kill()
        self._guard.kill()
        self._guard.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
