"""A user's own task: one file of questions, each with what its answer is held against and how."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.checks.code import extract_program, run_tests
from ...core.checks.numbers import canonical, extract_number
from ...core.checks.schema import check_schema
from ...core.errors import UserError, unknown_name
from ...core.example import Example, Message, Tool, content_id, tools_of
from ...core.formats import FORMATS, detect_format, split_prompt, with_system
from ...core.patterns import Pattern
from ...core.sources import iterate_rows
from ..config import TasksConfig
from .base import JUDGED, Item, Mark, Task, only_judged
from .humaneval import told


def _exact(target: Mapping[str, Any], answer: str) -> Mark:
    said = " ".join(answer.split())
    golds = [text for each in _several(target["answer"]) for text in _written(each)]
    return Mark(float(any(said == " ".join(each.split()) for each in golds)), bool(said), said[:200])


def _numeric(target: Mapping[str, Any], answer: str) -> Mark:
    found = extract_number(answer)
    golds = [extract_number(_written(each)[0]) for each in _several(target["answer"])]
    return Mark(0.0, False) if found is None else Mark(float(found in golds), True, canonical(found))


def _regex(target: Mapping[str, Any], answer: str) -> Mark:
    found = Pattern("pattern ", target["pattern"], re.MULTILINE).search(answer)
    return Mark(float(found is not None), True, found[0][:200] if found else "", False)


def _contains(target: Mapping[str, Any], answer: str) -> Mark:
    lower = answer.casefold()
    return Mark(float(all(_stands_in(lower, each) for each in _several(target["answer"]))))


def _stands_in(text: str, value: Any) -> bool:
    """Say whether a text has another one in it, or a number, which is no part of a longer number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).casefold() in text
    more = "0*" if "." in _written(value)[0] else r"(?:\.0+)?"  # 2.50 and 3.00 are 2.5 and 3
    return re.search(rf"{BEFORE}{re.escape(_written(value)[0])}{more}{BEHIND}", text) is not None


def _schema(target: Mapping[str, Any], answer: str) -> Mark:
    reason = check_schema(answer, target["schema"])
    return Mark(float(reason is None), not (reason or "").startswith("not JSON"), reason or "", False)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _written(value: Any) -> list[str]:
    """Return how a right answer is written. Tables hold whole numbers beside a null as 3.0, which an answer writes as 3, too."""
    return [str(int(value)), str(value)] if isinstance(value, float) and value.is_integer() else [str(value)]


# what a number is no part of: other digits, a fraction, thousands (but 1,2,3 are three numbers), and what has a minus
BEFORE = r"(?<![0-9.])(?<!(?<![\w)])[-−])(?!(?<=[0-9],)[0-9]{3}(?![0-9]))"
BEHIND = r"(?![0-9]|\.[0-9]|,[0-9]{3}(?![0-9]))"
OWN = ("id", "group", "scoring", "answer", "pattern", "schema", "tests", "entry_point")  # columns that are no part of the question
BLANK = ("id", "group", "scoring", "entry_point")  # of these an empty text, as the cells of a CSV file are, is none
SCORING: dict[str, tuple[Callable[[Mapping[str, Any], str], Mark] | None, str]] = {  # the scorer, and the column that it needs
    "exact": (_exact, "answer"),
    "numeric": (_numeric, "answer"),
    "regex": (_regex, "pattern"),
    "contains": (_contains, "answer"),
    "json-schema": (_schema, "schema"),
    "unit-test": (None, "tests"),  # runs programs: see `load`
    JUDGED: (None, ""),  # graded by a model, beside `answer` where there is one
}


def load(source: str, config: TasksConfig) -> Task:
    """Return the task of a file: FILE, or FILE:SCORING for rows that name none in a column `scoring`.

    A row has a question in any format, and the column that its scoring needs; `id` and `group` where the user has them.
    Raises UserError, naming file and row, for a scoring that is unknown, a column that is missing, and an id that is given twice.
    """
    path, default = source, ""
    if not Path(source).expanduser().exists() and ":" in source:
        path, _, default = source.rpartition(":")
        if default not in SCORING:
            raise unknown_name("scoring", default, SCORING, source)
    places: dict[str, str] = {}
    items = []
    for place, row in iterate_rows(path):
        target = {name: row[name] for name in OWN if row.get(name) is not None and not (name in BLANK and row[name] == "")}
        messages, gold, tools = _question({name: value for name, value in row.items() if name not in OWN and value is not None}, place)
        if gold is not None:
            target.setdefault("answer", gold)
        scoring = str(target.setdefault("scoring", default))
        if not scoring:
            raise UserError(f"{place}: says no scoring; add a column scoring, or give {path}:SCORING: {', '.join(SCORING)}")
        if scoring not in SCORING:
            raise unknown_name("scoring", scoring, SCORING, place)
        if scoring == "json-schema" and isinstance(target.get("schema"), str):  # of a CSV file, which holds nothing but texts
            target["schema"] = _parsed(target["schema"], place)
        _check(target, scoring, place, list(row))
        name = str(target["id"]) if "id" in target else _unused(content_id(messages), places)
        if name in places:
            raise UserError(f"{place}: the id {name!r} is that of {places[name]} too; give each question its own")
        places[name] = place
        group = str(target.get("group", content_id(messages)))  # the same question again is answered alike
        items.append(Item(name, messages, _shown(messages), target, group, tools=tools))

    def score(item: Item, answer: str) -> dict[str, Mark]:
        scorer = SCORING[item.target["scoring"]][0]
        if scorer is not None:
            return {"score": scorer(item.target, answer)}
        if item.target["scoring"] == JUDGED:
            return only_judged(item, answer)
        program = extract_program(answer, entry_point=item.target.get("entry_point"))
        verdict = run_tests(program, item.target["tests"], entry_point=item.target.get("entry_point"), unsafe=config.unsafe)
        found = verdict.ended not in ("no_code", "syntax")
        return {"score": Mark(float(verdict.passed), found, told(verdict.ended, verdict.message, verdict.attempts), False)}

    kinds = {item.target["scoring"] for item in items}
    return Task(name=Path(path).name, items=items, metrics=("score",), score=score, code="unit-test" in kinds, judged=JUDGED in kinds)


def _question(rest: dict[str, Any], place: str) -> tuple[list[Message], str | None, tuple[Tool, ...]]:
    """Return a row's conversation up to its last question, the answer that stands behind it, if one does, and its functions."""
    if not rest:
        raise UserError(
            f"{place}: has no question, only what the answer is held against; expected a column prompt or question, or messages"
        )
    format = detect_format(frozenset(rest), place)
    messages = with_system(rest, FORMATS[format](rest, place))
    if not any(each["role"] == "user" for each in messages):
        raise UserError(f"{place}: has no question; expected a column prompt or question, or messages of a user")
    asked, gold = split_prompt(Example("", messages))
    if asked[-1]["role"] == "user" and not str(asked[-1].get("content") or "").strip():
        raise UserError(f"{place}: its question is empty; expected a text")
    return asked, gold, tools_of(rest)


def _shown(messages: Sequence[Message]) -> str:
    """Write a conversation as a text that goes on with the answer to its last question."""
    told = {"user": "Question: ", "assistant": "Answer: "}
    return "\n\n".join(f"{told.get(each['role'], '')}{each['content']}" for each in messages) + "\nAnswer:"


def _parsed(schema: str, place: str) -> Any:
    try:
        return json.loads(schema)
    except ValueError:
        raise UserError(f"{place}: schema is {schema[:60]!r}; expected a JSON schema, as an object or as its text") from None


def _unused(name: str, used: Mapping[str, str]) -> str:
    number = 2
    wanted = name
    while name in used:  # the same question twice, each with its own answer
        name, number = f"{wanted}~{number}", number + 1
    return name


def _check(target: Mapping[str, Any], scoring: str, place: str, columns: list[str]) -> None:
    column = SCORING[scoring][1]
    if column and target.get(column) is None:
        raise UserError(f"{place}: scoring {scoring!r} needs a column {column}; found {', '.join(columns)}")
    if column == "answer":
        golds = _several(target["answer"])
        if not golds or not all(isinstance(each, (str, int, float)) and str(each).strip() for each in golds):
            raise UserError(f"{place}: answer is {str(target['answer'])[:60]!r}; expected a text, a number or a list of them, none empty")
    elif column not in ("", "schema") and not (isinstance(target[column], str) and target[column].strip()):
        raise UserError(f"{place}: {column} is {str(target[column])[:60]!r}; expected a text")
    if scoring == "exact" and any(isinstance(each, bool) for each in _several(target["answer"])):
        raise UserError(f"{place}: answer is true or false, which can be written in many ways; expected the text that is right")
    if not isinstance(target.get("entry_point", ""), str):
        raise UserError(f"{place}: entry_point is {str(target['entry_point'])[:60]!r}; expected the name of a function")
    if scoring == "numeric" and any(extract_number(_written(each)[0]) is None for each in _several(target["answer"])):
        raise UserError(f"{place}: scoring 'numeric' needs a number as answer; found {str(target['answer'])[:60]!r}")
    if scoring == "regex":
        Pattern(f"{place}: pattern ", target["pattern"])  # raises for what is none
    if scoring == "json-schema":
        try:
            check_schema("null", target["schema"])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
