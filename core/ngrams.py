"""Words and runs of words as 64-bit hashes of their content, so that millions of texts can be compared by numpy alone.

The indexes in curate/data/ hold such hashes: whoever changes how they are made runs benchmarks/build_indexes.py.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
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
APART = bytes(0 if letter == 32 else letter for letter in PLAIN)
EIGHT = 8  # letters that are read as one number
FIRST_LETTERS = np.array([(1 << 8 * count) - 1 for count in range(EIGHT + 1)], dtype=np.uint64)
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
        letters, begins, lengths, counts = _cut(found)
        parts.append(mixed(_sums(letters, begins, lengths)))
        sizes.append(counts)
    return Runs(np.concatenate(parts), np.cumsum(np.concatenate(sizes)))


def first_letters(texts: list[str]) -> Runs:
    """Return the first EIGHT letters of the words of each text as numbers: words of which these differ are different."""
    letters, begins, lengths, counts = _cut(texts)
    values = _eights(letters)[begins] & FIRST_LETTERS[np.minimum(lengths, EIGHT)]
    return Runs(values, np.concatenate([[0], np.cumsum(counts)]))


def _cut(texts: list[str]) -> tuple[bytes, Offsets, Offsets, Offsets]:
    """Return the letters of texts, where words begin in them, the lengths of these, and how many words each text has."""
    letters, lengths_of_texts = _apart(texts)
    is_letter = np.frombuffer(letters, dtype=np.uint8) != 0
    edges = np.flatnonzero(is_letter[1:] != is_letter[:-1]) + 1
    begins, ends = edges[::2], edges[1::2]
    counts = np.diff(np.searchsorted(begins, np.cumsum(lengths_of_texts) + 1), prepend=0)
    return letters, begins, ends - begins, counts


def _eights(letters: bytes) -> Hashes:
    """Return the eight letters that begin at each place, as one number."""
    return np.ndarray((len(letters) - EIGHT + 1,), dtype="<u8", buffer=letters, strides=(1,))


def _apart(texts: list[str]) -> tuple[bytes, list[int]]:
    """Return the words of texts, one text after the other, with a zero before and behind each, and how many bytes each text takes.

    A zero comes before the first text and EIGHT behind the last.
    """
    joined = "\n".join([*texts, ""])
    if joined.isascii():
        return b"\0" + joined.encode().translate(APART) + bytes(EIGHT), [len(text) + 1 for text in texts]
    each = [text.encode().translate(APART) + b"\0" if text.isascii() else b"\0".join([*words(text), b""]) + b"\0" for text in texts]
    return b"".join([b"\0", *each, bytes(EIGHT)]), list(map(len, each))


def _sums(letters: bytes, begins: Offsets, lengths: Offsets) -> Hashes:
    """Return for each word the sum of its bytes, each times the number of its place; eight of them are read at once."""
    longest = int(lengths.max(initial=0))
    factors = mixed(np.arange(1, longest + EIGHT, dtype=np.uint64)) | np.uint64(1)
    eights = _eights(letters)
    sums = np.zeros(len(begins), dtype=np.uint64)
    left: Offsets | slice = slice(None)  # words that have more letters
    for first in range(0, longest, EIGHT):
        if first:
            left = np.flatnonzero(lengths > first)
        read = eights[begins[left] + first] & FIRST_LETTERS[np.minimum(lengths[left] - first, EIGHT)]
        part = (read & np.uint64(255)) * factors[first]
        for place in range(1, min(EIGHT, longest - first)):
            part += ((read >> np.uint64(8 * place)) & np.uint64(255)) * factors[first + place]
        sums[left] += part
    return sums


def ngrams(hashed: Runs, n: int) -> Runs:
    """Return the hashes of each text's runs of n words, in order; a text of fewer words has none."""
    ((_, values),) = rolling(hashed, (n,))
    inside = np.ones(len(values), dtype=bool)
    for more in range(1, n):  # runs that begin so near the end of a text that they reach into the next
        late = hashed.starts[1:] - more
        inside[late[(late >= hashed.starts[:-1]) & (late < len(values))]] = False
    return Runs(mixed(values[inside]), np.concatenate([[0], np.cumsum(np.maximum(hashed.sizes - n + 1, 0))]).astype(np.int64))


def rolling(hashed: Runs, sizes: Iterable[int]) -> Iterator[tuple[int, Hashes]]:
    """Yield each of the sizes, rising, with a number for every run of so many words, those too that reach into the next text.

    The numbers are polynomials in the words, made of each other; `mixed` they are the hashes of `ngrams`.
    """
    wanted = set(sizes)
    values = np.zeros(len(hashed.values), dtype=np.uint64)
    for n in range(1, max(wanted) + 1):
        values = values[: max(len(hashed.values) - n + 1, 0)]
        values *= FACTOR
        values += hashed.values[n - 1 :]
        if n in wanted:
            yield n, values + np.uint64(n * pow(int(FACTOR), n, 1 << 64) % (1 << 64))


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


def unmixed(hashes: Hashes) -> Hashes:
    """Return the values that `mixed` makes these hashes of."""
    values = hashes ^ (hashes >> np.uint64(31)) ^ (hashes >> np.uint64(62))
    values *= np.uint64(pow(0x94D049BB133111EB, -1, 1 << 64))
    values = values ^ (values >> np.uint64(27)) ^ (values >> np.uint64(54))
    values *= np.uint64(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
    return values ^ (values >> np.uint64(30)) ^ (values >> np.uint64(60))


class Lookup:
    """Places of hashes in a table of distinct ones. What is absent, which is nearly all, is told by one look at a map of bits."""

    def __init__(self, table: Hashes) -> None:
        self.table = table  # rising
        bits = min(max(len(table).bit_length() + 5, 10), 26)
        self._shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, dtype=bool)
        present[table >> self._shift] = True
        self._present = np.packbits(present, bitorder="little")

    def find(self, values: Hashes) -> tuple[Offsets, Offsets]:
        """Return which of `values` are in the table, rising, and their places there."""
        slots = values >> self._shift
        eights = self._present.take((slots >> np.uint64(3)).view(np.int64), mode="clip")  # all are within: no need to look
        near = np.flatnonzero((eights >> (slots & np.uint64(7)).astype(np.uint8)) & np.uint8(1))
        places = np.searchsorted(self.table, values[near])
        places[places == len(self.table)] = 0
        there = self.table[places] == values[near] if len(self.table) else np.zeros(0, dtype=bool)
        return near[there], places[there]


def gathered(starts: Sequence[int] | Offsets, sizes: Sequence[int] | Offsets) -> Offsets:
    """Return the places start, start + 1, …, start + size - 1 of every run, one after the other."""
    sizes = np.asarray(sizes, dtype=np.int64)
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(starts, dtype=np.int64) - (ends - sizes), sizes)
