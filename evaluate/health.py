"""What a model's answers are like whatever they are worth: whether they end, repeat themselves, are empty, or change the language."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.checks.instructions import detect_language
from .compare import Answer

RUN = 4  # words
REPEATED = 0.5  # share of an answer's runs of words that stood in it before, from which it repeats itself
MIN_WORDS = 24
LETTERS = 400  # of a text tell its language
LANGUAGES = 200  # answers looked at: telling a language takes milliseconds


@dataclass(frozen=True, kw_only=True)
class Health:
    """Shares of a model's answers to a task; None where there is nothing to say."""

    n: int
    stop_rate: float  # ended by the model, or cut where a completion went on to something else
    truncated: float
    repetitive: float
    empty: float
    mean_tokens: float  # of the model's own tokenizer
    other_language: float | None  # than the question's; of the first 200 whose languages can be told


def health(questions: Sequence[str], answers: Sequence[Answer]) -> Health:
    """Look at the answers to questions, one each. At least one is needed."""
    n = len(answers)
    languages = [(language(question), language(answer.text)) for question, answer in zip(questions[:LANGUAGES], answers, strict=False)]
    told = [asked != answered for asked, answered in languages if asked and answered]
    return Health(
        n=n,
        stop_rate=sum(each.stopped for each in answers) / n,
        truncated=sum(each.finish_reason == "length" for each in answers) / n,
        repetitive=sum(repeats(each.text) for each in answers) / n,
        empty=sum(not each.text.strip() for each in answers) / n,
        mean_tokens=sum(each.num_tokens for each in answers) / n,
        other_language=sum(told) / len(told) if told else None,
    )


def repeats(text: str) -> bool:
    """Say whether half of a text's runs of four words stood in it before. Text without spaces is taken by characters."""
    words: Sequence[str] = text.split()
    if len(words) * 20 < len(text):
        words = text
    if len(words) < MIN_WORDS:
        return False
    runs = {tuple(words[place : place + RUN]) for place in range(len(words) - RUN + 1)}
    return len(runs) <= (1 - REPEATED) * (len(words) - RUN + 1)


def language(text: str) -> str | None:
    """Return the language of a text of some length, without its code and markup; None where it cannot be told."""
    letters = sum(each.isalpha() for each in text[:LETTERS])
    if letters < 40 and not (letters >= 10 and not text.isascii()):
        return None
    found = detect_language(text[:LETTERS])
    return None if found is None else found.partition("-")[0]
