"""A lock that is waited for: one process at a time does what has to be done alone."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def hold_alone(lock: Path, waiting: str) -> Iterator[int]:
    """Hold a file for a block and yield its number, which other processes may inherit; where another one holds it, say so and wait."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
