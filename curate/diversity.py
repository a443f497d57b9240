"""Rankings that trade a row's quality for its difference from the picks: MMR, DPP and DEITA's filter."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..core.errors import UserError
from .coverage import NearestPick, Pick
from .similarity import BLOCK, MARGIN, Cosines, Vectors, exact_cosines, nearest

WIDTH = 0.5  # of the kernel exp((cosine − 1) / WIDTH)
COPY = 1e-9  # a row whose variance given the picks is less than this is a copy of them
MAX_BYTES = 4 * 2**30


def mmr(vectors: Vectors, quality: Cosines, weight: float) -> Iterator[Pick]:
    """Yield the rows by maximal marginal relevance (Carbonell & Goldstein 1998): weight·quality − (1 − weight)·cosine to the nearest pick.

    That difference is the gain; for the first row the cosine counts as 0. Cosines are those of `exact_cosines`; of equal gains
    the lowest row comes first. Costs n·d multiplications a row, and no memory of size n².
    """
    near = NearestPick(vectors)
    first = int(np.argmax(weight * quality))
    near.take(first)
    yield first, weight * float(quality[first]), None
    left = np.ones(len(vectors), dtype=bool)
    left[first] = False
    while near.count < len(vectors):
        rest = np.flatnonzero(left)
        values = weight * quality[rest] - (1 - weight) * near.proposed[rest].astype(np.float64)
        rows = rest[values >= values.max() - 2 * MARGIN]
        gains = weight * quality[rows] - (1 - weight) * near.settle(rows)
        place = int(np.argmax(gains))
        pick = int(rows[place])
        left[pick] = False
        near.take(pick)
        yield pick, float(gains[place]), int(near.witness[pick])


def dpp(vectors: Vectors, quality: Cosines | None, weight: float, size: int) -> Iterator[Pick]:
    """Yield `size` rows by greedy search for the likeliest set of a determinantal point process (Chen, Zhang & Zhou 2018).

    The kernel is exp((cosine − 1) / WIDTH): that of the bare cosines would have no more picks than the vectors have dimensions.
    The gain is the logarithm of a row's variance given the picks, by which it multiplies the determinant, or with `quality`
    (1 − weight)·that + weight·quality. Gains are rounded to 9 digits; of equals the lowest row comes first. Rows that are
    copies of the picks follow in row order, without a gain. The witness is the most similar earlier pick. Costs
    n·size² multiplications and n·size numbers of 8 bytes; raises UserError when these are more than MAX_BYTES.
    """
    num_rows = len(vectors)
    if num_rows * size * 8 > MAX_BYTES:
        most = MAX_BYTES // (8 * num_rows)
        raise UserError(
            f"dpp: {size:,} of {num_rows:,} rows would take {num_rows * size * 8 / 2**30:.1f} GiB of memory, more than the 4 it may have; "
            f"give --budget {most:,} or less, or take facility-location"
        )
    share = 1.0 if quality is None else 1 - weight
    bonus = np.zeros(num_rows) if quality is None else weight * quality
    wide = vectors.astype(np.float64)
    wide /= np.maximum(np.sqrt((wide * wide).sum(axis=1, keepdims=True)), 1e-12)
    variance = np.ones(num_rows)
    factors = np.empty((size, num_rows))  # a column for each row: its part of the Cholesky factor
    left = np.ones(num_rows, dtype=bool)
    near = NearestPick(vectors)
    for count in range(size):
        rest = np.flatnonzero(left & (variance > COPY))
        if not len(rest):
            copies = np.flatnonzero(left)[: size - count]
            for copy, witness in zip(copies, nearest(vectors, copies, near.picks[:count])[0], strict=True):
                yield int(copy), None, int(witness)
            return
        gains = np.round(share * np.log(variance[rest]) + bonus[rest], 9)
        place = int(np.argmax(gains))
        pick = int(rest[place])
        if count:
            near.settle(np.array([pick]))
        yield pick, float(gains[place]), int(near.witness[pick]) if count else None
        kernel = np.exp((np.round(wide @ wide[pick], 9) - 1) / WIDTH)
        row = (kernel - factors[:count, pick] @ factors[:count]) / np.sqrt(variance[pick])
        factors[count] = row
        variance -= row * row
        left[pick] = False
        near.take(pick)


def deita_filter(vectors: Vectors, order: Sequence[int], threshold: float, *, block: int = BLOCK) -> Iterator[Pick]:
    """Yield rows in `order`, best first, but those whose cosine with a row yielded before is `threshold` or more (Liu 2023).

    A row is compared with those that were taken, never with those that were not: a chain of neighbours does not vanish, and a
    row and its copy do not remove each other. Gain is 1 − cosine to the nearest pick, which is the witness. The block size,
    by which rows are compared at a time, changes nothing.
    """
    kept: list[int] = []
    for start in range(0, len(order), block):
        rows = np.asarray(order[start : start + block], dtype=np.int64)
        within = vectors[rows] @ vectors[rows].T
        witness, cosine = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), -np.inf)
        if kept:
            witness, cosine = nearest(vectors, rows, kept)
        here: list[int] = []  # places of this block's rows that were yielded
        for place, row in enumerate(rows):
            best, near = float(cosine[place]), int(witness[place])
            if here:
                proposed = within[place, here]
                close = rows[here][proposed >= max(best, float(proposed.max())) - MARGIN]
                exact = exact_cosines(vectors, np.full(len(close), row), close)
                if len(close) and exact.max() > best:
                    best, near = float(exact.max()), int(close[np.argmax(exact)])
            if best >= threshold:
                continue
            yield int(row), None if near < 0 else 1 - best, None if near < 0 else near
            here.append(place)
            kept.append(int(row))
