"""What a task is: questions with what decides their answers, how they are asked, and a scorer. One file makes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.example import Message, Tool

PENDING = "\x00"
JUDGED = "judge"  # the scoring of a question whose answers a model grades: see `graded`


@dataclass(frozen=True, slots=True)
class Item:
    """One question, asked in two ways: as a conversation, and as the text that a model without a template goes on from."""

    id: str
    messages: list[Message]
    completion: str
    target: Mapping[str, Any] = field(default_factory=dict)  # what the scorer needs
    group: str | None = None  # questions of one subject or conversation are not independent
    choices: tuple[str, ...] = ()  # texts to go on with, of which the most probable is the answer
    tools: tuple[Tool, ...] = ()  # the functions that can be called
    after: str = ""  # the item whose answer, each model's own, stands where PENDING does: a second turn. It stands before this one

    @property
    def question(self) -> str:
        """Return what the last message says."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True, slots=True)
class Mark:
    """What an answer is worth, from 0 to 1. `found` is False where no answer could be read out of it; then it is worth 0."""

    value: float
    found: bool = True
    answer: str = ""  # what was read out of it: equal ones are one answer to a majority
    votes: bool = True  # False where `answer` says something else, as how a program ended: there is no majority then


Score = Callable[[Item, str], dict[str, Mark]]  # by metric, the headline first


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. `metrics` are the names that `score` gives, the headline first."""

    name: str
    items: list[Item]
    metrics: tuple[str, ...]
    score: Score
    max_new_tokens: int = 512
    stops: tuple[str, ...] = ("\nQuestion:",)  # where a completion has gone on to another question
    likelihood: bool = False  # the choices are compared by their probability, nothing is generated
    code: bool = False  # answers are run
    judged: bool = False  # some answers at least are graded by a model
    grades: Mapping[tuple[str, str], dict[str, Mark]] = field(default_factory=dict)  # of these, by item and the answer's key


def filled(item: Item, answer: str) -> Item:
    """Return a second turn with the answer to the first where it belongs."""
    messages = [{**each, "content": str(each["content"]).replace(PENDING, answer)} for each in item.messages]
    return replace(item, messages=messages, completion=item.completion.replace(PENDING, answer))


def asked(question: str) -> list[Message]:
    """Return a question as a conversation."""
    return [{"role": "user", "content": question}]


def only_judged(item: Item, answer: str) -> dict[str, Mark]:
    """Stand where a task has no rule."""
    raise AssertionError(f"{item.id}: is marked by a judge, whose grades were not asked for")
