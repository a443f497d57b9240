"""Cosines between rows of unit vectors: exact where a decision hangs on them, in blocks so that nothing of size n² is held.

Matrix products are in float32, whose rounding depends on the shape of a block. So they only propose: every pair near a
threshold or near a maximum is computed again by `exact_cosines`, and decisions come out the same for any block size.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..core.errors import UserError
from ..core.hardware import usable_cores

T = TypeVar("T")
Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Cosines = npt.NDArray[np.float64]

MARGIN = 1e-5  # far above the rounding of a float32 product of unit vectors, up to some thousand dimensions
BLOCK = 1024
THREADS = 16  # at most, each with a tile of its own
TILE = 8192  # 1024 × 8192 cosines of four bytes are 32 MiB


def unit_vectors(vectors: npt.ArrayLike) -> Vectors:
    """Return rows scaled to length 1; a row of zeros stays. Raises UserError for values that are not finite."""
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise UserError("embeddings: expected a table of finite numbers; the embedder gave something else, try dtype float32")
    lengths = np.sqrt(np.einsum("ij,ij->i", array, array, dtype=np.float64))
    lengths[lengths == 0] = 1
    return (array / lengths[:, None]).astype(np.float32)


def exact_cosines(vectors: Vectors, left: Indices, right: Indices) -> Cosines:
    """Return the cosine of each pair of rows in float64, rounded to 9 digits: the same in any order and block.

    A vector's cosine with itself is exactly 1, and with a row of zeros 0.
    """
    cosines = np.empty(len(left))
    for start in range(0, len(left), BLOCK):
        a, b = (vectors[side[start : start + BLOCK]].astype(np.float64) for side in (left, right))
        lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        cosines[start : start + BLOCK] = (a * b).sum(axis=1) / np.where(lengths == 0, 1, lengths)
    return np.round(cosines, 9)


def copies(array: npt.NDArray[Any]) -> tuple[Indices, Indices, Indices]:
    """Return the first row of every different one in a table, which of these each row is a copy of, and how often each is there."""
    lines = np.ascontiguousarray(array).view(np.dtype((np.void, array.itemsize * array.shape[1]))).ravel()
    _, first, kind, sizes = np.unique(lines, return_index=True, return_inverse=True, return_counts=True)
    return first, kind, sizes


def in_blocks(work: Callable[[int], T], num_rows: int, height: int) -> Iterator[T]:
    """Yield what `work` returns for the first row of every block of `height`, in order; a block on each core.

    So what is done with a product runs on all cores, too, and no core waits for another, as those of a shared product do.
    """
    with _linear_algebra().limit(limits=1, user_api="blas"):
        if num_rows <= height:
            yield from map(work, range(0, num_rows, height))
            return
        with ThreadPoolExecutor(min(usable_cores(), THREADS)) as pool:
            yield from pool.map(work, range(0, num_rows, height))


@cache
def _linear_algebra() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def nearest(vectors: Vectors, rows: Sequence[int] | Indices, kept: Sequence[int] | Indices) -> tuple[Indices, Cosines]:
    """Return for each of `rows` the most similar of `kept`, of equals the first in the order of `kept`, and their cosine."""
    rows, kept = np.asarray(rows, dtype=np.int64), np.asarray(kept, dtype=np.int64)
    witness, cosine = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        found = Candidates(len(block), floor=-2.0)
        for tile in range(0, len(kept), TILE):
            found.add(vectors[block] @ vectors[kept[tile : tile + TILE]].T, tile)
        places, cosine[start : start + BLOCK] = found.best(vectors, block, kept)
        witness[start : start + BLOCK] = kept[places]
    return witness, cosine


class Candidates:
    """For each row of a block, the columns that may hold its largest cosine, gathered tile by tile from float32 products.

    Only cosines of at least `floor` are of interest.
    """

    def __init__(self, num_rows: int, floor: float) -> None:
        self.floor = floor
        self.top = np.full(num_rows, floor, dtype=np.float32)
        self._found: list[tuple[Indices, Indices, npt.NDArray[np.float32]]] = []

    def add(self, cosines: npt.NDArray[np.float32], first_column: int) -> None:
        """Take in the cosines of all rows with the columns from `first_column` on."""
        best = cosines.max(axis=1)
        rows = np.flatnonzero(best >= self.top - MARGIN)
        self.top = np.maximum(self.top, best)
        if len(rows):
            places, columns = np.nonzero(cosines[rows] >= (self.top[rows] - MARGIN)[:, None])
            self.enter(rows[places], columns + first_column, cosines[rows[places], columns])

    def enter(self, rows: Indices, columns: Indices, cosines: npt.NDArray[np.float32]) -> None:
        """Take in pairs that may hold the largest cosine of their row."""
        self._found.append((rows, columns, cosines))

    def best(self, vectors: Vectors, rows: Indices, columns: Indices) -> tuple[Indices, Cosines]:
        """Return for each row the place in `columns` of its largest exact cosine, of equals the first, and that cosine.

        Every row must have a candidate, as it has with a floor below -1.
        """
        row, place = self._pairs()
        cosines = exact_cosines(vectors, rows[row], columns[place])
        order = np.lexsort((place, -cosines, row))
        first = order[np.searchsorted(row[order], np.arange(len(self.top)))]
        return place[first], cosines[first]

    def _pairs(self) -> tuple[Indices, Indices]:
        """Return the rows and places that are still candidates, rising."""
        row, place, value = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        still = value >= self.top[row] - MARGIN  # an earlier tile proposed by a lower maximum
        row, place = row[still], place[still]
        order = np.lexsort((place, row))
        return row[order], place[order]

    def verified(self, vectors: Vectors, rows: Indices, columns: Indices) -> list[tuple[Indices, Cosines]]:
        """Return for each row the places in `columns` that stayed candidates, rising, and their exact cosines.

        `rows` and `columns` say which of `vectors` the block's rows and columns are.
        """
        if not self._found:
            empty = np.empty(0, dtype=np.int64), np.empty(0)
            return [empty] * len(self.top)
        row, place = self._pairs()
        cosines = exact_cosines(vectors, rows[row], columns[place])
        ends = np.searchsorted(row, np.arange(len(self.top) + 1))
        return [(place[a:b], cosines[a:b]) for a, b in pairwise(ends)]
