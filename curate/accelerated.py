"""Selection and duplicates by meaning on a GPU: products there propose in float32, and the same exact cosines decide as without one."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .coverage import NearestPick, Pick, farthest, rest_of_copies
from .similarity import MARGIN, Candidates, Cosines, Indices, Vectors

HEIGHT = 4096  # rows that are compared at once with
WIDTH = 65_536  # so many others: 1 GiB of cosines in float32
GAIN_CELLS = 64 << 20  # cosines at once while gains are summed: 256 MiB
EPSILON = 0.1


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products of float32 in float32: what propose must lie within MARGIN of the exact cosine."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Table:
    """Vectors on a device, to which more are added; tells which of them may be near others. Holds `capacity` × d × 4 bytes."""

    def __init__(self, capacity: int, dimensions: int, device: str) -> None:
        self._vectors = torch.empty(capacity, dimensions, device=device)
        self._count = 0

    def append(self, vectors: Vectors) -> None:
        """Add vectors behind those that are there."""
        self._vectors[self._count : self._count + len(vectors)] = torch.from_numpy(vectors)
        self._count += len(vectors)

    def propose(self, vectors: Vectors, found: Candidates) -> None:
        """Enter in `found` the columns of this table that may be nearest to each of `vectors`, and no less than its floor."""
        with full_precision():
            own = torch.from_numpy(vectors).to(self._vectors.device)
            top = torch.from_numpy(found.top).to(own.device)
            for start in range(0, self._count, WIDTH):
                cosines = own @ self._vectors[start : min(start + WIDTH, self._count)].T
                top = torch.maximum(top, cosines.amax(dim=1))
                rows, columns = (cosines >= (top - MARGIN)[:, None]).nonzero(as_tuple=True)
                if len(rows):
                    values = cosines[rows, columns]
                    found.enter(rows.cpu().numpy(), columns.cpu().numpy() + start, values.cpu().numpy())
            found.top = top.cpu().numpy()


class Stayed:
    """Rows that stayed, for `cover.cover`."""

    def __init__(self, vectors: Vectors, threshold: float, capacity: int, device: str) -> None:
        self._vectors = vectors
        self._floor = threshold - MARGIN
        self._device = device
        self._table = Table(capacity, vectors.shape[1], device)

    def append(self, rows: Indices) -> None:
        """Add rows that stayed."""
        self._table.append(self._vectors[rows])

    def candidates(self, rows: Indices) -> Candidates:
        """Return which of those that stayed may be near enough to each of these rows."""
        found = Candidates(len(rows), self._floor)
        self._table.propose(self._vectors[rows], found)
        return found

    def within(self, rows: Indices) -> tuple[Indices, Indices]:
        """Return the pairs of these rows that may be near enough, by their places: the later of the two, rising, and the sooner."""
        with full_precision():
            own = torch.from_numpy(self._vectors[rows]).to(self._device)
            pairs = (own @ own.T >= self._floor).tril_(-1).nonzero(as_tuple=True)
        later, sooner = (each.cpu().numpy() for each in pairs)
        return later, sooner


def nearest(vectors: Vectors, rows: Sequence[int] | Indices, kept: Sequence[int] | Indices, device: str) -> tuple[Indices, Cosines]:
    """Return what `similarity.nearest` returns."""
    rows, kept = np.asarray(rows, dtype=np.int64), np.asarray(kept, dtype=np.int64)
    witness, cosine = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    table = Table(len(kept), vectors.shape[1], device)
    table.append(vectors[kept])
    for start in range(0, len(rows), HEIGHT):
        block = rows[start : start + HEIGHT]
        found = Candidates(len(block), floor=-2.0)
        table.propose(vectors[block], found)
        places, cosine[start : start + HEIGHT] = found.best(vectors, block, kept)
        witness[start : start + HEIGHT] = kept[places]
    return witness, cosine


def k_center(vectors: Vectors, first: int, device: str) -> Iterator[Pick]:
    """Yield what `coverage.k_center` yields: the same rows, gains and witnesses. Holds n·(d + 2) numbers of four bytes on the device."""
    near = NearestPick(vectors)
    table = torch.from_numpy(vectors).to(device)
    proposed = torch.full((len(vectors),), -math.inf, device=device)
    pick, cosine = first, math.nan
    while True:
        near.note(pick)
        yield (pick, None, None) if near.count == 1 else (pick, 1 - cosine, int(near.witness[pick]))
        if near.count == len(vectors):
            return
        with full_precision():
            torch.maximum(proposed, table @ table[pick], out=proposed)
        proposed[pick] = math.inf
        least = proposed.min()
        rows = (proposed <= least + 2 * MARGIN).nonzero().flatten().cpu().numpy()
        if float(least) >= 1 - MARGIN:
            yield from rest_of_copies(near, np.flatnonzero(torch.isfinite(proposed).cpu().numpy()))
            return
        pick, cosine = farthest(near, rows)


def stochastic_facility_location(
    vectors: Vectors,
    size: int,
    quality: Cosines | None = None,
    weight: float = 0.0,
    *,
    epsilon: float = EPSILON,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[Pick]:
    """Yield `size` rows that stand for all others, each the best of a random few: for sets too large for exact greedy.

    Each pick is the row of largest gain, as `facility_location.facility_location` defines it, among (n / size)·ln(1 / epsilon)
    rows drawn anew from those that are left. The expected value is at least 1 − 1/e − epsilon of the best (Mirzasoleiman 2015,
    arXiv 1409.7938). Gains are compared as the device rounds them (TensorFloat-32 on a GPU), so that among near equals another
    device may take another row; the gain that is yielded is that of float32. A ranking is of its size: the beginning of a
    larger one is not the smaller one. Costs n·size·d·(n / size)·ln(1 / epsilon) multiplications.
    """
    num_rows = len(vectors)
    draw = np.random.default_rng(seed)
    sample = max(math.ceil(num_rows / size * math.log(1 / epsilon)), 1)
    table = torch.from_numpy(vectors).to(device)
    covered = torch.zeros(num_rows, device=device)
    witness = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    bonus = None if quality is None else weight * quality
    share = 1.0 if quality is None else 1 - weight
    left = np.arange(num_rows)  # rows that were not taken, in its first `count` places
    count = num_rows
    for _ in range(min(size, num_rows)):
        asked = _draw(draw, left, count, min(sample, count))
        gains = share * _gains(table, covered, left[asked])
        if bonus is not None:
            gains = gains + bonus[left[asked]]
        best = asked[int(np.argmax(gains))]
        pick = int(left[best])
        left[best], left[count - 1] = left[count - 1], left[best]
        count -= 1
        stood_for = int(witness[pick])
        gain = share * _take(table, covered, witness, pick) + (0.0 if bonus is None else float(bonus[pick]))
        yield pick, gain, None if stood_for < 0 else stood_for


def _draw(draw: np.random.Generator, left: Indices, count: int, size: int) -> Indices:
    """Return different places below `count`, those with the lower rows first, so that of equal gains the lowest row is taken."""
    places = draw.choice(count, size, replace=False, shuffle=False)
    return places[np.argsort(left[places])]


def _gains(table: Any, covered: Any, rows: Any) -> Cosines:
    own = table[torch.from_numpy(rows).to(table.device)]
    total = torch.zeros(len(rows), dtype=torch.float64, device=table.device)
    height = max(GAIN_CELLS // len(rows), 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for start in range(0, len(table), height):
            rise = torch.addmm(covered[start : start + height, None], table[start : start + height], own.T, beta=-1)
            total += rise.relu_().sum(dim=0)
    finally:
        torch.set_float32_matmul_precision(before)
    return np.asarray(total.cpu().numpy(), dtype=np.float64)


def _take(table: Any, covered: Any, witness: Any, pick: int) -> float:
    with full_precision():
        cosines = table @ table[pick]
    better = cosines > covered
    gain = float((cosines - covered).relu().sum(dtype=torch.float64))
    torch.maximum(covered, cosines, out=covered)
    witness[better] = pick
    return gain
