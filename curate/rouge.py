"""ROUGE-L between short texts: is there one in a growing pool that a new text is too like to?"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from ..core.ngrams import words


class RougePool:
    """Texts with their words, and for a new text the first one whose ROUGE-L F-measure with it is at least a threshold.

    Exact (Lin 2004, with beta 1, as Self-Instruct uses it): pairs are only left out that share too few words to reach it.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._ids: list[str] = []
        self._words: list[list[bytes]] = []
        self._holding: defaultdict[bytes, list[tuple[int, int]]] = defaultdict(list)  # word: (text, times) of each that holds it

    def add(self, name: str, text: str) -> None:
        """Take a text into the pool."""
        place, found = len(self._ids), words(text)
        self._ids.append(name)
        self._words.append(found)
        for word, times in Counter(found).items():
            self._holding[word].append((place, times))

    def like(self, text: str) -> tuple[str, float] | None:
        """Return the name of the text in the pool that is most like this one, and their F-measure, if that reaches the threshold."""
        mine = words(text)
        shared: Counter[int] = Counter()
        for word, times in Counter(mine).items():
            for place, theirs in self._holding.get(word, ()):
                shared[place] += min(times, theirs)
        best: tuple[str, float] | None = None
        for place in sorted(shared):
            total = len(mine) + len(self._words[place])
            if 2 * shared[place] >= self.threshold * total:
                score = 2 * longest_common_subsequence(mine, self._words[place]) / total
                if score >= self.threshold and (best is None or score > best[1]):
                    best = self._ids[place], score
        return best


def longest_common_subsequence(left: Sequence[bytes], right: Sequence[bytes]) -> int:
    """Return the length of the longest common subsequence, a bit of one number for each word of `left` (Hyyrö 2004)."""
    places: defaultdict[bytes, int] = defaultdict(int)
    for place, word in enumerate(left):
        places[word] |= 1 << place
    row = (1 << len(left)) - 1
    for word in right:
        matches = row & places.get(word, 0)
        row = (row + matches) | (row - matches)
    return len(left) - (row & ((1 << len(left)) - 1)).bit_count()
