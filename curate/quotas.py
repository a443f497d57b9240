"""Rankings that give every stratum or cluster its share, and the clusters."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from .coverage import Pick
from .similarity import TILE, Indices, Vectors, unit_vectors

ROUNDS = 20


def quota_order(strata: Sequence[Hashable], order: Sequence[int]) -> Iterator[Pick]:
    """Yield rows so that of the first h rows every stratum has its share of h, rounded down or up; within a stratum as in `order`.

    `strata` names the stratum of each row. This is the quota method of Balinski & Young (1975). Largest remainders give such
    shares too, but a larger budget may take a row from a stratum, so that a smaller one would not be a prefix of it. Of equal
    claims the stratum whose first row in `order` comes earlier goes first.
    """
    members: dict[Hashable, list[int]] = {}
    for row in order:
        members.setdefault(strata[row], []).append(row)
    queues = list(members.values())
    sizes = np.array([len(queue) for queue in queues], dtype=np.int64)
    taken = np.zeros(len(queues), dtype=np.int64)
    for count in range(1, len(order) + 1):
        may = taken * len(order) < sizes * count  # one more is not above its share, rounded up
        stratum = int(np.argmax(np.where(may, sizes / (taken + 1), -1.0)))
        yield queues[stratum][taken[stratum]], None, None
        taken[stratum] += 1


def balanced_order(clusters: Sequence[Hashable], order: Sequence[int]) -> Iterator[Pick]:
    """Yield one row of every cluster in turn, larger clusters first, as long as they have any; within a cluster as in `order`.

    Of equally large clusters the one whose first row in `order` comes earlier goes first.
    """
    members: dict[Hashable, list[int]] = {}
    for row in order:
        members.setdefault(clusters[row], []).append(row)
    queues = list(members.values())
    for turn, _, number in sorted((turn, -len(queue), number) for number, queue in enumerate(queues) for turn in range(len(queue))):
        yield queues[number][turn], None, None


def num_clusters(num_rows: int, asked: int | None) -> int:
    """Return how many clusters there are to be: as many as asked, else about the root of the number of rows."""
    return min(num_rows, asked or max(round(num_rows**0.5), 1))


def cluster(vectors: Vectors, count: int, seed: int) -> Indices:
    """Return the cluster of each row: k-means by cosine, ROUNDS times or until nothing changes.

    It begins with rows drawn by the seed, each with a chance by its distance from those drawn before (k-means++, Arthur &
    Vassilvitskii 2007). Of equally near centres the lowest counts, after rounding to 6 digits. Costs n·count·d multiplications
    a round. There are fewer clusters where there are fewer distinct rows.
    """
    random = np.random.default_rng(seed)
    drawn = [int(random.integers(len(vectors)))]
    nearest = np.full(len(vectors), -1.0, dtype=np.float32)
    while len(drawn) < count:
        nearest = np.maximum(nearest, vectors @ vectors[drawn[-1]])
        chances = np.cumsum(np.maximum(np.round(1 - nearest.astype(np.float64), 6), 0))
        if not chances[-1]:
            break
        drawn.append(int(np.searchsorted(chances, random.random() * chances[-1], side="right")))
    centers = vectors[drawn]
    labels = np.full(len(vectors), -1, dtype=np.int64)
    for _ in range(ROUNDS):
        tiles = [vectors[start : start + TILE] @ centers.T for start in range(0, len(vectors), TILE)]
        fresh = np.concatenate([np.argmax(np.round(tile, 6), axis=1) for tile in tiles])
        if (fresh == labels).all():
            break
        labels = fresh
        by_label = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[by_label], return_index=True)
        centers = centers.copy()
        centers[present] = unit_vectors(np.add.reduceat(vectors[by_label], starts, axis=0, dtype=np.float64))
    return labels
