"""Tell which texts may repeat themselves, in columns: the few that may are then read word by word.

How many different things a text holds is counted from below, without sorting: each puts its place where its hash says, and those
that find it there again are different. What is lost where two of them meet only makes a text suspect.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from ..core.ngrams import Hashes, Offsets, Runs, first_letters, hash_words, mixed, rolling

TEXTS_AT_A_TIME = 1000
BYTES_AT_A_TIME = 4_000_000
ROOM = 8  # places for each thing, so that few of them meet
MOST_BITS = 27  # of the number of places: a text of many megabytes has fewer for each
WINDOW = 10
TOPS = (2, 3, 4)
JUDGED = 50  # words that a text has at least for its most frequent run to be asked for
ROUNDING = 1e-6  # of a share at its bound: the rule calls 1 - 7 / 10 more than 0.3

Flags = npt.NDArray[np.bool_]


def duplicate_ngrams(words: Sequence[str | bytes], n: int) -> float:
    """Return the share of the windows of n words that stood in the text before; 0 for a text shorter than that."""
    windows = len(words) - n + 1
    if windows < 1:
        return 0.0
    return 1 - len({tuple(words[start : start + n]) for start in range(windows)}) / windows


def top_ngram(words: Sequence[str | bytes], n: int) -> float:
    """Return the share of the words that the most frequent n-gram covers where it stands at least twice (Rae et al. 2021, A1.1)."""
    grams = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
    if count < 2:
        return 0.0
    covered, start = 0, 0
    while start <= len(words) - n:  # occurrences that overlap count once
        if tuple(words[start : start + n]) == gram:
            covered, start = covered + n, start + n
        else:
            start += 1
    return covered / len(words)


def may_repeat(texts: pl.Series, max_duplicate: float, max_top: float) -> pl.Series:
    """Say of each text whether its share of repeated 10-grams, or of its words in one 2- to 4-gram, may be above these.

    Of a text beyond ASCII, whose words are others once it is normalised, that is never excluded.
    """
    suspect = np.ones(len(texts), dtype=bool)
    plain = (texts.str.len_bytes() == texts.str.len_chars()).arg_true().to_numpy()
    for places in _blocks(plain, texts.str.len_bytes().gather(plain).to_numpy()):
        few = places[_few_words(first_letters(texts.gather(places).to_list()), max_duplicate, max_top)]
        suspect[places] = False
        if len(few):
            suspect[few] = _few_runs(hash_words(texts.gather(few)), max_duplicate, max_top)
    return pl.Series(texts.name, suspect)


def _blocks(places: Offsets, sizes: npt.NDArray[np.uint32]) -> Iterator[Offsets]:
    """Yield the places of texts in blocks of TEXTS_AT_A_TIME, or of fewer where these would have more bytes than BYTES_AT_A_TIME."""
    ends, start = np.cumsum(sizes, dtype=np.int64), 0
    while start < len(places):
        most = np.searchsorted(ends, (ends[start - 1] if start else 0) + BYTES_AT_A_TIME, side="right")
        end = min(max(int(most), start + 1), start + TEXTS_AT_A_TIME)
        yield places[start:end]
        start = end


def _few_words(words: Runs, max_duplicate: float, max_top: float) -> Flags:
    """Say where the different words are too few to clear a text.

    A word that stands at place 10 or later for the first time ends a window of 10 that did not stand before; and what an n-gram
    of 4 words at most does not cover has all the other words.
    """
    total, distinct = words.sizes, _num_distinct(words.values, words.owners, len(words))
    enough = distinct - ROUNDING
    return (enough < WINDOW - 1 + (1 - max_duplicate) * (total - WINDOW + 1)) | (enough < TOPS[-1] + (1 - max_top) * total)


def _few_runs(hashed: Runs, max_duplicate: float, max_top: float) -> Flags:
    """Say where so many runs of words stood before that one of them may be as frequent as that, or half of them."""
    total, owners = hashed.sizes, hashed.owners
    found = np.zeros(len(hashed), dtype=bool)
    for size, values in rolling(hashed, (*TOPS, WINDOW)):
        own = owners[: len(values)]
        inside = own == owners[size - 1 :]
        windows = np.maximum(total - size + 1, 0)
        again = windows - _num_distinct(values[inside], own[inside], len(hashed))
        if size == WINDOW:
            found |= (again > 0) & (again > max_duplicate * windows - ROUNDING)
        else:
            found |= (total >= JUDGED) & (again > max_top * total / size - 1 - ROUNDING)
    return found


def _num_distinct(values: Hashes, owners: Offsets, count: int) -> Offsets:
    """Return how many different values each owner has, or a few less."""
    bits = min(max(len(values) * ROOM, 2).bit_length(), MOST_BITS)
    slots = ((mixed(owners.astype(np.uint64)) ^ mixed(values)) >> np.uint64(64 - bits)).view(np.int64)
    own = np.arange(len(values), dtype=np.int32)
    last = np.empty(1 << bits, dtype=np.int32)
    last[slots] = own
    return np.bincount(owners[last[slots] == own], minlength=count)
