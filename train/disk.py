"""A place that cannot be written to in one line: before the work, and where the disk is full, whichever library wrote to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.errors import UserError

FULL = ("No space left", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed", "inline_container.cc", "requested and")


@contextmanager
def room_on_disk(place: Path, *, then: str = "the same command goes on from the last whole checkpoint") -> Iterator[None]:
    """Turn what safetensors, torch and numpy raise when a disk is full into one line; what stood before still stands."""
    import safetensors

    try:
        yield
    except (RuntimeError, OSError, safetensors.SafetensorError) as error:
        if not any(each in str(error) for each in FULL):
            raise
        raise UserError(f"{place}: cannot be written, the disk or a quota is full; make room: {then}") from error


def make_place_for(place: Path) -> None:
    """Make the folder in which something is to stand, before the work that ends there. Raises UserError where there can be none."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent, prefix=".sftkit"):
            pass
    except OSError as error:
        raise UserError(f"{place.parent}: is no folder that can be written to ({error.strerror}); name another place") from None
