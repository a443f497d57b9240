"""Ctrl-C and SIGTERM, taken by a block of work that is to end in its own way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AFTER_SAVING = "stopping when the model is saved; once more stops at once"


@contextmanager
def handling_stops(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` have the signals that ask this process to stop, for a block. Threads besides the main one get none."""
    here = threading.current_thread() is threading.main_thread()
    former = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)} if here else {}
    try:
        yield
    finally:
        for number, each in former.items():
            signal.signal(number, each)
