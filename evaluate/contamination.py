"""Which questions of a task stand in the data a model was trained on: by the search that curation removes them with."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..core.copies import GRAM, Matcher, build_index
from ..core.formats import iterate_examples
from .tasks.base import Item

MIN_COVERAGE = 0.5  # of a question's words, by runs of eight that stand in one turn of a training row
ROWS_AT_A_TIME = 1000


def contaminated(items: Iterable[Item], train_data: str) -> dict[str, str]:
    """Return the items that a training row holds, each with the row's place: half of its words in shared runs of eight, or all of it.

    The question is taken as it is asked, without its answer; `core.copies` says what counts for a short one. Reads the training
    data once; an item is found in the first row that holds it.
    """
    questions = [(item.id, str(item.target.get("bare") or item.question)) for item in items]
    index = build_index("", questions)
    matcher = Matcher([index], GRAM, MIN_COVERAGE, most=len(questions))
    same: dict[int, list[str]] = {}  # of equal short questions the search tells one
    for (name, _), words in zip(questions, index.whole.tolist(), strict=True):
        same.setdefault(words, []).append(name)
    found: dict[str, str] = {}
    rest = iter(iterate_examples(train_data))
    while examples := list(islice(rest, ROWS_AT_A_TIME)):
        turns = [(example.source, message) for example in examples for message in example.messages]
        texts = [_text(message.get("content")) for _, message in turns]
        for match in sorted(matcher.find(texts, [message["role"] != "assistant" for _, message in turns]), key=lambda each: each.text):
            for name in same[int(index.whole[match.entry])]:
                found.setdefault(name, turns[match.text][0])
    return found


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))
