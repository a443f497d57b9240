"""vLLM's own processes: they end when this one does, however it ends, and when they end by themselves it is noticed here."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

# Reads process ids until the other end of its input is closed, which the kernel does for a process that is killed as well.
GUARD = """
import os, signal, sys
for number in sys.stdin.read().split():
    try:
        os.kill(int(number), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class Processes:
    """Watches the processes that are started while this is open as a context manager, and after it.

    vLLM 0.25 to 0.30 leaves its engine behind, with the GPU's memory, when the process that started it is killed; and it
    waits forever for an engine that was killed itself.
    """

    def __init__(self) -> None:
        self._before = {each.pid for each in multiprocessing.active_children()}
        self._seen: dict[int, multiprocessing.process.BaseProcess] = {}
        self._started = threading.Event()
        # a session of its own: Ctrl-C in the terminal must not reach it
        self._guard = subprocess.Popen([sys.executable, "-c", GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True)
        self._watcher = threading.Thread(target=self._look, name="sftkit-vllm-start", daemon=True)

    def __enter__(self) -> "Processes":
        self._watcher.start()
        multiprocessing.resource_tracker.ensure_running()  # starting it would take the mask away again
        # The processes inherit it: Ctrl-C in a terminal is for this process, which ends them in good order. Until they have
        # started, the watcher's thread takes the signal for this one.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._started.set()
        self._watcher.join()

    def _look(self) -> None:
        """Tell the guard of each process as soon as it is there: a start takes minutes, and may be killed too."""
        last = False
        while not last:
            last = self._started.wait(0.1)
            for each in multiprocessing.active_children():
                if each.pid is not None and each.pid not in self._before and each.pid not in self._seen:
                    self._seen[each.pid] = each
                    assert self._guard.stdin
                    self._guard.stdin.write(f"{each.pid}\n")
                    self._guard.stdin.flush()

    def when_one_ends(self, tell: Callable[[], None]) -> None:
        """Call `tell`, in a thread of its own, as soon as one of the processes ends."""
        sentinels = [each.sentinel for each in self._seen.values()]
        if sentinels:  # none where vLLM was told to run in this process

            def wait() -> None:
                multiprocessing.connection.wait(sentinels)
                tell()

            threading.Thread(target=wait, name="sftkit-vllm-end", daemon=True).start()

    def ending(self) -> str:
        """Say how the processes ended, for people."""
        for each in self._seen.values():
            each.join(5)
        codes = [each.exitcode for each in self._seen.values() if each.exitcode]
        if not codes:
            return "has ended"
        return f"was killed ({signal.Signals(-codes[0]).name})" if codes[0] < 0 else f"has ended with exit code {codes[0]}"

    def close(self) -> None:
        """Kill what is left of the processes."""
        for each in self._seen.values():
            if each.is_alive():
                each.kill()
            each.join()
        self._guard.kill()
        self._guard.wait()
