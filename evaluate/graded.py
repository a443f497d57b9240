"""Answers that no rule can mark: a judge gives each a grade, and the grade is its mark."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from ..core.judge import Item as Graded
from ..core.judge import Judge
from ..core.named_models import NamedModel
from .compare import Answer
from .results import told_question
from .tasks.base import JUDGED, Item, Mark, Task, filled

log = logging.getLogger(__name__)

SCALE = 6  # grades: 1 is worth 0, the highest 1

Answers = dict[str, list[list[Answer]]]  # by model, for each item


def grade_answers(task: Task, answers: Answers, judging: Judge) -> tuple[Task, Answers]:
    """Let a judge grade the answers to a task's judged questions; return the task with the grades.

    An answer that got no grade comes back with that as its error, `not_graded`. An empty one is worth nothing, and nobody is asked.
    """
    asked: dict[tuple[str, str], Graded] = {}  # by question and the answer's key
    nothing: dict[tuple[str, str], dict[str, Mark]] = {}
    for several in answers.values():
        said = {item.id: given for item, given in zip(task.items, several, strict=True)}
        for item in filter(judged, task.items):
            for index, each in enumerate(said[item.id]):
                if each.error:
                    continue
                if each.text.strip():
                    shown = filled(item, said[item.after][index].text) if item.after else item
                    reference = item.target.get("answer")
                    asked[item.id, each.key] = Graded(
                        told_question(shown.messages), each.text, None if reference is None else str(reference)
                    )
                else:
                    nothing[item.id, each.key] = {task.metrics[0]: Mark(0.0, False)}
    wanted = list(dict.fromkeys(asked.values()))  # the same words to the same question, after the same first answer, are one answer
    found = dict(zip(wanted, judging.grade(wanted), strict=True))
    missing = {place: found[each].error for place, each in asked.items() if found[each].value is None}
    for (name, _), error in list(missing.items())[:1]:
        log.warning("%s: %d answers got no grade; the first, to %s: %s", task.name, len(missing), name, error)
    values = {place: found[each].value for place, each in asked.items()}
    grades = {
        place: {task.metrics[0]: Mark((value - 1) / (SCALE - 1), True, f"{value:.2f}")}
        for place, value in values.items()
        if value is not None
    }
    marked = {
        name: [
            [replace(each, error="not_graded") if (item.id, each.key) in missing and not each.error else each for each in given]
            for item, given in zip(task.items, several, strict=True)
        ]
        for name, several in answers.items()
    }
    return replace(task, grades={**grades, **nothing}), marked


def judged(item: Item) -> bool:
    """Say whether only a judge can mark the answers to a question."""
    return item.target.get("scoring") == JUDGED


def warn_of(judge: NamedModel, models: Sequence[NamedModel]) -> None:
    """Say what a reader should know of a judge before believing its grades."""
    for model in models:
        if model.identity == judge.identity:
            log.warning("the judge is %s itself: judges prefer their own answers", model.name)
    log.warning("what a judge is worth is known from labelled pairs: sftkit evaluate judge RUN --judge %s", judge.name)
