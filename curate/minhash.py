"""Near duplicates by the words they share: Jaccard similarity of 5-word shingles, candidates by a sketch of the smallest ones.

Two sketches propose pairs, and every proposed pair is verified by its true Jaccard similarity. "exact" is the one that misses
nothing: put all shingles in one order, rarest first; two sets whose similarity is τ or more share one of the first
n - ⌈τn⌉ + 1 of theirs (prefix filtering: Chaudhuri, Ganti, Kaushik 2006). "lsh" is MinHash with bands (Broder 1997): it finds
a pair of similarity J with probability 1 - (1 - Jʳ)ᵇ.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..core.ngrams import Hashes, Lookup, Offsets, Runs, gathered, hash_words, mixed, ngrams, whole_texts
from ..core.progress import Progress
from .similarity import Indices

SHINGLE = 5
BANDS, ROWS = 25, 10  # finds J = .8 with probability .942, J = .5 with .024
HASHES_AT_A_TIME = 1 << 15  # stay in the processor's cache while all permutations are tried

Similarities = npt.NDArray[np.float64]


def shingle_sets(texts: Sequence[str]) -> Runs:
    """Return for each text the set of its 5-word shingles, rising. A text of fewer words is one shingle; one without words has none."""
    hashed = hash_words(texts)
    grams = ngrams(hashed, SHINGLE)
    short = (hashed.sizes > 0) & (hashed.sizes < SHINGLE)
    if short.any():
        sizes = grams.sizes + short
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        values = np.empty(starts[-1], dtype=np.uint64)
        alone = np.zeros(len(values), dtype=bool)
        alone[starts[:-1][short]] = True
        values[~alone], values[alone] = grams.values, whole_texts(_only(hashed, short))
        grams = Runs(values, starts)
    values = grams.values.copy()
    for start, end in zip(grams.starts[:-1].tolist(), grams.starts[1:].tolist(), strict=True):
        values[start:end].sort()
    fresh = np.ones(len(values), dtype=bool)
    fresh[1:] = values[1:] != values[:-1]
    fresh[grams.starts[:-1][grams.sizes > 0]] = True  # where a text begins with the last shingle of the text before
    sizes = np.bincount(grams.owners[fresh], minlength=len(grams)) if len(values) else np.zeros(len(grams), dtype=np.int64)
    return Runs(values[fresh], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def near_duplicates(
    shingles: Runs, threshold: float, order: Sequence[int], *, keys: Runs | None = None, given: int = 0
) -> tuple[Indices, Similarities]:
    """Return the witness of each row, -1 for those that stay, and the Jaccard similarity with it: greedy cover.

    Rows are visited in `order`; one stays if and only if no row that stayed before and shares one of its `keys` has a
    similarity of `threshold` or more. The witness is the most similar of these, of equals the one visited first; never more than
    one pair is held for each row. The first `given` rows of the order stay whatever they are like. Without `keys`, those of
    `prefix_keys`, nothing is missed. A row without shingles stays.
    """
    keys = prefix_keys(shingles, threshold) if keys is None else keys
    witness, similarity = np.full(len(shingles), -1, dtype=np.int64), np.zeros(len(shingles))
    visit, sizes = np.asarray(order, dtype=np.int64), shingles.sizes
    stayed: dict[int, list[int]] = defaultdict(list)  # by key, places in the order
    with Progress("near duplicates", total=len(visit), unit="rows") as progress:
        for place, row in enumerate(visit.tolist()):
            if place % 1000 == 0:
                progress.advance(min(1000, len(visit) - place))
            own = keys.of(row).tolist()
            found: set[int] = set()
            for key in own:
                if key in stayed:
                    found.update(stayed[key])
            if found:
                places = np.array(sorted(found))
                others = visit[places]
                like = (sizes[others] >= threshold * sizes[row] - 1e-9) & (threshold * sizes[others] - 1e-9 <= sizes[row])
                others = others[like]
                near = jaccard(shingles, row, others)
                best = int(np.argmax(near)) if len(near) else -1
                if best >= 0 and near[best] >= threshold and place >= given:
                    witness[row], similarity[row] = others[best], near[best]
                    continue
                if best >= 0 and near[best] == 1:
                    continue  # a given row that an equal one stands before: that one is always the witness
            for key in own:
                stayed[key].append(place)
    return witness, similarity


def jaccard(shingles: Runs, row: int, others: Indices) -> Similarities:
    """Return the Jaccard similarity of one row's set with those of the others: the size of what is in both by that of what is in either."""
    sizes = shingles.starts[others + 1] - shingles.starts[others]
    own = shingles.of(row)
    theirs = shingles.values[gathered(shingles.starts[others], sizes)]
    places = np.searchsorted(own, theirs)
    places[places == len(own)] = 0
    both = np.bincount(np.repeat(np.arange(len(others)), sizes), weights=own[places] == theirs, minlength=len(others))
    return both / (len(own) + sizes - both)


def prefix_keys(shingles: Runs, threshold: float) -> Runs:
    """Return for each row the shingles of which any other row of this similarity shares one: its rarest, n - ⌈τn⌉ + 1 of them.

    Those that no other row has are left out. Costs a sort of all shingles.
    """
    counts = _num_rows(shingles.values)
    sizes = shingles.sizes
    wanted = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    alone = np.bincount(shingles.owners[counts == 1], minlength=len(shingles))
    keys, num = [np.empty(0, dtype=np.uint64)], np.zeros(len(shingles), dtype=np.int64)
    for row in np.flatnonzero((sizes > 0) & (alone < wanted)).tolist():
        own, often = shingles.of(row), counts[shingles.starts[row] : shingles.starts[row + 1]]
        rarest = np.argsort(often, kind="stable")[alone[row] : wanted[row]]  # the shingles rise: of equally rare, the smaller first
        keys.append(own[rarest])
        num[row] = len(rarest)
    return Runs(np.concatenate(keys), np.concatenate([[0], np.cumsum(num)]).astype(np.int64))


def band_keys(shingles: Runs, *, bands: int = BANDS, rows: int = ROWS) -> Runs:
    """Return for each row `bands` keys, each made of `rows` minima of random permutations; none for a row without shingles.

    Costs bands × rows multiplications for each shingle.
    """
    filled = np.flatnonzero(shingles.sizes > 0)
    starts = shingles.starts[filled]
    keys = np.zeros((len(filled), bands), dtype=np.uint64)
    seeds = mixed(np.arange(1, 2 * bands * rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).reshape(-1, 2)
    cuts = [0]
    while cuts[-1] < len(filled):  # whole rows, as many as stay in the cache
        cuts.append(max(int(np.searchsorted(starts, starts[cuts[-1]] + HASHES_AT_A_TIME)), cuts[-1] + 1))
    for first, last in pairwise(cuts):
        begin, end = starts[first], shingles.starts[filled[last - 1] + 1]
        values, within = shingles.values[begin:end], starts[first:last] - begin
        for number, (mask, factor) in enumerate(seeds):
            minima = np.minimum.reduceat((values ^ mask) * (factor | np.uint64(1)), within)
            band = keys[first:last, number // rows]
            band *= np.uint64(0xD6E8FEB86659FD93)
            band += mixed(minima)
    keys = mixed(keys + mixed(np.arange(bands, dtype=np.uint64)))
    num = np.zeros(len(shingles), dtype=np.int64)
    num[filled] = bands
    return Runs(keys.ravel(), np.concatenate([[0], np.cumsum(num)]).astype(np.int64))


def _num_rows(values: Hashes) -> Offsets:
    """Return how many rows have each shingle; sets hold it once."""
    ordered = np.sort(values)
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else np.empty(0, dtype=np.int64)
    num = np.diff(np.append(edges, len(ordered)))
    repeated = Lookup(ordered[edges[num > 1]])
    counts = np.ones(len(values), dtype=np.int64)
    here, place = repeated.find(values)
    counts[here] = num[num > 1][place]
    return counts


def _only(hashed: Runs, chosen: npt.NDArray[np.bool_]) -> Runs:
    sizes = hashed.sizes[chosen]
    values = hashed.values[gathered(hashed.starts[:-1][chosen], sizes)]
    return Runs(values, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
