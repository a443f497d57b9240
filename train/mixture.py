"""Several data sets as one, in the proportions asked for: `A:0.7 B:0.3`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import UserError
from ..core.example import Example
from ..core.formats import read_examples

OFF = 0.02  # of all rows that a part may be from its share
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
        if re.fullmatch(r".+:-\d*\.?\d+", missing):
            raise UserError(f"{missing}: expected a share of 0 or more")
        raise UserError(f"{missing}: has no share, and others have; give all one, as {missing}:0.3, or none")
    if not sum(shares):
        raise UserError(f"{', '.join(sources)}: the shares are all 0")
    return [(name, (share or 0) / sum(shares)) for name, share in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Which of the rows that were read make the mixture."""

    beyond: frozenset[int] = frozenset()  # places of the rows that are too many for the proportions
    parts: tuple[tuple[str, float, range], ...] = ()  # of each source with a share its name, its share, and the places of its rows
    remarks: tuple[str, ...] = ()  # about its size

    def warnings(self, kept: Sequence[int]) -> list[str]:
        """Say where the places of the rows that can be trained on are not in the proportions asked for."""
        told = list(self.remarks)
        for name, share, places in self.parts:
            count, wanted = sum(each in places for each in kept), share * len(kept)
            if abs(count - wanted) > max(1.0, OFF * len(kept)) or (share and not count):
                told.append(
                    f"{count:,} of {len(kept):,} rows are from {name}, {count / len(kept):.1%}, where its share is {share:.1%}: take out"
                    " first what is left out above, or give more rows or another share"
                )
        return told


def read_mixture(
    sources: Sequence[str], seed: int, limit: int | None = None, read: Callable[[str], list[Example]] = read_examples
) -> tuple[list[Example], Mixture]:
    """Return the examples of all sources, and which of them make the mixture.

    It is as large as its scarcest part and `limit` allow; which rows of the others are in it is a function of the seed. Rows that are in
    two sources keep apart by their ids.
    """
    from .packing import draw

    examples: list[Example] = []
    beyond: set[int] = set()
    used: dict[str, int] = {}
    parts = [(read(source), share, source) for source, share in parse_mixture(sources)]
    most, scarce, share, name = min(
        ((len(rows) / share, len(rows), share, name) for rows, share, name in parts if share), default=(0.0, 0, 0.0, "")
    )
    size = min(most, float(limit)) if limit and most else most
    shared = []
    for rows, own, source in parts:
        first = len(examples)
        for row in rows:
            copies = used[row.id] = used.get(row.id, 0) + 1
            examples.append(row if copies == 1 else replace(row, id=f"{row.id}~mixed{copies}"))
        if own is not None:
            order = sorted(range(first, len(examples)), key=lambda place: draw(seed, 0, place))
            beyond.update(order[round(size * own) :])
            shared.append((source, own, range(first, len(examples))))
    asked = sum(len(places) for _, own, places in shared if own)
    short = shared and most < (limit or asked / 2)
    remark = (
        f"{name} has {scarce:,} rows, and with its share of {share:.1%} the mixture has {most:,.0f} of {asked:,} rows: give it a smaller"
        " share, or more rows"
    )
    return examples, Mixture(beyond=frozenset(beyond), parts=tuple(shared), remarks=(remark,) if short else ())
