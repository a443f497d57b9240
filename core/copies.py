"""Find copies of items in texts: benchmark questions in training rows, by the runs of words that they share, or whole.

Of items only hashes of their 8-word runs are needed, in the order of the items. A longer run is a row of them that also stands in
a row in the text, so one index serves every length.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .files import write_atomically
from .ngrams import Hashes, Lookup, Offsets, Runs, gathered, hash_words, ngrams, rolling, unmixed, whole_of, whole_texts, words

GRAM = 8  # words of the runs whose hashes are stored
SHORT = 5  # items of fewer words count only where they are a whole turn of the user's
LEAST = 3  # and of fewer still say nothing
POSTINGS_AT_A_TIME = 2_000_000
MOST = 5  # items told of one text: a template that hundreds of them share would tell all
SENTENCE_END = re.compile(r"[.!?:;。！？：；\n]+")


@dataclass(frozen=True, slots=True)
class Index:
    """A benchmark as hashes. An item may have several entries: its turns, or its question without and with the choices."""

    name: str
    items: list[str]
    sizes: Offsets  # words
    grams: Runs  # the 8-word runs, in order; none for an entry of fewer words
    whole: Hashes  # all words of the entry

    def save(self, path: Path) -> None:
        """Write the index as .npz."""
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                items=np.array(self.items),
                sizes=self.sizes,
                grams=self.grams.values,
                starts=self.grams.starts,
                whole=self.whole,
            )


def build_index(name: str, entries: Sequence[tuple[str, str]]) -> Index:
    """Make the index of a benchmark from (item, text) pairs."""
    hashed = hash_words(plain(text) for _, text in entries)
    return Index(name, [item for item, _ in entries], hashed.sizes, ngrams(hashed, GRAM), whole_texts(hashed))


@dataclass(frozen=True, slots=True)
class Match:
    """An item found in a text: by their numbers, with the place in the text where the longest run begins."""

    text: int
    entry: int
    longest: int
    coverage: float
    place: int


class Matcher:
    """Finds the entries of several indexes in texts: of one text the `most` that share the longest runs with it."""

    def __init__(self, indexes: Sequence[Index], ngram: int, min_coverage: float, *, most: int = MOST) -> None:
        self._indexes, self._ngram, self._min_coverage, self._most = indexes, ngram, min_coverage, most
        self._firsts = np.cumsum([0, *(len(index.items) for index in indexes)])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._whole = np.concatenate([index.whole for index in indexes])
        values = unmixed(np.concatenate([index.grams.values for index in indexes]))
        per_entry = np.concatenate([index.grams.sizes for index in indexes])
        order = np.argsort(values, kind="stable")
        table, first, counts = np.unique(values[order], return_index=True, return_counts=True)
        self._lookup, self._first, self._counts = Lookup(table), first, counts
        self._entry = np.repeat(np.arange(len(per_entry)), per_entry)[order]  # by posting
        self._place = gathered([0] * len(per_entry), per_entry)[order]
        self._short_items: dict[int, tuple[Lookup, Offsets]] = {}  # by their number of words; of equal items the first
        for size in range(LEAST, GRAM):
            entries = np.flatnonzero(self._sizes == size)
            if len(entries):
                hashes = self._whole[entries]
                table, first = np.unique(hashes if size < SHORT else unmixed(hashes), return_index=True)
                self._short_items[size] = (Lookup(table), entries[first])

    def item(self, entry: int) -> tuple[str, str]:
        """Return the benchmark and the item of an entry."""
        which = int(np.searchsorted(self._firsts, entry, side="right")) - 1
        return self._indexes[which].name, self._indexes[which].items[entry - self._firsts[which]]

    def find(self, texts: Sequence[str], asked: Sequence[bool] | npt.NDArray[np.bool_]) -> list[Match]:
        """Return what the texts hold; `asked` says which are no answers."""
        texts = [plain(text) for text in texts]
        hashed = hash_words(texts)
        long: list[Match] = []
        short = self._whole_turns(hashed, np.asarray(asked, dtype=bool))
        for size, values in rolling(hashed, [GRAM, *(size for size in self._short_items if size >= SHORT)]):
            lookup, entries = self._short_items.get(size, (self._lookup, None))
            where, known = lookup.find(values)
            text = np.searchsorted(hashed.starts, where, side="right") - 1
            inside = where + size <= hashed.starts[text + 1]
            where, known, text = where[inside], known[inside], text[inside]
            if entries is None:
                long = self._long(hashed.starts, text, where, known)
                continue
            matches = _matches(text, entries[known], size, where - hashed.starts[text])
            short += [each for each in matches if asked[each.text] or _is_sentence(texts[each.text], each)]
        return long + short

    def _long(self, starts: Offsets, owner: Offsets, where: Offsets, known: Offsets) -> list[Match]:
        shares = np.cumsum(self._counts[known]) // POSTINGS_AT_A_TIME  # whole texts together, not many more postings than that
        found: list[Match] = []
        first = 0
        while first < len(where):
            last = int(np.searchsorted(shares, shares[first], side="right"))
            last = int(np.searchsorted(owner, owner[last - 1], side="right"))
            found += self._runs(starts, owner[first:last], where[first:last], known[first:last])
            first = last
        return found

    def _runs(self, starts: Offsets, owner: Offsets, where: Offsets, known: Offsets) -> list[Match]:
        """Return what the texts hold of which the 8-word runs `where` stand at the places `known` of the table."""
        times = self._counts[known]
        postings = gathered(self._first[known], times)
        text = np.repeat(owner, times)
        at = np.repeat(where, times) - starts[text]
        entry, place = self._entry[postings], self._place[postings]
        order = np.lexsort((place, at - place, entry, text))
        text, entry, place, at = text[order], entry[order], place[order], at[order]
        begins = _changes(text, entry, at - place, place - np.arange(len(place)))  # runs that go on in the item as in the text
        length = np.diff(np.append(begins, len(text)))  # in grams
        text, entry, place, at = text[begins], entry[begins], place[begins], at[begins]
        enough = (length >= self._ngram - GRAM + 1) | (length == self._sizes[entry] - GRAM + 1)
        text, entry, place, at, length = text[enough], entry[enough], place[enough], at[enough], length[enough]
        order = np.lexsort((place, entry, text))
        text, entry, place, at, length = text[order], entry[order], place[order], at[order], length[order]
        pairs = _changes(text, entry)
        if not len(pairs):
            return []
        size, longest = self._sizes[entry[pairs]], np.maximum.reduceat(length, pairs) + GRAM - 1
        coverage = _covered(pairs, place, length + GRAM - 1) / size
        chosen = np.flatnonzero((coverage >= self._min_coverage) | (longest == size))
        chosen = chosen[np.lexsort((entry[pairs[chosen]], -coverage[chosen], -longest[chosen], text[pairs[chosen]]))]
        rank = np.arange(len(chosen)) - np.maximum.accumulate(np.where(_is_first(text[pairs[chosen]]), np.arange(len(chosen)), 0))
        ends, found = np.append(pairs[1:], len(text)), []
        for pair in chosen[rank < self._most].tolist():
            best = pairs[pair] + int(np.argmax(length[pairs[pair] : ends[pair]]))
            found.append(Match(int(text[best]), int(entry[best]), int(longest[pair]), float(coverage[pair]), int(at[best])))
        return found

    def _whole_turns(self, hashed: Runs, asked: npt.NDArray[np.bool_]) -> list[Match]:
        """Return the turns of the user's that are an item of fewer than SHORT words."""
        found = []
        for size, (lookup, entries) in self._short_items.items():
            if size < SHORT:
                alone = np.flatnonzero(asked & (hashed.sizes == size))
                where, known = lookup.find(whole_of(hashed, alone, size))
                found += _matches(alone[where], entries[known], size, np.zeros(len(where), dtype=np.int64))
        return found


def _matches(texts: Offsets, entries: Offsets, size: int, places: Offsets) -> list[Match]:
    return [Match(int(t), int(e), size, 1.0, int(p)) for t, e, p in zip(texts, entries, places, strict=True)]


def _is_sentence(text: str, match: Match) -> bool:
    """Say whether a match is all of a sentence or a line: within one, five words may be a title that anyone cites."""
    copied = words(text)[match.place : match.place + match.longest]
    return any(words(part) == copied for part in SENTENCE_END.split(text))


def _is_first(*columns: Offsets) -> npt.NDArray[np.bool_]:
    """Say of each row of a table whether it differs from the one before; the first does."""
    differs = np.zeros(len(columns[0]), dtype=bool)
    differs[:1] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return differs


def _changes(*columns: Offsets) -> Offsets:
    return np.flatnonzero(_is_first(*columns))


def _covered(pairs: Offsets, starts: Offsets, sizes: Offsets) -> Offsets:
    """Return for each pair how many places its intervals cover together; `pairs` are where each begins, and its starts rise."""
    apart = np.int64(starts.max() + sizes.max() + 1)  # put the pairs one after the other on one line
    shift = np.repeat(np.arange(len(pairs)), np.diff(np.append(pairs, len(starts)))) * apart
    ends = np.maximum.accumulate(starts + sizes + shift)
    before = np.concatenate([[0], ends[:-1]])
    return np.add.reduceat(np.maximum(ends - np.maximum(starts + shift, before), 0), pairs)


def plain(text: str) -> str:
    """Return a text with one shape of the apostrophe, of which benchmarks and their copies have two."""
    return text.replace("’", "'")
