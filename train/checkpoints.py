"""Checkpoints that are whole: marked when all their files are on the disk, and looked at again before a run goes on from one."""

import logging
import os
import shutil
from pathlib import Path

from ..core.run import is_done, mark_done, read_done

log = logging.getLogger(__name__)


def mark_whole(checkpoint: Path, step: int) -> None:
    """Mark a checkpoint as whole, once its files are on the disk and not in the system's memory alone: power may fail."""
    sizes = {}
    for file in sorted(each for each in checkpoint.rglob("*") if each.is_file() and each.name != "done.json"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    mark_done(checkpoint, step=step, files=sizes)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; one that was cut off while it was written does not count.

    One that was whole and lost a file or a part of one is told of: without its optimizer's state a run would go on otherwise, silently.
    """
    whole = sorted((each for each in folder.glob("checkpoint-*") if is_done(each)), key=lambda each: -_step(each))
    for each in whole:
        sizes = read_done(each).get("files", {})
        wrong = [name for name, size in sizes.items() if not (each / name).exists() or (each / name).stat().st_size != size]
        if not wrong:
            return each
        log.warning("%s: is not whole any more (%s is missing or cut); the checkpoint before it is taken", each, ", ".join(wrong))
    return None


def clear_after(folder: Path, kept: Path | None) -> None:
    """Take away what was written of checkpoints after `kept`, the newest whole one; None: of all.

    transformers keeps two checkpoints by their steps and times. Counted among these, what was cut off would have whole ones deleted.
    """
    for each in folder.glob("checkpoint-*"):
        if kept is None or _step(each) > _step(kept):
            shutil.rmtree(each)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
