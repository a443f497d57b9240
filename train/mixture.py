"""Several data sets as one, in the proportions asked for: `A:0.7 B:0.3`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import UserError
from ..core.example import Example
from ..core.formats import read_examples
from .packing import draw

SHARE = re.compile(r"(?P<source>.+):(?P<share>\d*\.?\d+)")


def parse_mixture(sources: Sequence[str]) -> list[tuple[str, float | None]]:
    """Return (source, share) of each; shares are None where none is given, and else add up to 1.

    Raises UserError where some have a share and others none, or all are 0. A name that exists as it stands has no share.
    """
    found: list[tuple[str, float | None]] = []
    for text in sources:
        match = None if Path(text).expanduser().exists() else SHARE.fullmatch(text)
        found.append((match["source"], float(match["share"])) if match else (text, None))
    shares = [share for _, share in found if share is not None]
    if not shares:
        return found
    if len(shares) < len(found):
        missing = next(name for name, share in found if share is None)
        raise UserError(f"{missing}: has no share, and others have; give all one, as {missing}:0.3, or none")
    if not sum(shares):
        raise UserError(f"{', '.join(sources)}: the shares are all 0")
    return [(name, (share or 0) / sum(shares)) for name, share in found]


def read_mixture(sources: Sequence[str], seed: int, limit: int | None = None) -> tuple[list[Example], frozenset[int]]:
    """Return the examples of all sources, and the places of those that are too many for the proportions.

    The mixture is as large as its scarcest part and `limit` allow; which rows of the others are in it is a function of the seed. Rows
    that are in two sources keep apart by their ids.
    """
    examples: list[Example] = []
    beyond: set[int] = set()
    used: dict[str, int] = {}
    parts = [(read_examples(source), share) for source, share in parse_mixture(sources)]
    size = min((*(len(rows) / share for rows, share in parts if share), *([float(limit)] if limit else [])), default=0.0)
    for rows, share in parts:
        first = len(examples)
        for row in rows:
            copies = used[row.id] = used.get(row.id, 0) + 1
            examples.append(row if copies == 1 else replace(row, id=f"{row.id}~mixed{copies}"))
        if share is not None:
            order = sorted(range(first, len(examples)), key=lambda place: draw(seed, 0, place))
            beyond.update(order[round(size * share) :])
    return examples, frozenset(beyond)
