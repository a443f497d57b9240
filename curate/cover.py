"""Duplicates by meaning: a greedy cover, in which every removed row has a kept one that is like it, and no two kept rows are alike."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..core.progress import Progress
from .similarity import BLOCK, MARGIN, TILE, Candidates, Cosines, Indices, Vectors, exact_cosines

SHORTEST = 32  # dimensions of a shorter vector, or a multiple of it
MOST_PROPOSED = 1e-4  # share of all pairs whose cosines may be left to compute
REST = 1e-5  # added to the squared length of a rest: above the rounding of float32, which must not make a bound too low


class Compared(Protocol):
    """Rows that stayed, in the form in which others are compared with them."""

    def append(self, rows: Indices) -> None:
        """Add rows that stayed."""

    def candidates(self, rows: Indices) -> Candidates:
        """Return which of those that stayed may be near enough to each of these rows."""

    def within(self, rows: Indices) -> tuple[Indices, Indices]:
        """Return the pairs of these rows that may be near enough, by their places: the later of the two, rising, and the sooner."""


def cover(
    vectors: Vectors, threshold: float, order: Sequence[int], *, block: int = BLOCK, given: int = 0, device: str = "cpu"
) -> tuple[Indices, Cosines]:
    """Return the witness of each row, -1 for those that stay, and the cosine with it: greedy cover.

    Rows are visited in `order`; one stays if and only if its cosine with every row that stayed before is below the threshold
    (cosines by `exact_cosines`). The witness is the most similar of these, of equals the one visited first. The outcome
    depends on the order and not on the block size or the device. The first `given` rows of the order stay whatever they are like.
    Costs n²·d/2 multiplications at most, a few times less where `bounding_vectors` serve, and memory for block × 8192 cosines.
    """
    visit = np.asarray(order, dtype=np.int64)
    compared: Compared
    if device == "cpu":
        compared = _Bounding(vectors, threshold, len(visit))
    else:
        from .accelerated import Stayed

        compared = Stayed(vectors, threshold, len(visit), device)
    witness, cosine = np.full(len(vectors), -1, dtype=np.int64), np.zeros(len(vectors))
    kept = np.empty(len(visit), dtype=np.int64)  # rows that stayed, in visiting order
    count = 0
    with Progress("dedup", total=len(visit), unit="rows") as progress:
        for start in range(0, len(visit), block):
            rows = visit[start : start + block]
            earlier = compared.candidates(rows)
            before = earlier.verified(vectors, rows, kept[:count])
            later, sooner = compared.within(rows)
            here = np.ones(len(rows), dtype=bool)  # rows of this block that stay: all those that are like no other
            doubtful = np.unique(np.concatenate([np.flatnonzero([len(places) > 0 for places, _ in before]), later]))
            here[doubtful] = False
            for place in doubtful:
                row = rows[place]
                close = sooner[np.searchsorted(later, place) : np.searchsorted(later, place, side="right")]
                close = close[here[close]]
                where, near = kept[before[place][0]], before[place][1]
                if len(close):
                    where = np.concatenate([where, rows[close]])
                    near = np.concatenate([near, exact_cosines(vectors, np.full(len(close), row), rows[close])])
                best = int(np.argmax(near)) if len(near) else -1
                if best >= 0 and near[best] >= threshold and start + place >= given:
                    witness[row], cosine[row] = where[best], near[best]
                elif best < 0 or near[best] < 1:  # else a given row that an equal one stands before: that one is always the witness
                    here[place] = True
            fresh = rows[here]
            compared.append(fresh)
            kept[count : count + len(fresh)] = fresh
            count += len(fresh)
            progress.advance(len(rows))
    return witness, cosine


class _Bounding:
    """Compares by shorter vectors where these serve."""

    def __init__(self, vectors: Vectors, threshold: float, capacity: int) -> None:
        bounding = bounding_vectors(vectors, threshold)
        self._floor = threshold - MARGIN
        self._kind = Candidates if bounding is None else _Bounded
        self._whole = vectors
        self._vectors = vectors if bounding is None else bounding
        self._stayed = np.empty((capacity, self._vectors.shape[1]), dtype=np.float32)
        self._count = 0

    def append(self, rows: Indices) -> None:
        self._stayed[self._count : self._count + len(rows)] = self._vectors[rows]
        self._count += len(rows)

    def candidates(self, rows: Indices) -> Candidates:
        found, own = self._kind(len(rows), self._floor), self._vectors[rows]
        for tile in range(0, self._count, TILE):
            found.add(own @ self._stayed[tile : min(tile + TILE, self._count)].T, tile)
        return found

    def within(self, rows: Indices) -> tuple[Indices, Indices]:
        own = self._whole[rows]
        later, sooner = np.nonzero(own @ own.T >= self._floor)
        below = sooner < later
        return later[below], sooner[below]


def bounding_vectors(vectors: Vectors, threshold: float) -> Vectors | None:
    """Return shorter vectors whose products are never below the cosines, or None where they would rule out too few pairs.

    The vectors are turned so that the first directions hold most of their length. Of the rest only the length is kept: by
    Cauchy and Schwarz a·b is at most the product of the first parts plus that of the lengths of the rests.
    """
    dimensions = vectors.shape[1]
    if len(vectors) < 4 * BLOCK or dimensions < 2 * SHORTEST:
        return None
    sample = vectors[:: max(len(vectors) // (2 * BLOCK), 1)].astype(np.float64)
    _, directions = np.linalg.eigh(sample.T @ sample)
    turn = directions[:, ::-1]
    pairs = np.triu_indices(len(sample), 1)
    for size in range(SHORTEST, dimensions // 2 + 1, SHORTEST):
        short = _shortened(sample.astype(np.float32), turn[:, :size])
        if np.mean((short @ short.T)[pairs] >= threshold - MARGIN) <= MOST_PROPOSED:
            return np.concatenate([_shortened(vectors[row : row + TILE], turn[:, :size]) for row in range(0, len(vectors), TILE)])
    return None


def _shortened(vectors: Vectors, turn: Cosines) -> Vectors:
    first = vectors @ turn.astype(np.float32)
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64) - np.einsum("ij,ij->i", first, first, dtype=np.float64)
    return np.hstack([first, np.sqrt(np.maximum(squares, 0) + REST)[:, None].astype(np.float32)])


class _Bounded(Candidates):
    """Candidates by products that are bounds and no cosines: the largest says nothing about the others."""

    def add(self, cosines: npt.NDArray[np.float32], first_column: int) -> None:
        rows = np.flatnonzero(cosines.max(axis=1) >= self.floor)
        if len(rows):
            places, columns = np.nonzero(cosines[rows] >= self.floor)
            self.enter(rows[places], columns + first_column, cosines[rows[places], columns])
