"""MMLU: questions of 57 subjects with four choices each (Hendrycks et al. 2020, arXiv 2009.03300), asked in two ways."""

import logging
import re

from ...core.errors import UserError
from ..config import TasksConfig
from ..task_data import LETTERS, Row, read_data
from .base import Item, Mark, Task, asked

log = logging.getLogger(__name__)

ASKING = "\n\nAnswer with the letter of the right choice alone."
# the letter where an answer names it: "answer is (B)", "B.", "**B**", "(b) because"
SAID = re.compile(
    r"\banswer\b\W{0,4}(?:is|:)?\W{0,6}\(?([A-D]\b(?!')|[a-d](?=\W*$|[).:,;*]))"  # "the answer is a matter" names none
    r"|^\W{0,4}\(?([A-D])\b(?![' ][a-z])|\(([A-D])\)|^\W{0,4}([A-D])$",
    re.MULTILINE,
)


def load(config: TasksConfig) -> Task:
    """Return the task that compares the probabilities of the four letters; its questions are completed, never asked as a chat."""
    return Task(name="mmlu", items=_items(config.shots), metrics=("likelihood",), score=score_choice, likelihood=True)


def load_generated(config: TasksConfig) -> Task:
    """Return the task that reads the letter out of a written answer."""
    items = _items(config.shots)
    return Task(name="mmlu_generated", items=items, metrics=("generated",), score=score_generated, max_new_tokens=64, stops=("\n\n",))


def _items(num_shots: int) -> list[Item]:
    rows = read_data("mmlu")
    shots: dict[str, list[Row]] = {}
    for row in rows:
        if row["split"] == "dev":
            shots.setdefault(row["subject"], []).append(row)
    if all(row["split"] != "test" for row in rows):
        raise UserError("mmlu: no row of its data has the split test, and those are asked; `sftkit evaluate data get mmlu` takes others")
    fewest = min(len(shots.get(str(row["subject"]), [])) for row in rows if row["split"] == "test")
    if fewest < num_shots:
        log.warning("mmlu: some subject has %d worked examples (rows with the split dev), fewer than the %d of shots", fewest, num_shots)
    counts: dict[str, int] = {}
    items: list[tuple[int, Item]] = []
    for row in rows:
        if row["split"] != "test":
            continue
        subject = str(row["subject"])
        counts[subject] = counts.get(subject, -1) + 1
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        worked = "".join(f"{_shown(each)} {each['answer']}\n\n" for each in shots.get(subject, [])[:num_shots])
        choices = tuple(f" {letter}" for letter in LETTERS)
        bare = _shown(row).removesuffix("\nAnswer:")
        target = {"answer": row["answer"], "bare": bare}
        name = f"mmlu/{subject}/{counts[subject]}"
        items.append((counts[subject], Item(name, asked(bare + ASKING), head + worked + _shown(row), target, subject, choices)))
    return [item for _, item in sorted(items, key=lambda each: each[0])]  # the first of all subjects first: a limit takes from each


def _shown(row: Row) -> str:
    return "\n".join([str(row["question"]).strip(), *(f"{letter}. {row[letter]}" for letter in LETTERS), "Answer:"])


def score_choice(item: Item, answer: str) -> dict[str, Mark]:
    """Compare the most probable choice with the right one."""
    letter = answer.strip()
    return {"likelihood": Mark(float(letter == item.target["answer"]), True, letter)}


def score_generated(item: Item, answer: str) -> dict[str, Mark]:
    """Compare the letter that an answer names with the right one."""
    found = SAID.search(answer.strip()[:2_000])
    if found is None:
        return {"generated": Mark(0.0, False)}
    letter = next(each for each in found.groups() if each).upper()
    return {"generated": Mark(float(letter == item.target["answer"]), True, letter)}
