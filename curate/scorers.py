"""What a scorer is, and those that look at one row alone: verifiers, lengths, patterns."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.checks.numbers import Rule, canonical, extract_number
from ..core.ngrams import WORD
from ..core.patterns import Pattern, SlowPattern
from ..core.run import Run


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a scorer sees of a row."""

    prompt: str
    response: str | None
    reference: str | None
    meta: dict[str, Any]
    num_tokens: int | None
    logprob: float | None
    messages: str = "[]"  # JSON text of the conversation, with the answer
    finish_reason: str | None = None
    id: str = ""  # as a row is written for people


Result = tuple[float | None, str]  # value and detail; value None with the reason as detail where there is nothing to say
Scorer = Callable[[Candidate], Result]


@dataclass(frozen=True, slots=True)
class ColumnScorer:
    """A scorer that takes the whole column, because its rows are cheaper together or are compared with one another.

    `score` gets all rows and the run, in whose folder it keeps what was expensive, and yields each row's place and result as they
    come, in any order. A row it fails on has no value and the reason as detail.
    """

    score: Callable[[Sequence[Candidate], Run], Iterator[tuple[int, Result]]]


def failure(error: Exception) -> Result:
    """Return the result of a row that raised an error."""
    return None, f"{type(error).__name__}: {error}"


def numeric(*, rule: Rule = "flexible", gold: str | None = None) -> Scorer:
    """Compare the final number of the response with that of the reference (or of the column `gold`): 1 or 0.

    The detail is the number found in the response, "" where there is none. See core.checks.numbers for the rules.
    """

    def score(row: Candidate) -> Result:
        if row.response is None:
            return None, "no response"
        answer = extract_number(row.response, rule)
        detail = "" if answer is None else canonical(answer)
        reference = _gold(row, gold)
        expected = None if reference is None else extract_number(reference)
        if expected is None:
            return None, detail
        return float(answer == expected), detail

    return score


def exact(*, gold: str | None = None, ignore_case: bool = True) -> Scorer:
    """Compare the response with the reference (or the column `gold`), white space at the ends and runs of it aside: 1 or 0."""

    def plain(text: str) -> str:
        collapsed = " ".join(text.split())
        return collapsed.casefold() if ignore_case else collapsed

    def score(row: Candidate) -> Result:
        reference = _gold(row, gold)
        if reference is None or row.response is None:
            return None, "no reference" if reference is None else "no response"
        return float(plain(row.response) == plain(reference)), ""

    return score


def regex(*, pattern: str, ignore_case: bool = False) -> Scorer:
    """Say whether a regular expression is found in the response: 1 or 0. The detail is its first group, or the whole match.

    A row on which the search takes too long has no value.
    """
    compiled = Pattern("scorer regex: ", pattern, re.MULTILINE | (re.IGNORECASE if ignore_case else 0))

    def score(row: Candidate) -> Result:
        if row.response is None:
            return None, "no response"
        try:
            match = compiled.search(row.response)
        except SlowPattern as error:
            return None, str(error)
        if match is None:
            return 0.0, ""
        return 1.0, (match[1] or "" if compiled.groups else match[0])[:200]

    return score


def num_chars() -> Scorer:
    """Count the characters of the response."""
    return lambda row: (None, "no response") if row.response is None else (float(len(row.response)), "")


def num_words() -> Scorer:
    """Count the words of the response; a character of Chinese or Japanese is a word."""
    return lambda row: (None, "no response") if row.response is None else (float(count_words(row.response)), "")


def num_tokens(*, model: str | None = None) -> Scorer:
    """Give the number of tokens of the response: as the teacher counted, or by the tokenizer of `model`."""
    tokenizer = None
    if model is not None:
        from ..core.models import load_tokenizer, resolve_model

        tokenizer = load_tokenizer(resolve_model(model))

    def score(row: Candidate) -> Result:
        if tokenizer is not None and row.response is not None:
            return float(len(tokenizer(row.response, add_special_tokens=False)["input_ids"])), ""
        return (None, "unknown; give model=") if row.num_tokens is None else (float(row.num_tokens), "")

    return score


def count_words(text: str) -> int:
    """Count words: runs of letters and digits; a character of Chinese or Japanese is a word."""
    return sum(1 for _ in WORD.finditer(text))


def _gold(row: Candidate, column: str | None) -> str | None:
    if column is None:
        return row.reference
    value = row.meta.get(column)
    return None if value is None else str(value)
