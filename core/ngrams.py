"""Words and runs of words as 64-bit hashes of their content, so that millions of texts can be compared by numpy alone.

The indexes in curate/data/ hold such hashes: whoever changes how they are made runs benchmarks/build_indexes.py.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

CHINESE_WORD = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # scripts without spaces: each character counts as a word
WORD = re.compile(rf"{CHINESE_WORD}|(?:(?!{CHINESE_WORD})[\w'’-])+")

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64
PLAIN = bytes(ord(chr(code).lower()) if WORD.fullmatch(chr(code)) else 32 for code in range(128)) + bytes(128)
SPACE = 32
TEXTS_AT_A_TIME = 1000


@dataclass(frozen=True, slots=True)
class Runs:
    """For each text a run of hashes: those of text i are values[starts[i]:starts[i + 1]]."""

    values: Hashes
    starts: Offsets

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, text: int) -> Hashes:
        """Return the hashes of one text."""
        return self.values[self.starts[text] : self.starts[text + 1]]

    @property
    def sizes(self) -> Offsets:
        """The number of hashes of each text."""
        return np.diff(self.starts)

    @property
    def owners(self) -> Offsets:
        """The text that each hash belongs to."""
        return np.repeat(np.arange(len(self)), self.sizes)


def words(text: str) -> list[bytes]:
    """Return the words of a text, as `WORD` finds them after NFKC and case folding, in UTF-8.

    A text of ASCII takes the short way, ten times as fast and equal.
    """
    if text.isascii():
        return text.encode().translate(PLAIN).split()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return [word.encode("utf-8", "surrogatepass") for word in WORD.findall(folded)]


def hash_words(texts: Iterable[str]) -> Runs:
    """Return the hashes of the words of each text, in their order: equal for equal words, in every process.

    A word's hash is the sum of its bytes, each times a random number of its place (multilinear hashing), its bits then spread.
    """
    parts, sizes = [np.empty(0, dtype=np.uint64)], [np.zeros(1, dtype=np.int64)]
    rest = iter(texts)
    while found := list(islice(rest, TEXTS_AT_A_TIME)):
        spaced, lengths_of_texts = _spaced(found)
        letters = np.frombuffer(spaced, dtype=np.uint8)
        places = np.flatnonzero(letters != SPACE)
        begins = np.flatnonzero(np.diff(places, prepend=-2) > 1)  # of words, among `places`; every text ends with a space
        lengths = np.diff(begins, append=len(places))
        within = np.arange(len(places)) - np.repeat(begins, lengths)
        factors = mixed(np.arange(1, lengths.max(initial=0) + 1, dtype=np.uint64)) | np.uint64(1)
        sums = np.add.reduceat(factors[within] * letters[places], begins) if len(begins) else np.empty(0, dtype=np.uint64)
        parts.append(mixed(sums))
        sizes.append(np.diff(np.searchsorted(places[begins], np.cumsum(lengths_of_texts)), prepend=0))
    return Runs(np.concatenate(parts), np.cumsum(np.concatenate(sizes)))


def _spaced(texts: list[str]) -> tuple[bytes, list[int]]:
    """Return the words of texts, each with a space or more behind it, one text after the other, and how many bytes each takes."""
    joined = "\n".join([*texts, ""])
    if joined.isascii():
        return joined.encode().translate(PLAIN), [len(text) + 1 for text in texts]
    each = [text.encode().translate(PLAIN) + b" " if text.isascii() else b" ".join([*words(text), b""]) + b" " for text in texts]
    return b"".join(each), list(map(len, each))


def ngrams(hashed: Runs, n: int) -> Runs:
    """Return the hashes of each text's runs of n words, in order; a text of fewer words has none."""
    return ngrams_of(hashed, (n,))[n]


def ngrams_of(hashed: Runs, sizes: Iterable[int]) -> dict[int, Runs]:
    """Return what `ngrams` does for several sizes, made of each other: a run's hash is a polynomial in its words."""
    wanted, found = set(sizes), {}
    longest = max(wanted)
    values = np.zeros(len(hashed.values), dtype=np.uint64)
    inside = np.ones(len(hashed.values), dtype=bool)
    ends = hashed.starts[1:]
    power = np.uint64(1)
    for n in range(1, longest + 1):
        whole = max(len(hashed.values) - n + 1, 0)
        values, inside = values[:whole], inside[:whole]
        values *= FACTOR
        values += hashed.values[n - 1 : n - 1 + whole]
        if n > 1:  # runs that begin so near the end of a text that they reach into the next
            late = ends - (n - 1)
            inside[late[(late >= hashed.starts[:-1]) & (late < whole)]] = False
        with np.errstate(over="ignore"):
            power = power * FACTOR
            if n in wanted:
                counts = np.maximum(hashed.sizes - n + 1, 0)
                starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
                found[n] = Runs(mixed(values[inside] + np.uint64(n) * power), starts)
    return found


def whole_texts(hashed: Runs) -> Hashes:
    """Return one hash for each text, of all its words: equal to that of the same run of words by `ngrams`."""
    found = np.zeros(len(hashed), dtype=np.uint64)
    sizes = hashed.sizes
    for size in np.unique(sizes[sizes > 0]).tolist():
        of_size = np.flatnonzero(sizes == size)
        found[of_size] = whole_of(hashed, of_size, size)
    return found


def whole_of(hashed: Runs, texts: Offsets, size: int) -> Hashes:
    """Return what `whole_texts` does for some texts, which have `size` words each."""
    values = np.full(len(texts), size, dtype=np.uint64)
    for place in range(size):
        values = values * FACTOR + hashed.values[hashed.starts[texts] + place]
    return mixed(values)


def mixed(values: Hashes) -> Hashes:
    """Return the values with their bits spread evenly, one to one (the last steps of SplitMix64)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


class Lookup:
    """Places of hashes in a table of distinct ones. What is absent, which is nearly all, is told by one look at a map of bits."""

    def __init__(self, table: Hashes) -> None:
        self.table = table  # rising
        self._bits = min(max(len(table).bit_length() + 5, 10), 26)
        self._present = np.zeros(1 << self._bits, dtype=bool)
        self._present[table >> np.uint64(64 - self._bits)] = True

    def find(self, values: Hashes) -> tuple[Offsets, Offsets]:
        """Return which of `values` are in the table, rising, and their places there."""
        near = np.flatnonzero(self._present[values >> np.uint64(64 - self._bits)])
        places = np.searchsorted(self.table, values[near])
        places[places == len(self.table)] = 0
        there = self.table[places] == values[near] if len(self.table) else np.zeros(0, dtype=bool)
        return near[there], places[there]


def gathered(starts: Sequence[int] | Offsets, sizes: Sequence[int] | Offsets) -> Offsets:
    """Return the places start, start + 1, …, start + size - 1 of every run, one after the other."""
    sizes = np.asarray(sizes, dtype=np.int64)
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(starts, dtype=np.int64) - (ends - sizes), sizes)
