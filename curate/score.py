"""Attach numbers to rows: verifiers, lengths, patterns, the teacher's log-probability. Scores are columns of their own."""

import inspect
import json
import logging
import math
import re
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ..core.config import convert
from ..core.errors import UserError, unknown_name
from ..core.example import row_id
from ..core.files import read_parquet, write_atomically
from ..core.progress import Progress
from ..core.run import Run
from ..core.text import shortened
from .config import ScoreConfig
from .judge_scores import judge, pairwise, tags
from .model_scores import grape, ifd, ifd_ppl, logprob, perplexity, reward
from .rows import KEY, load_rows
from .scorers import Candidate, ColumnScorer, Result, Scorer, exact, failure, num_chars, num_tokens, num_words, numeric, regex
from .text_scores import cluster, language, neighbour, refusal, repetition, top_ngram, truncated
from .verifiers import ifeval, json_schema, unit_test
from .verifiers import math as math_equal

log = logging.getLogger(__name__)

SCHEMA: dict[str, Any] = {
    "example_id": pl.String,
    "sample_index": pl.Int32,
    "name": pl.String,
    "value": pl.Float64,
    "detail": pl.String,
    "finish_reason": pl.String,  # of the row as it was scored: a sample that was cut is another one once it is asked again
    "num_tokens": pl.Int64,
}
AS_SCORED = ("finish_reason", "num_tokens")

SCORERS: dict[str, Callable[..., Scorer | ColumnScorer]] = {
    "numeric": numeric,
    "exact": exact,
    "regex": regex,
    "num_chars": num_chars,
    "num_words": num_words,
    "num_tokens": num_tokens,
    "logprob": logprob,
    "grape": grape,
    "ifd": ifd,
    "ifd_ppl": ifd_ppl,
    "perplexity": perplexity,
    "reward": reward,
    "judge": judge,
    "pairwise": pairwise,
    "tags": tags,
    "math": math_equal,
    "json_schema": json_schema,
    "ifeval": ifeval,
    "unit_test": unit_test,
    "language": language,
    "repetition": repetition,
    "top_ngram": top_ngram,
    "refusal": refusal,
    "truncated": truncated,
    "neighbour": neighbour,
    "cluster": cluster,
}
COLUMNS = ("num_chars", "num_words", "num_tokens", "logprob")  # read off a row at once: they need not be stored
TAKEN = ("random", *KEY, "source", "prompt", "response", "reference", "finish_reason", "meta")  # what else `--by` and `--where` may name
COLUMN_OPTIONS = {"gold", "column", "tests", "begins", "names"}  # that name a column of the rows
NEED_REFERENCE = ("numeric", "exact", "math")
FEW = 8  # different details that a summary names
GROUPS = {  # what `--with NAME` stands for, where it is several scores; computed once, the second costs nothing
    "length": ("num_chars", "num_words", "num_tokens"),
    "ifd": ("ifd", "ifd_ppl"),
    "repetition": ("repetition", "top_ngram"),
}


def open_scorer(name: str, options: Mapping[str, Any] | None) -> Scorer | ColumnScorer:
    """Make the scorer of a score. Raises UserError for an unknown scorer or option, or a name that scores may not have."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):  # else no condition of `filter --where` could name it
        raise UserError(f"a score is named by letters, digits and '_', and begins with a letter, as grape_135m; found {name!r}")
    arguments = dict(options or {})
    kind = str(arguments.pop("scorer", name))
    if kind not in SCORERS:
        if kind in GROUPS:
            raise UserError(f"{kind} is several scores: name each, {', '.join(GROUPS[kind])}; `--with {kind}` takes them all")
        raise unknown_name("scorer", kind, {*SCORERS, *GROUPS})
    if name in TAKEN or (name in COLUMNS and kind != name):
        raise UserError(f"a score of {kind} cannot be called {name!r}, which means something else of a row; give another name=…")
    known, hints = inspect.signature(SCORERS[kind]).parameters, typing.get_type_hints(SCORERS[kind])
    for option, value in arguments.items():
        if option not in known:
            raise unknown_name("option", option, known, f"scorer {kind}") if known else UserError(f"scorer {kind} has no options")
        arguments[option] = _typed(hints[option], value, f"scorer {kind}: {option}")
    missing = [each.name for each in known.values() if each.default is inspect.Parameter.empty and each.name not in arguments]
    if missing:
        raise UserError(f"scorer {kind} needs {missing[0]}: --with '{kind}:{missing[0]}=…'")
    return SCORERS[kind](**arguments)


def _typed(hint: Any, value: Any, place: str) -> Any:
    """Return an option as its hint has it; a text for what is no text is read as YAML: 3, 0.5, true, no. Raises UserError."""
    if isinstance(value, str) and str not in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not typing.Literal:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            pass  # it is none of these then, which is told as for any other text
    return convert(hint, value, place)


def reads_told_logprobs(scorers: Mapping[str, Any], names: Iterable[str] = ()) -> bool:
    """Say whether one of these scores is the log-probability that the teacher told, or one of the names is and no score's."""
    told = any((options or {}).get("scorer", name) == "logprob" and not (options or {}).get("model") for name, options in scorers.items())
    return told or ("logprob" not in scorers and "logprob" in {name.removeprefix("-") for name in names})


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
            if option in options or option == "scorer":
                what = "is given twice" if option in options else "stands before the colon, and what the score is called is name=…"
                raise UserError(f"--with {text!r}: {option} {what}")
            options[option] = value
        called = options.pop("name", None)
        for each in GROUPS.get(kind, (kind,)):
            name = each if called is None else called + each.removeprefix(kind) if each.startswith(kind) else f"{called}_{each}"
            if name in scorers:
                raise UserError(f"two scores would be called {name!r}: add name=… to one of them")
            scorers[name] = options if name == each else {"scorer": each, **options}
    return scorers


def score(run: Run, config: ScoreConfig) -> dict[str, pl.DataFrame]:
    """Score every row of a run, kept or not; write curate/scores/NAME.parquet; return the scores by name, columns as in SCHEMA.

    A row that a scorer fails on has no value and the error as detail.
    """
    if not config.scorers:
        raise UserError(f"give a scorer, as --with numeric; there are {', '.join(dict.fromkeys([*SCORERS, *GROUPS]))}")
    rows = load_rows(run, all=True)
    scorers = {name: open_scorer(name, options) for name, options in config.scorers.items()}
    for name, options in config.scorers.items():
        _check_columns(rows, name, options or {})
    run.configure("score", {"scorers": {**run.config().get("score", {}).get("scorers", {}), **config.scorers}}, free=("*",))
    results = {}
    for name, scorer in scorers.items():
        if isinstance(scorer, ColumnScorer):  # it tells its progress itself
            results[name] = _score_rows(rows, name, scorer, run, None)
        else:
            with Progress(f"score {name}", total=len(rows), unit="rows") as progress:
                results[name] = _score_rows(rows, name, scorer, run, progress)
        with write_atomically(score_path(run, name)) as temporary:
            results[name].write_parquet(temporary)
    return results


def _check_columns(rows: pl.DataFrame, name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for a column that an option names and no row has; warn of a score that no row has a reference for."""
    for option in COLUMN_OPTIONS & set(options):
        known: dict[str, None] = {}
        for candidate in _candidates(rows):
            known |= {} if isinstance(candidate, Exception) else dict.fromkeys(candidate.meta)
            if options[option] in known:
                break
        else:
            if options[option] is not None and len(rows):
                raise unknown_name("column", options[option], known or ["(no others)"], f"score {name}: {option}")
    if options.get("scorer", name) in NEED_REFERENCE and options.get("gold") is None and rows["reference"].null_count() == len(rows):
        log.warning("%s: no row has a reference; gold=COLUMN names the column that holds the right answers", name)


def _score_rows(rows: pl.DataFrame, name: str, scorer: Scorer | ColumnScorer, run: Run, progress: Progress | None) -> pl.DataFrame:
    found, errors = _score_column(rows, scorer, run) if isinstance(scorer, ColumnScorer) else _score_each(rows, scorer, progress)
    sound = [
        (None, f"not a finite number: {value}") if value is not None and not math.isfinite(value) else (value, detail)
        for value, detail in found
    ]
    if errors:
        log.warning("%s failed on %s of %s rows; they have no value, and the reason as detail", name, f"{errors:,}", f"{len(rows):,}")
    scored = pl.DataFrame(sound, schema={"value": pl.Float64, "detail": pl.String}, orient="row")
    return (
        rows.select(*KEY, *AS_SCORED)
        .with_columns(scored, name=pl.lit(name))
        .select(pl.col(column).cast(kind) for column, kind in SCHEMA.items())
    )


def _candidates(rows: pl.DataFrame) -> Iterator[Candidate | Exception]:
    columns = ["prompt", "response", "reference", "meta", "num_tokens", "logprob", "messages", "finish_reason"]
    for name, index, prompt, response, reference, meta, tokens, mean, messages, finish_reason in rows.select(*KEY, *columns).iter_rows():
        try:
            known = json.loads(meta or "{}")
        except ValueError as error:
            yield error
            continue
        yield Candidate(prompt, response, reference, known, tokens, mean, messages, finish_reason, row_id(name, index))


def _score_each(rows: pl.DataFrame, scorer: Scorer, progress: Progress | None) -> tuple[list[Result], int]:
    """Return the result of each row, and how many failed."""
    found: list[Result] = []
    errors, counted, last = 0, 0, time.monotonic()
    for candidate in _candidates(rows):
        try:
            if isinstance(candidate, Exception):
                raise candidate
            found.append(scorer(candidate))
        except Exception as error:  # noqa: BLE001  one row's failure is that row's result
            found.append(failure(error))
            errors += 1
        counted += 1
        if progress and time.monotonic() - last > 0.2:
            progress.advance(counted)
            counted, last = 0, time.monotonic()
    if progress:
        progress.advance(counted)
    return found, errors


def _score_column(rows: pl.DataFrame, scorer: ColumnScorer, run: Run) -> tuple[list[Result], int]:
    """Return the result of each row, and how many have no value."""
    found: list[Result] = [(None, "the scorer gave nothing")] * len(rows)
    places, sound = [], []
    for number, candidate in enumerate(_candidates(rows)):
        if isinstance(candidate, Exception):
            found[number] = failure(candidate)
        else:
            places.append(number)
            sound.append(candidate)
    for number, result in scorer.score(sound, run):
        found[places[number]] = result
    return found, sum(value is None for value, _ in found)


def summary(name: str, scores: pl.DataFrame) -> str:
    """Write a score for people: how many rows have a value, and the mean.

    For several samples a prompt also each sample's, and any's; where few different things were found (languages, reasons), these.
    """
    values = scores.drop_nulls("value")
    if values.is_empty():
        reason = scores["detail"].drop_nulls().filter(scores["detail"] != "").head(1).to_list()
        return f"{name}: none of {len(scores):,} rows has a value{f' (detail of the first: {shortened(reason[0], 200)})' if reason else ''}"
    verdicts = values["value"].is_in([0.0, 1.0]).all()

    def told(value: Any) -> str:
        return f"{value:.1%}" if verdicts else f"{value:.4g}"

    lines = [f"{name}: {len(values):,} of {len(scores):,} rows have a value, mean {told(values['value'].mean())}"]
    samples = values.group_by("sample_index").agg(pl.col("value").mean()).sort("sample_index").drop_nulls("sample_index")
    if 1 < len(samples) <= 64:
        lines.append("  by sample: " + ", ".join(f"{index}: {told(mean)}" for index, mean in samples.iter_rows()))
        if verdicts:
            lines.append(f"  any of a prompt's samples: {told(values.group_by('example_id').agg(pl.col('value').max())['value'].mean())}")
    details = scores.filter(pl.col("detail") != "")["detail"].value_counts().sort("count", "detail", descending=[True, False])
    if len(details) <= FEW and details["count"].sum() > 2 * len(details):
        lines.append("  " + ", ".join(f"{count:,} {shortened(detail, 80)}" for detail, count in details.iter_rows()))
    return "\n".join(lines)


def score_path(run: Run, name: str) -> Path:
    """Return where the scores of this name stand."""
    return run.path / "curate" / "scores" / f"{name}.parquet"


def known_scores(run: Run) -> list[str]:
    """Return the names of the scores that stand in a run."""
    return sorted(path.stem for path in (run.path / "curate" / "scores").glob("*.parquet"))


def read_score(run: Run, rows: pl.DataFrame, name: str) -> pl.DataFrame:
    """Return `value` and `detail` of a score for these rows, in their order; null where a row was not scored, or is another since.

    `rows` have KEY and AS_SCORED. Raises UserError for a score that the run does not have, naming those it has.
    """
    check_score_name(run, name)
    if not score_path(run, name).exists():
        return _score_rows(rows, name, SCORERS[name](), run, None).select("value", "detail")
    stored = read_parquet(score_path(run, name))
    if set(SCHEMA) - set(stored.columns):
        raise UserError(f"{score_path(run, name)}: was written by an older sftkit; score the run again, what models computed is kept")
    same = [*KEY, *AS_SCORED]
    stored = stored.select(*same, "value", "detail")
    found = rows.select(same).join(stored, on=same, how="left", nulls_equal=True, maintain_order="left")
    fresh = len(rows.select(same).join(stored, on=same, how="anti", nulls_equal=True))
    if fresh:
        log.warning("%s of %s rows are newer than the score %s and count as unscored: score the run again", fresh, len(rows), name)
    return found.select("value", "detail")


def check_score_name(run: Run, name: str) -> None:
    """Raise UserError unless the run has a score of this name, or it can be read off the rows."""
    have = {*known_scores(run), *COLUMNS}
    if name == "random":
        raise UserError("random is an order to choose by, as --by random, and no score that has values")
    if name not in have:
        if name not in SCORERS:
            raise unknown_name("score", name, have, str(run.path))
        raise UserError(
            f"{run.path}: no score {name!r}: there are {', '.join(sorted(have))}; `sftkit curate score {run.path} --with {name}` adds it"
        )
