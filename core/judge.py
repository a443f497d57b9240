"""A language model as a judge: one answer on a scale, or two against each other in both orders, with any engine.

Where the engine tells probabilities, a grade is the expected one, Σ j · softmax(logit_j) over the tokens of the grades, as in DEITA
(Liu et al. 2023, arXiv 2312.15685); from a server, and where it is asked for, what the judge writes is read. A pair is judged
in both orders: where the two disagree, the judge saw the place and not the answer, and it is a tie (Zheng et al. 2023, arXiv
2306.05685). What was judged is kept in a ValueStore by all that decides it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .asked import Asked
from .errors import UserError
from .example import Message
from .named_models import NamedModel
from .text import shortened
from .values import ValueStore

RUBRICS = {
    "helpfulness": "Judge how well the answer does what was asked: whether it is right, complete, clear and to the point. Length is no"
    " merit by itself.",
    "correctness": "Judge only whether the answer is right: facts, reasoning and results. A well-written answer that is wrong is bad.",
    "instructions": "Judge only how exactly the answer follows every instruction of the question: what, how much, in which form.",
    "quality": "Judge the quality of the answer: helpful, relevant, accurate, deep, detailed, well written.",
    "complexity": "Judge how hard the question is: how much knowledge, how much reasoning and how many conditions at once it asks for. A"
    " question that anybody answers at once is the least.",
}
OF_QUESTIONS = ("complexity",)  # rubrics by which the question alone is judged
LEAST_MASS = 0.01  # of the probability: a judge that gives its grades less would have written something else
GRADE = re.compile(
    r"\W*(?:(?:my |the |final |overall )*(?:rating|score|grade)(?: is)?)?\W*(?<!-)(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?\W*",
    re.IGNORECASE,
)
GRADE_LINE = re.compile(
    r"(?:rating|score|grade)\W{0,6}(?:is\W{0,4})?(?<!-)(\d+(?:\.\d+)?)(?:\W{0,4}(?:/|out of)\W{0,4}(\d+))?", re.IGNORECASE
)
VERDICT = re.compile(r"\W*(?:(?:answer|assistant|output|option)\W*)?([AB])\W*", re.IGNORECASE)
VERDICT_LINE = re.compile(r"\[\[([AB])\]\]|(?:answer|assistant|output|option)\W{1,4}([AB])\W{1,4}is (?:the )?better", re.IGNORECASE)
DENIED = re.compile(r"(?:\b(?:neither|nor|not|never)\b|n['’]t\b)[^.,;:!?\n]*\Z", re.IGNORECASE)  # before a verdict: none is meant
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Item:
    """An answer to judge, or without one the question. With a reference the judge compares with it, as it must for maths and code."""

    prompt: str
    answer: str | None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same prompt."""

    prompt: str
    first: str
    second: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """A grade from 1 to the scale's end, or why there is none."""

    value: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which of two answers is better. `preference` is the probability of the first, the mean over both orders.

    Where what the judge wrote is read, each order gives 0 or 1.
    """

    winner: int | None  # 1 or 2; 0 for a tie; None with the error
    preference: float | None = None
    orders: tuple[float, ...] = ()  # probability of the first where it stands first, and where it stands second
    error: str = ""

    @property
    def flipped(self) -> bool:
        """Say whether the orders disagree."""
        return len(self.orders) == 2 and (self.orders[0] - 0.5) * (self.orders[1] - 0.5) < 0


class Judge(Asked):
    """One model that judges by one rubric. Use as a context manager."""

    def __init__(self, model: NamedModel, store: ValueStore, *, rubric: str = "helpfulness", scale: int = 6, parse: bool = False) -> None:
        """`rubric` is a name of RUBRICS, a text file, or the text itself. With `parse` the judge writes and is read, whatever its engine.

        Raises UserError for a scale whose grades are no single digits.
        """
        if not 2 <= scale <= 9:
            raise UserError(f"scale: expected 2 to 9, one digit, found {scale}")
        super().__init__(model, store, work="judge")
        self._rubric, self._scale = read_rubric(rubric), scale
        self.parse = parse or model.chat is None

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade answers, each on its own."""
        asked = [self._grading(each) for each in items]
        if self.parse:
            return [_told_grade(text, self._scale) for text in self.written(asked)]
        numbers = np.arange(1, self._scale + 1)
        found = self._chances(asked, [str(each) for each in numbers])
        return [Grade(None, each) if isinstance(each, str) else Grade(float(each @ numbers)) for each in found]

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Judge pairs in both orders."""
        asked = []
        for each in pairs:
            asked.append(self._comparing(each.prompt, each.first, each.second, each.reference))
            asked.append(self._comparing(each.prompt, each.second, each.first, each.reference))
        found: list[float | str]
        if self.parse:
            found = [_told_verdict(text) for text in self.written(asked)]
        else:
            found = [each if isinstance(each, str) else float(each[0]) for each in self._chances(asked, ["A", "B"])]
        return [_verdict(*each) for each in zip(found[::2], found[1::2], strict=True)]

    def _grading(self, item: Item) -> list[Message]:
        what, ends = ("a question", "least) to {} (most)") if item.answer is None else ("an answer to a question", "worst) to {} (best)")
        answer = "" if item.answer is None else _part("Answer", item.answer)
        text = (
            f"Grade {what}. {self._rubric}\n\n{_part('Question', item.prompt)}{_reference(item.reference)}{answer}"
            f"Give a whole number from 1 ({ends.format(self._scale)}. Write the number and nothing else."
        )
        return [{"role": "user", "content": text}]

    def _comparing(self, prompt: str, first: str, second: str, reference: str | None) -> list[Message]:
        text = (
            f"Compare two answers to a question. {self._rubric} Which of them stands first means nothing.\n\n{_part('Question', prompt)}"
            f"{_reference(reference)}{_part('Answer A', first)}{_part('Answer B', second)}"
            "Which answer is better? Write A or B and nothing else."
        )
        return [{"role": "user", "content": text}]

    def _chances(self, asked: Sequence[list[Message]], labels: Sequence[str]) -> Iterator[NDArray[np.float64] | str]:
        """Yield for each conversation the probabilities of the labels among themselves, or why there are none."""
        for found in self.probabilities(asked, labels):
            if isinstance(found, str):
                yield found
            elif (mass := float(found.sum())) < LEAST_MASS:
                yield f"not a grade: the judge gives {labels[0]} to {labels[-1]} together a probability of {mass:.2g}"
            else:
                yield found / mass


def read_rubric(text: str) -> str:
    """Return the rubric of a name, of a text file, or the text itself. Raises UserError for an empty one or a file that is not there."""
    if text in RUBRICS:
        return RUBRICS[text]
    if len(text.split()) > 1:
        return text.strip()
    path = Path(text).expanduser()
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"rubric {text!r}: expected one of {', '.join(RUBRICS)}, a text file, or the rubric itself in words") from None
    if not found:
        raise UserError(f"{path}: the rubric is empty")
    return found


def _verdict(shown_first: float | str, shown_second: float | str) -> Verdict:
    """Make the verdict from the probability of A in both orders, or the error of one."""
    for each in (shown_first, shown_second):
        if isinstance(each, str):
            return Verdict(None, error=each)
    orders = (float(shown_first), 1 - float(shown_second))
    sides = {(each > 0.5) - (each < 0.5) for each in orders}
    winner = 1 if sides == {1} else 2 if sides == {-1} else 0
    return Verdict(winner, sum(orders) / 2, orders)


def _told_grade(told: tuple[str | None, str], scale: int) -> Grade:
    text, error = told
    return Grade(None, error) if text is None else parse_grade(text, scale)


def parse_grade(text: str, scale: int) -> Grade:
    """Read a grade that a judge wrote: the number alone, or behind the word rating, score or grade."""
    said = THOUGHT.sub("", text).strip()
    alone = GRADE.fullmatch(said)
    named = GRADE_LINE.findall(said)
    number, of = alone.groups() if alone else named[-1] if named else ("0", None)
    value = float(number)
    if not 1 <= value <= scale or (of and int(of) != scale):
        return Grade(None, f"not a number from 1 to {scale}: {shortened(said)!r}")
    return Grade(value)


def _told_verdict(told: tuple[str | None, str]) -> float | str:
    text, error = told
    return error if text is None else parse_verdict(text)


def parse_verdict(text: str) -> float | str:
    """Read a verdict that a judge wrote: 1.0 for A, 0.0 for B, or why it is none."""
    said = THOUGHT.sub("", text).strip()
    alone = VERDICT.fullmatch(said)
    named = {(each[1] or each[2]).upper() for each in VERDICT_LINE.finditer(said) if not DENIED.search(said[: each.start()])}
    letter = alone[1].upper() if alone else named.pop() if len(named) == 1 else None
    return f"not a verdict: {shortened(said)!r}" if letter is None else float(letter == "A")


def _part(title: str, text: str) -> str:
    return f"[{title}]\n{text.strip()}\n[End of {title.lower()}]\n\n"


def _reference(text: str | None) -> str:
    return "" if text is None or not text.strip() else _part("Reference answer, which is right", text)
