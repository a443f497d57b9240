"""Facility location and QDIT: rank rows so that the picks stand for all rows, by exact greedy in bounded memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .coverage import Pick
from .similarity import MARGIN, Cosines, Indices, Vectors, copies, exact_cosines, in_blocks

NEIGHBORS = 256  # about so many similarities are remembered of each row; more take memory and save time
UNIT = 1_000_000_000  # exact cosines have 9 digits: as whole numbers of this unit their sums are exact in any order
ROUNDING = 1e-6  # of a float32 cosine, at most
CELLS = 4_000_000  # similarities held at a time: 16 MB
HEIGHT, WIDTH = 512, 1024  # rows that a thread compares at once with so many others: 2 MB
NEVER = 4.0  # above any cosine: a row covered so well gains nothing


def facility_location(
    vectors: Vectors,
    quality: Cosines | None = None,
    weight: float = 0.0,
    *,
    neighbors: int = NEIGHBORS,
    block: int = 32,
) -> Iterator[Pick]:
    """Yield the rows in the order of exact greedy for facility location; with `quality` for QDIT (Bukharin 2023).

    The value of a set S is Σ_i max(0, max_{s∈S} cos(i, s)): how well S stands for every row. The gain of a row is what it adds
    to that, and with quality (1 − weight)·that + weight·quality. What is less than MARGIN counts as nothing; of equal gains the
    lowest row comes first. The witness is the earlier pick most similar to the row, None where none has a cosine above 0.

    This is lazy greedy: what a row added earlier bounds what it adds now. Float32 products only propose, and the rows that come
    near the best are summed in whole numbers, so that `neighbors` and `block` decide time and memory and never the outcome.
    Memory is 16 bytes for each of n·neighbors similarities, and a tile of them.
    """
    state = Covering(vectors, neighbors)
    num_rows = len(vectors)
    bonus = np.zeros(num_rows) if quality is None else weight * quality
    share = 1.0 if quality is None else 1 - weight
    taken = np.zeros(num_rows, dtype=bool)
    known = np.full(num_rows, np.inf)  # the gain when it was last computed exactly
    _, kind, _ = copies(vectors)
    for _ in range(num_rows):
        contenders = _best_of_copies(_contenders(state, share, bonus, taken, block), kind, bonus)
        rises: dict[int, tuple[Indices, Indices]] = {}
        while True:
            pick = int(contenders[np.argmax(known[contenders])])
            if pick in rises:
                break
            rises[pick] = state.rises(pick)
            known[pick] = share * state.gain(*rises[pick]) + bonus[pick]
        witness = int(state.witness[pick])
        state.take(pick, *rises[pick])
        taken[pick] = True
        yield pick, float(known[pick]), None if witness < 0 else witness


def _best_of_copies(rows: Indices, kind: Indices, bonus: Cosines) -> Indices:
    """Return the rows that are not copies of a better one of them, or of a lower one as good: copies add the same."""
    rows = rows[np.lexsort((rows, -bonus[rows], kind[rows]))]
    return np.sort(rows[np.unique(kind[rows], return_index=True)[1]])


def _contenders(state: "Covering", share: float, bonus: Cosines, taken: npt.NDArray[np.bool_], block: int) -> Indices:
    """Return the rows, rising, that may have the largest gain, within what float32 rounds."""
    computed = np.full(len(taken), state.num_open == 0)
    while True:
        most = np.where(taken, -np.inf, share * (state.bound + state.error) + bonus)
        surely = state.bound - state.error
        surely[surely < MARGIN] = 0  # what is less counts as nothing
        least = (share * surely + bonus)[state.exact & ~taken].max(initial=-np.inf)
        near = np.flatnonzero((most >= least) & ~taken)
        ask = near[~state.exact[near]]
        if not len(ask):
            ask = near[~computed[near]]  # what was carried on may be rounded too roughly to tell them apart
            if len(near) == 1 or not len(ask):
                return near
        if len(ask) > block:
            ask = ask[np.argpartition(-most[ask], block)[:block]]
        state.compute(ask)
        computed[ask] = True
        block = min(2 * block, 1024)


class Covering:
    """How well the picks cover every row, and a bound on what each row would add.

    Of each row the similarities above its `floor` are remembered, about `neighbors` of them. A row is open until it is covered
    better than its floor: only then it is certain that no other row than those remembered can cover it better. What a row
    adds to closed rows is kept up to date by what is remembered. What it adds to open rows is computed anew by `compute` when
    it is asked for, or brought up to date for all rows after a pick, whichever is likely to be less work.
    """

    def __init__(self, vectors: Vectors, neighbors: int) -> None:
        from scipy.sparse import csr_array

        num_rows = len(vectors)
        self._vectors = vectors
        self.covered = np.zeros(num_rows, dtype=np.int64)  # cosine with the nearest pick in UNITs, 0 at least
        self.witness = np.full(num_rows, -1, dtype=np.int64)
        self._floor = _floors(vectors, neighbors)
        self.bound = np.zeros(num_rows)  # what each row adds, at most
        self.exact = np.ones(num_rows, dtype=bool)  # where the bound is what the row adds,
        self.error = np.full(num_rows, ROUNDING * num_rows)  # but for this at most
        self._expected = self._asked = num_rows  # rows that are computed between two picks
        self._guess = -1 if num_rows <= neighbors else _likely_first(vectors)
        self._after_guess = np.zeros(num_rows)  # the bounds once that is picked
        starts, columns, cosines = self._look_at_all(neighbors)
        by_row = csr_array((cosines, columns, starts), shape=(num_rows, num_rows))
        by_column = by_row.tocsc()
        self._starts, self._columns, self._cosines = starts, columns, cosines
        self._column_starts, self._rows, self._column_cosines = by_column.indptr.astype(np.int64), by_column.indices, by_column.data
        self._open = self._is_open(np.arange(num_rows))
        self._closed_gain = np.zeros(num_rows)  # what each row adds to closed rows
        closed = np.flatnonzero(~self._open)
        for rows in _chunks(closed, neighbors):
            _, places = _ranges(starts, rows)
            self._closed_gain += np.bincount(columns[places], np.maximum(cosines[places], 0), num_rows)
        self._gather_open()
        if not self._num_open:
            self._close()

    def _gather_open(self) -> None:
        """Copy what `compute` needs of the open rows: rows that close later stay there, as rows that gain nothing."""
        self._open_rows = np.flatnonzero(self._open)
        self._num_open = len(self._open_rows)
        self._open_place: Indices = np.full(len(self._floor), -1, dtype=np.int64)
        self._open_place[self._open_rows] = np.arange(self._num_open)
        self._open_vectors = self._vectors if self._num_open == len(self._vectors) else self._vectors[self._open_rows]
        self._open_covered: npt.NDArray[np.float32] = (self.covered[self._open_rows] / UNIT).astype(np.float32)

    @property
    def num_open(self) -> int:
        """Return how many rows are open."""
        return self._num_open

    def compute(self, rows: Indices) -> None:
        """Make the bound of these rows what they add now, in float32."""
        total = self._closed_gain[rows].copy()
        width = max(HEIGHT * WIDTH // len(rows), 1)
        own = self._vectors[rows]

        def add(start: int) -> npt.NDArray[np.float32]:
            cosines = own @ self._open_vectors[start : start + width].T
            cosines -= self._open_covered[start : start + width]
            np.maximum(cosines, 0, out=cosines)
            return np.asarray(cosines.sum(axis=1))

        for part in in_blocks(add, len(self._open_rows), width):
            total += part
        self.bound[rows] = total
        self.exact[rows] = True
        self.error[rows] = self._least_error(rows)
        self._asked += len(rows)

    def rises(self, pick: int) -> tuple[Indices, Indices]:
        """Return the rows that this one covers better than the picks do, and their exact cosines with it in UNITs."""
        span = slice(self._column_starts[pick], self._column_starts[pick + 1])
        rows, cosines = self._rows[span].astype(np.int64), self._column_cosines[span]
        closed = ~self._open[rows]
        rows, cosines = rows[closed], cosines[closed]
        if self._num_open:
            opened = self._open[self._open_rows]
            rows = np.concatenate([rows, self._open_rows[opened]])
            cosines = np.concatenate([cosines, (self._open_vectors @ self._vectors[pick])[opened]])
        rows = rows[cosines > self.covered[rows] / UNIT - MARGIN]
        exact = np.rint(exact_cosines(self._vectors, rows, np.full(len(rows), pick)) * UNIT).astype(np.int64)
        better = exact > self.covered[rows]
        return rows[better], exact[better]

    def gain(self, rows: Indices, cosines: Indices) -> float:
        """Return what a row adds that covers `rows` so well."""
        gain = int((cosines - self.covered[rows]).sum())
        return gain / UNIT if gain >= MARGIN * UNIT else 0.0

    def take(self, pick: int, rows: Indices, cosines: Indices) -> None:
        """Add a pick that covers `rows` so well."""
        opened = self._open[rows]
        self._carry_on(pick, rows[opened], cosines[opened])
        for part in _chunks(np.arange(len(rows)), max(len(self._columns) // len(self._floor), 1)):
            self._cover(rows[part], cosines[part])
        self.witness[rows] = pick
        places = self._open_place[rows]
        inside = places >= 0
        still = self._open[rows[inside]]
        self._open_covered[places[inside]] = np.where(still, self.covered[rows[inside]] / UNIT, NEVER)
        self._num_open = int(self._open[self._open_rows].sum())
        if self._num_open < 0.75 * len(self._open_rows):
            self._gather_open()
        if not self._num_open:
            self._close()

    def _close(self) -> None:
        """Take what is remembered for all that is gained: no row is open any more."""
        self.bound = self._closed_gain
        self.exact[:] = True
        self.error = self._least_error(np.arange(len(self._floor)))

    def _carry_on(self, pick: int, rows: Indices, cosines: Indices) -> None:
        """Take from all bounds what is gained no more when these open rows are covered so well, or leave the bounds inexact."""
        self._carried = len(rows) * len(self._floor) <= self._expected * self._num_open
        self._expected = int(0.9 * self._expected) if self._carried else self._asked
        self._asked = 0
        if not self._carried:
            self.exact[:] = not len(rows) and self.exact
            return
        if pick == self._guess and not self.covered.any():
            self.bound = self._after_guess
            return
        if not len(rows):
            return
        old, new = ((values / UNIT).astype(np.float32)[:, None] for values in (self.covered[rows], cosines))

        def subtract(left: int) -> None:
            for start in range(0, len(rows), HEIGHT):
                part = slice(start, start + HEIGHT)
                tile = self._vectors[rows[part]] @ self._vectors[left : left + WIDTH].T
                np.maximum(tile, old[part], out=tile)
                np.minimum(tile, new[part], out=tile)
                tile -= old[part]
                self.bound[left : left + WIDTH] -= tile.sum(axis=0)

        for _ in in_blocks(subtract, len(self._floor), WIDTH):
            pass
        self.error += ROUNDING * len(rows)

    def _cover(self, rows: Indices, cosines: Indices) -> None:
        """Cover rows so well, and take what that leaves less to add from all rows that are remembered for them."""
        num_rows = len(self._floor)
        old, was_open = self.covered[rows], self._open[rows]
        self.covered[rows] = cosines
        self._open[rows] = self._is_open(rows)
        which, places = _ranges(self._starts, rows)
        columns, near = self._columns[places], self._cosines[places]
        before = np.maximum(near - (old / UNIT)[which], 0)
        after = np.maximum(near - (cosines / UNIT)[which], 0)
        if self.bound is not self._closed_gain:
            less = before - after
            if self._carried:
                less[was_open[which]] = 0  # that was done
            self.bound -= np.bincount(columns, less, num_rows)
        after[self._open[rows][which]] = 0
        before[was_open[which]] = 0
        self._closed_gain += np.bincount(columns, after - before, num_rows)

    def _least_error(self, rows: Indices) -> Cosines:
        """Return what `compute` may miss for these rows through rounding."""
        return ROUNDING * (self._num_open + 1 + self._column_starts[rows + 1] - self._column_starts[rows])

    def _is_open(self, rows: Indices) -> npt.NDArray[np.bool_]:
        return self.covered[rows] < np.minimum(self._floor[rows] + MARGIN, 1) * UNIT  # no cosine is above 1

    def _look_at_all(self, neighbors: int) -> tuple[Indices, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Compute all similarities once, tile by tile: set the first bounds, return those above the floors, by row."""
        num_rows = len(self._vectors)
        height = max(CELLS // 4 // num_rows, 1)
        guess = np.full(num_rows, self._guess)
        covered = np.maximum(exact_cosines(self._vectors, np.arange(num_rows), guess), 0).astype(np.float32)[:, None]

        def look(start: int) -> tuple[Any, ...]:
            tile = self._vectors[start : start + height] @ self._vectors.T
            floor = self._floor[start : start + height]
            above = tile >= floor[:, None]
            count = above.sum(axis=1)
            for row in np.flatnonzero(count > 8 * neighbors):  # the sample misled: many rows are nearly alike
                floor[row] = np.partition(tile[row], num_rows - neighbors)[num_rows - neighbors] + MARGIN
                above[row] = tile[row] >= floor[row]
                count[row] = above[row].sum()
            places = np.flatnonzero(above)  # several times as fast as in two dimensions
            near = tile.ravel()[places]
            np.maximum(tile, 0, out=tile)
            added = tile.sum(axis=0)
            tile -= covered[start : start + height]
            np.maximum(tile, 0, out=tile)
            return count, (places % num_rows).astype(np.int32), near, added, tile.sum(axis=0)

        counts, columns, cosines = [], [], []
        for count, column, near, added, after in in_blocks(look, num_rows, height):
            counts.append(count)
            columns.append(column)
            cosines.append(near)
            self.bound += added
            self._after_guess += after
        return np.concatenate([[0], np.cumsum(np.concatenate(counts))]), np.concatenate(columns), np.concatenate(cosines)


def _likely_first(vectors: Vectors) -> int:
    """Return a row that is likely to add most at first: of those nearest to the mean, the one that does. It is only a guess."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows = np.argsort(-(vectors @ mean), kind="stable")[:64]
    height = max(CELLS // 64, 1)
    added = sum(np.maximum(vectors[start : start + height] @ vectors[rows].T, 0).sum(axis=0) for start in range(0, len(vectors), height))
    return int(rows[np.argmax(added)])


def _floors(vectors: Vectors, neighbors: int) -> npt.NDArray[np.float32]:
    """Return for each row a cosine that about `neighbors` rows exceed, judged by a sample; below 0 where all shall be remembered."""
    num_rows = len(vectors)
    if num_rows <= neighbors:
        return np.full(num_rows, -MARGIN, dtype=np.float32)
    size = min(num_rows, max(512, 8 * num_rows // neighbors))
    sample = vectors[np.random.default_rng(0).choice(num_rows, size, replace=False)]
    place = max(size - 1 - neighbors * size // num_rows, 0)
    floors = np.empty(num_rows, dtype=np.float32)

    def judge(start: int) -> None:
        cosines = vectors[start : start + HEIGHT] @ sample.T
        cosines.partition(place, axis=1)
        floors[start : start + HEIGHT] = cosines[:, place]

    for _ in in_blocks(judge, num_rows, HEIGHT):
        pass
    return np.maximum(floors, 0) + np.float32(MARGIN)


def _ranges(starts: Indices, rows: Indices) -> tuple[Indices, Indices]:
    """Return the places from starts[row] to starts[row + 1] of all rows, one after another, and which of the rows each belongs to."""
    counts = starts[rows + 1] - starts[rows]
    which = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(counts)
    return which, np.arange(len(which)) + (starts[rows] - (ends - counts))[which]


def _chunks(rows: Indices, entries: int) -> Iterator[Indices]:
    """Yield rows in parts that have about CELLS entries together at most, `entries` each."""
    size = max(CELLS // entries, 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
