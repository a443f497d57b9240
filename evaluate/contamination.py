"""Which questions of a task stand in the data a model was trained on: by the runs of words they share."""

import re
from collections.abc import Iterable

from ..core.formats import iterate_examples
from .tasks.base import Item

WORD = re.compile(r"[^\W_]+")
RUN = 8  # words
MIN_COVERAGE = 0.5  # of a question's words, by runs that stand in one training row
LEAST = 3  # words: a shorter question says nothing


def contaminated(items: Iterable[Item], train_data: str) -> dict[str, str]:
    """Return the items that a training row holds, each with the row's place: half of its words in shared runs of eight, or all of it.

    The question is taken as it is asked, without its answer. Reads the training data once; an item is found in the first row that holds it.
    """
    runs: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    sizes: dict[str, int] = {}
    for item in items:
        words = _words(str(item.target.get("bare") or item.question))
        sizes[item.id] = len(words)
        if len(words) >= LEAST:
            for place, run in _runs(words):
                runs.setdefault(run, []).append((item.id, place))
    lengths = {len(run) for run in runs}
    found: dict[str, str] = {}
    for example in iterate_examples(train_data):
        covered: dict[str, set[int]] = {}
        for message in example.messages:
            words = _words(str(message.get("content") or ""))
            for length in lengths:
                for place in range(len(words) - length + 1):
                    for name, begin in runs.get(tuple(words[place : place + length]), ()):
                        covered.setdefault(name, set()).update(range(begin, begin + length))
        for name, places in covered.items():
            if name not in found and len(places) >= MIN_COVERAGE * sizes[name]:
                found[name] = example.source
    return found


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: list[str]) -> list[tuple[int, tuple[str, ...]]]:
    return [(place, tuple(words[place : place + RUN])) for place in range(max(1, len(words) - RUN + 1))]
