"""k-center: rank rows so that the picks leave no row far away."""

from collections.abc import Iterator

import numpy as np

from .similarity import MARGIN, TILE, Cosines, Indices, Vectors, exact_cosines, nearest

Pick = tuple[int, float | None, int | None]  # row, gain, witness: the pick before it that is most similar


FRONT = 4096  # rows that are compared with every pick of k-center at once: 6 MB at 384 dimensions
BATCH = 128  # picks that the other rows are compared with in one product


class NearestPick:
    """The most similar pick of each row: proposed in float32 as picks come, exact for the rows that are asked about.

    Each pair is compared exactly at most once. Of equally similar picks the earliest is the witness.
    """

    def __init__(self, vectors: Vectors) -> None:
        num_rows = len(vectors)
        self.proposed = np.full(num_rows, -np.inf, dtype=np.float32)  # the cosine, within MARGIN; infinite for a row that was taken
        self.picks = np.empty(num_rows, dtype=np.int64)
        self.count = 0
        self.witness = np.full(num_rows, -1, dtype=np.int64)
        self._vectors = vectors
        self._exact = np.full(num_rows, -np.inf)
        self._compared = np.zeros(num_rows, dtype=np.int64)  # with so many of the picks

    def take(self, pick: int) -> None:
        """Add a pick and compare all rows with it. Costs n·d multiplications."""
        np.maximum(self.proposed, self._vectors @ self._vectors[pick], out=self.proposed)
        self.proposed[pick] = np.inf
        self.note(pick)

    def note(self, pick: int) -> None:
        """Add a pick, and leave `proposed` to `catch_up`."""
        self.picks[self.count] = pick
        self.count += 1

    def catch_up(self, began: int) -> None:
        """Compare all rows with the picks that were noted since there were `began`."""
        late = self.picks[began : self.count]
        if not len(late):
            return
        for start in range(0, len(self.proposed), TILE):
            tile = (self._vectors[start : start + TILE] @ self._vectors[late].T).max(axis=1)
            np.maximum(self.proposed[start : start + TILE], tile, out=self.proposed[start : start + TILE])
        self.proposed[late] = np.inf

    def settle(self, rows: Indices) -> Cosines:
        """Return the exact cosine of each of these rows with its nearest pick, and enter that pick in `witness`."""
        fresh = self.count - self._compared[rows]
        ends = np.cumsum(fresh)
        which = np.arange(ends[-1]) - np.repeat(ends - fresh, fresh) + np.repeat(self._compared[rows], fresh)
        cosines = exact_cosines(self._vectors, np.repeat(rows, fresh), self.picks[which])
        for row, start, end in zip(rows, ends - fresh, ends, strict=True):
            if start == end:
                continue
            best = start + int(np.argmax(cosines[start:end]))
            if cosines[best] > self._exact[row]:
                self._exact[row], self.witness[row] = cosines[best], self.picks[which[best]]
        self._compared[rows] = self.count
        return self._exact[rows]


def k_center(vectors: Vectors, first: int, *, front: int = FRONT, batch: int = BATCH) -> Iterator[Pick]:
    """Yield the rows in the order of k-center greedy (Gonzalez 1985), beginning with `first`; gain is 1 − cosine to the nearest pick.

    Cosines are those of `exact_cosines`; of equally distant rows the lowest comes first. Rows within MARGIN of a pick are
    copies: when only they are left they follow in row order. Costs n·d multiplications a row, and no memory of size n².

    Rows only come nearer. So as long as one of the `front` farthest rows is farther than any other row was, it alone can be
    the next, and the others are compared with up to `batch` picks at once, in one product: that is faster by far than one by one.
    """
    near = NearestPick(vectors)
    near.take(first)
    yield first, None, None
    while near.count < len(vectors):
        farthest = near.proposed.min()
        if farthest >= 1 - MARGIN:
            rest = np.flatnonzero(np.isfinite(near.proposed))
            for copy, witness, cosine in zip(rest, *nearest(vectors, rest, near.picks[: near.count]), strict=True):
                yield int(copy), 1 - float(cosine), int(witness)
            return
        pick, cosine = _farthest(near, np.flatnonzero(near.proposed <= farthest + 2 * MARGIN))
        near.take(pick)
        yield pick, 1 - cosine, int(near.witness[pick])
        if front >= len(vectors):
            rows, limit = np.arange(len(vectors)), np.inf
        else:
            order = np.argpartition(near.proposed, front)
            rows, limit = np.sort(order[:front]), float(near.proposed[order[front]])
        own, proposed, began = vectors[rows], near.proposed[rows], near.count
        while near.count - began < batch:
            farthest = proposed.min()
            if farthest >= min(limit - 2 * MARGIN, 1 - MARGIN):
                break
            pick, cosine = _farthest(near, rows[proposed <= farthest + 2 * MARGIN])
            near.note(pick)
            np.maximum(proposed, own @ vectors[pick], out=proposed)
            proposed[np.searchsorted(rows, pick)] = np.inf
            yield pick, 1 - cosine, int(near.witness[pick])
        near.catch_up(began)


def _farthest(near: NearestPick, rows: Indices) -> tuple[int, float]:
    """Return the lowest of the rows that are farthest from the picks, and its cosine with the nearest."""
    cosines = near.settle(rows)
    place = int(np.argmin(cosines))
    return int(rows[place]), float(cosines[place])


def nearest_to_mean(vectors: Vectors) -> int:
    """Return the row with the largest cosine to the mean of all; of equals the lowest."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    products = [vectors[start : start + TILE] @ mean for start in range(0, len(vectors), TILE)]
    return int(np.argmax(np.round(np.concatenate(products), 9)))
