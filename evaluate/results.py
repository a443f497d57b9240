"""Where evaluations are written: the folder evaluate/ of a run, which comparisons and losses share without harming one another."""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.example import Message
from ..core.files import read_json, write_json
from ..core.run import Run, is_done, mark_done, read_done

log = logging.getLogger(__name__)


@contextmanager
def open_section(out: Path | None, name: str, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Hold a run for one evaluation and yield its folder evaluate/; without `out`, one that is removed in the end.

    Settings may differ from last time: what was computed is stored under keys of what decides it, and used where they agree.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="sftkit-") as temporary:
            try:
                yield Path(temporary)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("Nothing is kept without -o RUN.") from None
        return
    with Run.create(out) as run:
        run.configure(name, settings, free=("*",))
        folder = run.room("evaluate")
        done = read_done(folder) if is_done(folder) else {}
        if done.pop(name, None) is not None:
            (folder / "done.json").unlink()
            if done:
                mark_done(folder, **done)
        yield folder


def finish_section(folder: Path, name: str, facts: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    """Write a section of results.json, then, last of all, its mark in done.json. Other sections stay as they are."""
    path = folder / "results.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), name: dict(facts)})
    mark_done(folder, **{**(read_done(folder) if is_done(folder) else {}), name: dict(done)})


def void_section(folder: Path, name: str) -> None:
    """Take a section out of results.json and done.json: what it was computed from is no longer there."""
    path = folder / "results.json"
    if is_done(folder):
        mark_done(folder, **{key: value for key, value in read_done(folder).items() if key != name})
    write_json(path, {key: value for key, value in read_json(path).items() if key != name})


def left_out(errors: Iterable[Mapping[str, str | None]]) -> list[str | None]:
    """Return for each row why it counts for no model: the first rule that stood in some model's way, and whose; None if none did.

    A row is compared on all models or on none: that is what makes the comparison paired. Of what an engine says, only what
    stands before a colon counts: the rest is about the one row.
    """
    reasons: list[str | None] = []
    for row in errors:
        rules = {name: rule.partition(":")[0] if rule else None for name, rule in row.items()}
        first = next((rule for rule in rules.values() if rule), None)
        names = [name for name, rule in rules.items() if rule == first]
        reasons.append(first if first is None or len(names) == len(rules) else f"{first} for {', '.join(names)}")
    return reasons


def counted(reasons: Iterable[str | None]) -> dict[str, int]:
    """Count the reasons, most often first."""
    return dict(Counter(each for each in reasons if each is not None).most_common())


def told(reasons: Mapping[str, int]) -> str:
    """Write counted reasons for people."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def told_question(said: Sequence[Message]) -> str:
    """Return a question as a judge reads it: its text, or all turns with their roles."""
    texts = [str(each.get("content") or "") for each in said]  # a turn that only calls a tool has none
    return texts[0] if len(said) == 1 else "\n\n".join(f"{each['role']}: {text}" for each, text in zip(said, texts, strict=True))
