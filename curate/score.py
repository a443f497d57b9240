"""Attach numbers to rows: verifiers, lengths, patterns, the teacher's log-probability. Scores are columns of their own."""

import hashlib
import inspect
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..core.checks.numbers import RULES, Rule, canonical, extract_number
from ..core.errors import UserError, unknown_name
from ..core.example import Score, row_id
from ..core.files import write_atomically
from ..core.progress import Progress
from ..core.run import Run
from .config import ScoreConfig
from .rows import KEY, keys, load_rows

log = logging.getLogger(__name__)

SCHEMA = {"example_id": pl.String, "sample_index": pl.Int32, "name": pl.String, "value": pl.Float64, "detail": pl.String}
CHINESE_WORD = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # scripts without spaces: each character counts as a word
WORD = re.compile(rf"{CHINESE_WORD}|(?:(?!{CHINESE_WORD})[\w'’-])+")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a scorer sees of a row."""

    prompt: str
    response: str | None
    reference: str | None
    meta: dict[str, Any]
    num_tokens: int | None
    logprob: float | None


Result = tuple[float | None, str]  # value and detail; value None with the reason as detail where there is nothing to say
Scorer = Callable[[Candidate], Result]


def numeric(*, rule: Rule = "flexible", gold: str | None = None) -> Scorer:
    """Compare the final number of the response with that of the reference (or of the column `gold`): 1 or 0.

    The detail is the number found in the response, "" where there is none. See core.checks.numbers for the rules.
    """
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES, "scorer numeric")

    def score(row: Candidate) -> Result:
        answer = None if row.response is None else extract_number(row.response, rule)
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
    """Say whether a regular expression is found in the response: 1 or 0. The detail is its first group, or the whole match."""
    try:
        compiled = re.compile(pattern, re.MULTILINE | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise UserError(f"scorer regex: {pattern!r} is not a regular expression: {error}") from None

    def score(row: Candidate) -> Result:
        if row.response is None:
            return None, "no response"
        match = compiled.search(row.response)
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


def logprob() -> Scorer:
    """Give the teacher's mean log-probability per token, in nats."""
    return lambda row: (row.logprob, "" if row.logprob is not None else "the engine gave none")


SCORERS: dict[str, Callable[..., Scorer]] = {
    "numeric": numeric,
    "exact": exact,
    "regex": regex,
    "num_chars": num_chars,
    "num_words": num_words,
    "num_tokens": num_tokens,
    "logprob": logprob,
}
COLUMNS = ("num_chars", "num_words", "num_tokens", "logprob")  # read off a row at once: they need not be stored
LENGTH = ("num_chars", "num_words", "num_tokens")  # what `--with length` stands for


def open_scorer(name: str, options: Mapping[str, Any] | None) -> Scorer:
    """Make the scorer of a score. Raises UserError for an unknown scorer or option, or a name that is not a file's."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"a score is named by letters, digits, '_', '.', '-'; found {name!r}")
    arguments = dict(options or {})
    kind = str(arguments.pop("scorer", name))
    if kind not in SCORERS:
        raise unknown_name("scorer", kind, [*SCORERS, "length"])
    known = inspect.signature(SCORERS[kind]).parameters
    for option in arguments:
        if option not in known:
            raise unknown_name("option", option, known, f"scorer {kind}") if known else UserError(f"scorer {kind} has no options")
    missing = [each.name for each in known.values() if each.default is inspect.Parameter.empty and each.name not in arguments]
    if missing:
        raise UserError(f"scorer {kind} needs {missing[0]}: --with '{kind}:{missing[0]}=…'")
    return SCORERS[kind](**arguments)


def parse_scorers(texts: list[str]) -> dict[str, Any]:
    """Read `NAME`, `NAME:option=value,option=value`, with `name=` to call the score otherwise, into settings of ScoreConfig."""
    scorers: dict[str, Any] = {}
    for text in texts:
        kind, _, rest = text.partition(":")
        options: dict[str, Any] = {}
        for pair in re.split(r",(?=\w+=)", rest) if rest else []:
            option, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"--with {text!r}: expected NAME:option=value,option=value; found {pair!r}")
            options[option] = {"true": True, "false": False}.get(value.lower(), value)
        for each in LENGTH if kind == "length" else (kind,):
            name = str(options.pop("name", each))
            if name in scorers:
                raise UserError(f"two scores would be called {name!r}: add name=… to one of them")
            scorers[name] = options if name == each else {"scorer": each, **options}
    return scorers


def score(run: Run, config: ScoreConfig) -> dict[str, pl.DataFrame]:
    """Score every row of a run, kept or not; write curate/scores/NAME.parquet; return the scores by name, columns as in SCHEMA.

    A row that a scorer fails on has no value and the error as detail.
    """
    if not config.scorers:
        raise UserError(f"give a scorer, as --with numeric; there are {', '.join([*SCORERS, 'length'])}")
    rows = load_rows(run, all=True)
    run.configure("score", {"scorers": {**run.config().get("score", {}).get("scorers", {}), **config.scorers}}, free=("*",))
    results = {}
    with Progress("score", total=len(rows) * len(config.scorers), unit="rows") as progress:
        for name, options in config.scorers.items():
            results[name] = _score_rows(rows, name, open_scorer(name, options), progress)
            with write_atomically(score_path(run, name)) as temporary:
                results[name].write_parquet(temporary)
    return results


def _score_rows(rows: pl.DataFrame, name: str, scorer: Scorer, progress: Progress | None) -> pl.DataFrame:
    scores, errors, counted, last = [], 0, 0, time.monotonic()
    columns = ["example_id", "sample_index", "prompt", "response", "reference", "meta", "num_tokens", "logprob"]
    for example_id, index, prompt, response, reference, meta, tokens, mean in rows.select(columns).iter_rows():
        value, detail = None, ""
        try:
            candidate = Candidate(prompt, response, reference, json.loads(meta or "{}"), tokens, mean)
            value, detail = scorer(candidate)
            if value is not None and not math.isfinite(value):
                value, detail = None, f"not a finite number: {value}"
        except Exception as error:  # noqa: BLE001  one row's failure is that row's result
            value, detail = None, f"{type(error).__name__}: {error}"
            errors += 1
        scores.append(Score(example_id, index, name, value, detail))
        counted += 1
        if progress and time.monotonic() - last > 0.2:
            progress.advance(counted)
            counted, last = 0, time.monotonic()
    if progress:
        progress.advance(counted)
    if errors:
        log.warning("%s failed on %s of %s rows; they have no value, and the reason as detail", name, f"{errors:,}", f"{len(rows):,}")
    fields = [[getattr(each, field) for each in scores] for field in SCHEMA]
    return pl.DataFrame(fields, schema=SCHEMA)


def summary(name: str, scores: pl.DataFrame) -> str:
    """Write a score for people: how many rows have a value, the mean; for several samples a prompt also each sample's, and any's."""
    values = scores.drop_nulls("value")
    if values.is_empty():
        reason = scores["detail"].drop_nulls().filter(scores["detail"] != "").head(1).to_list()
        return f"{name}: none of {len(scores):,} rows has a value{f' ({reason[0]})' if reason else ''}"
    verdicts = values["value"].is_in([0.0, 1.0]).all()

    def told(value: Any) -> str:
        return f"{value:.1%}" if verdicts else f"{value:.4g}"

    lines = [f"{name}: {len(values):,} of {len(scores):,} rows have a value, mean {told(values['value'].mean())}"]
    samples = values.group_by("sample_index").agg(pl.col("value").mean()).sort("sample_index").drop_nulls("sample_index")
    if 1 < len(samples) <= 64:
        lines.append("  by sample: " + ", ".join(f"{index}: {told(mean)}" for index, mean in samples.iter_rows()))
        if verdicts:
            lines.append(f"  any of a prompt's samples: {told(values.group_by('example_id').agg(pl.col('value').max())['value'].mean())}")
    return "\n".join(lines)


def score_path(run: Run, name: str) -> Path:
    """Return where the scores of this name stand."""
    return run.path / "curate" / "scores" / f"{name}.parquet"


def known_scores(run: Run) -> list[str]:
    """Return the names of the scores that stand in a run."""
    return sorted(path.stem for path in (run.path / "curate" / "scores").glob("*.parquet"))


def read_score(run: Run, rows: pl.DataFrame, name: str) -> pl.DataFrame:
    """Return `value` and `detail` of a score for these rows, in their order; null where a row was not scored.

    Raises UserError for a score that the run does not have, naming those it has.
    """
    check_score_name(run, name)
    if not score_path(run, name).exists():
        return _score_rows(rows, name, SCORERS[name](), None).select("value", "detail")
    stored = pl.read_parquet(score_path(run, name)).select(*KEY, "value", "detail")
    found = rows.select(KEY).join(stored, on=KEY, how="left", nulls_equal=True, maintain_order="left")
    fresh = len(rows.select(KEY).join(stored, on=KEY, how="anti", nulls_equal=True))
    if fresh:
        log.warning("%s of %s rows are newer than the score %s and count as unscored: score the run again", fresh, len(rows), name)
    return found.select("value", "detail")


def check_score_name(run: Run, name: str) -> None:
    """Raise UserError unless the run has a score of this name, or it can be read off the rows."""
    have = [*known_scores(run), *COLUMNS]
    if name not in [*have, "random"]:
        near = f"; `sftkit curate score {run.path} --with {name}` adds it" if name in SCORERS else ""
        raise UserError(f"{run.path}: no score {name!r}: there are {', '.join(sorted({*have, 'random'}))}{near}")


def sort_columns(run: Run, rows: pl.DataFrame, by: Sequence[str], seed: int = 0) -> list[list[float | None]]:
    """Return one column per name in `by`, turned so that higher is better: `-NAME` is negated, `random` is drawn by row and seed."""
    columns: list[list[float | None]] = []
    for name in by:
        if name == "random":
            columns.append([random_number(seed, *key) for key in keys(rows)])
            continue
        values = read_score(run, rows, name.removeprefix("-"))["value"].to_list()
        columns.append([None if value is None else -value for value in values] if name.startswith("-") else values)
    return columns


def best_first(columns: Sequence[Sequence[float | None]], row: int) -> tuple[tuple[bool, float], ...]:
    """Return what to sort a row by so that the highest come first, lexicographically, and rows without a value last."""
    return tuple((column[row] is None, -(column[row] or 0.0)) for column in columns)


def random_number(seed: int, example_id: str, sample_index: int | None) -> float:
    """Return a number in [0, 1) that depends on the seed and the row alone, not on its place or on the other rows."""
    digest = hashlib.sha256(f"{seed}/{row_id(example_id, sample_index)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def count_words(text: str) -> int:
    """Count words: runs of letters and digits; a character of Chinese or Japanese is a word."""
    return sum(1 for _ in WORD.finditer(text))


def _gold(row: Candidate, column: str | None) -> str | None:
    if column is None:
        return row.reference
    value = row.meta.get(column)
    return None if value is None else str(value)
