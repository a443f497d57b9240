"""Progress with rate and time left: a bar on a terminal, a line every few seconds elsewhere. Always on stderr."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a bar is drawn on terminals only, and help needs none
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units of work. Use as a context manager: `with Progress("distill", total=800, unit="samples") as progress:`.

    `advance(n, tokens=m)` counts n units and, where it makes sense, m tokens; the rate shown is of tokens if there are any.
    """

    def __init__(self, label: str, *, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.tokens = done, 0
        self._began_with = done
        self._start = self._last_line = time.monotonic()
        self._told = -1  # units done when a line was last written
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, rate="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self.done > self._began_with and self.done != self._told:  # the last line may have been due at the last unit
            log.info("%s", self._line())

    def advance(self, count: int = 1, *, tokens: int = 0) -> None:
        """Count finished work."""
        self.done += count
        self.tokens += tokens
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=self.rate())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line, self._told = now, self.done
            log.info("%s", self._line())

    def rate(self) -> str:
        """Return the rate so far, for people."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        if self.tokens:
            return f"{self.tokens / seconds:,.0f} tokens/s"
        return f"{(self.done - self._began_with) / seconds:,.1f} {self.unit}/s"

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        fresh = self.done - self._began_with
        if not fresh:  # tokens alone, of a unit that takes long
            ending = f", {duration(seconds)} so far"
        elif self.done < self.total:
            ending = f", {duration((self.total - self.done) * seconds / fresh)} left"
        else:
            ending = f" in {duration(seconds)}"
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {self.rate()}{ending}"


def duration(seconds: float) -> str:
    """Write a time for people: `45 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Enter how long a block took, in seconds, under the name of its step; a block that raises enters nothing."""
    start = time.monotonic()
    yield
    seconds[step] = time.monotonic() - start
