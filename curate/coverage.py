"""k-center: rank rows so that the picks leave no row far away."""

from collections.abc import Iterator

import numpy as np

from .similarity import MARGIN, TILE, Cosines, Indices, Vectors, exact_cosines, nearest

Pick = tuple[int, float | None, int | None]  # row, gain, witness: the pick before it that is most similar


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
        """Add a pick. Costs n·d multiplications."""
        np.maximum(self.proposed, self._vectors @ self._vectors[pick], out=self.proposed)
        self.proposed[pick] = np.inf
        self.picks[self.count] = pick
        self.count += 1

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


def k_center(vectors: Vectors, first: int) -> Iterator[Pick]:
    """Yield the rows in the order of k-center greedy (Gonzalez 1985), beginning with `first`; gain is 1 − cosine to the nearest pick.

    Cosines are those of `exact_cosines`; of equally distant rows the lowest comes first. Rows within MARGIN of a pick are
    copies: when only they are left they follow in row order. Costs n·d multiplications a row, and no memory of size n².
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
        rows = np.flatnonzero(near.proposed <= farthest + 2 * MARGIN)
        cosines = near.settle(rows)
        place = int(np.argmin(cosines))
        pick = int(rows[place])
        near.take(pick)
        yield pick, 1 - float(cosines[place]), int(near.witness[pick])


def nearest_to_mean(vectors: Vectors) -> int:
    """Return the row with the largest cosine to the mean of all; of equals the lowest."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    products = [vectors[start : start + TILE] @ mean for start in range(0, len(vectors), TILE)]
    return int(np.argmax(np.round(np.concatenate(products), 9)))
