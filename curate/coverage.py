"""k-center: rank rows so that the picks leave no row far away."""

from collections.abc import Iterator

import numpy as np

from .similarity import MARGIN, TILE, Candidates, Cosines, Indices, Vectors, nearest

Pick = tuple[int, float | None, int | None]  # row, gain, witness: the pick before it that is most similar


FRONT = 4096  # rows that are compared with every pick of k-center at once: 6 MB at 384 dimensions
CELLS = 4_000_000  # cosines held at a time: 16 MB
BATCH = 128  # picks that the other rows are compared with in one product


class NearestPick:
    """The most similar pick of each row: proposed in float32 as picks come, exact for the rows that are asked about.

    Of equally similar picks the earliest is the witness. Holds a copy of the picks' vectors.
    """

    def __init__(self, vectors: Vectors) -> None:
        num_rows = len(vectors)
        self.proposed = np.full(num_rows, -np.inf, dtype=np.float32)  # the cosine, within MARGIN; infinite for a row that was taken
        self.picks = np.empty(num_rows, dtype=np.int64)
        self.count = 0
        self.witness = np.full(num_rows, -1, dtype=np.int64)
        self.vectors = vectors
        self._pick_vectors = np.empty((min(num_rows, 1024), vectors.shape[1]), dtype=np.float32)
        self._exact = np.full(num_rows, -np.inf)
        self._compared = np.zeros(num_rows, dtype=np.int64)  # with so many of the picks

    def take(self, pick: int) -> None:
        """Add a pick and compare all rows with it. Costs n·d multiplications."""
        np.maximum(self.proposed, self.vectors @ self.vectors[pick], out=self.proposed)
        self.proposed[pick] = np.inf
        self.note(pick)

    def note(self, pick: int) -> None:
        """Add a pick, and leave `proposed` to `catch_up`."""
        if self.count == len(self._pick_vectors):
            more = np.empty((min(2 * self.count, len(self.picks)), self.vectors.shape[1]), dtype=np.float32)
            more[: self.count] = self._pick_vectors
            self._pick_vectors = more
        self._pick_vectors[self.count] = self.vectors[pick]
        self.picks[self.count] = pick
        self.count += 1

    def catch_up(self, began: int) -> None:
        """Compare all rows with the picks that were noted since there were `began`."""
        late = self.picks[began : self.count]
        if not len(late):
            return
        for start in range(0, len(self.proposed), TILE):
            tile = (self.vectors[start : start + TILE] @ self._pick_vectors[began : self.count].T).max(axis=1)
            np.maximum(self.proposed[start : start + TILE], tile, out=self.proposed[start : start + TILE])
        self.proposed[late] = np.inf

    def settle(self, rows: Indices) -> Cosines:
        """Return the exact cosine of each of these rows with its nearest pick, and enter that pick in `witness`."""
        began = int(self._compared[rows].min())
        picks, own = self.picks[began : self.count], self._pick_vectors[began : self.count]
        height = max(CELLS // max(len(picks), 1), 1)
        for start in range(0, len(rows) if len(picks) else 0, height):
            part = rows[start : start + height]
            found = Candidates(len(part), floor=-2.0)
            found.add(self.vectors[part] @ own.T, 0)
            for row, (places, cosines) in zip(part, found.verified(self.vectors, part, picks), strict=True):
                best = int(np.argmax(cosines))
                if cosines[best] > self._exact[row]:
                    self._exact[row], self.witness[row] = cosines[best], picks[places[best]]
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
        least = near.proposed.min()
        if least >= 1 - MARGIN:
            yield from rest_of_copies(near, np.flatnonzero(np.isfinite(near.proposed)))
            return
        pick, cosine = farthest(near, np.flatnonzero(near.proposed <= least + 2 * MARGIN))
        near.take(pick)
        yield pick, 1 - cosine, int(near.witness[pick])
        if front >= len(vectors):
            rows, limit = np.arange(len(vectors)), np.inf
        else:
            order = np.argpartition(near.proposed, front)
            rows, limit = np.sort(order[:front]), float(near.proposed[order[front]])
        own, proposed, began = vectors[rows], near.proposed[rows], near.count
        while near.count - began < batch:
            least = proposed.min()
            if least >= min(limit - 2 * MARGIN, 1 - MARGIN):
                break
            pick, cosine = farthest(near, rows[proposed <= least + 2 * MARGIN])
            near.note(pick)
            np.maximum(proposed, own @ vectors[pick], out=proposed)
            proposed[np.searchsorted(rows, pick)] = np.inf
            yield pick, 1 - cosine, int(near.witness[pick])
        near.catch_up(began)


def farthest(near: NearestPick, rows: Indices) -> tuple[int, float]:
    """Return the lowest of the rows that are farthest from the picks, and its cosine with the nearest."""
    cosines = near.settle(rows)
    place = int(np.argmin(cosines))
    return int(rows[place]), float(cosines[place])


def rest_of_copies(near: NearestPick, rows: Indices) -> Iterator[Pick]:
    """Yield rows that are copies of picks, in their order: none of them is farther than another."""
    for copy, witness, cosine in zip(rows, *nearest(near.vectors, rows, near.picks[: near.count]), strict=True):
        yield int(copy), 1 - float(cosine), int(witness)


def nearest_to_mean(vectors: Vectors) -> int:
    """Return the row with the largest cosine to the mean of all; of equals the lowest."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    products = [vectors[start : start + TILE] @ mean for start in range(0, len(vectors), TILE)]
    return int(np.argmax(np.round(np.concatenate(products), 9)))
