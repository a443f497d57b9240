"""Judge: which of two models' stored answers a judge prefers, how far lengths and places explain it, and what the judge is worth."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.example import Message, content_id
from ..core.files import read_json, read_parquet, write_atomically
from ..core.formats import iterate_examples, split_prompt
from ..core.judge import Judge, Pair, Verdict
from ..core.named_models import NamedModel, find_models
from ..core.run import Run
from ..core.statistics import holm
from ..core.values import ValueStore
from .calibration import agreement_lines, calibrate, share
from .config import JudgeConfig
from .preferences import Agreement, WinRate, win_rate
from .results import aligned, counted, finish_section, open_section, told, told_question

log = logging.getLogger(__name__)

JUDGEMENTS: dict[str, Any] = {
    "model": pl.String,
    "baseline": pl.String,
    "example_id": pl.String,
    "winner": pl.String,  # name of the model, or tie; null where there is no verdict
    "preference": pl.Float64,  # probability of `model`, the mean over both orders
    "shown_first": pl.Float64,  # the same where its answer stands first
    "shown_second": pl.Float64,
    "flipped": pl.Boolean,
    "chars": pl.Int64,  # of the model's answer
    "baseline_chars": pl.Int64,
    "error": pl.String,  # why there is no verdict
}

MANY_FLIPS = 0.3  # of the pairs; in MT-bench's published judgements 12.9 % flip
HEADER = ("model", "against", "win rate", "95 %", "at equal length", "95 %", "won", "tied", "lost", "flips", "longer wins", "p")


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model said, by question."""

    name: str
    identity: str | None  # of its weights, where the run knows them
    texts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the baseline. The numbers are of the model."""

    model: str
    baseline: str
    numbers: WinRate
    p_adjusted: float  # Holm, over the models
    left_out: dict[str, int]  # questions by reason


@dataclass(frozen=True, kw_only=True)
class JudgeResult:
    """What a judge prefers, and what it is worth."""

    folder: Path | None
    judge: str
    parsed: bool
    comparisons: list[Comparison]
    agreements: list[Agreement]
    warnings: list[str]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for results.json."""
        return {
            "judge": self.judge,
            "parsed": self.parsed,
            "comparisons": [asdict(each) for each in self.comparisons],
            "agreements": [asdict(each) for each in self.agreements],
            "warnings": self.warnings,
        }

    def summary(self) -> str:
        """Write it for people."""
        how = "what it writes is read" if self.parsed else "by its probabilities"
        lines = [f"judged by {self.judge} ({how}), each pair in both orders; a flip is a tie"]
        if self.comparisons:
            rows: list[tuple[str, ...]] = [HEADER]
            for each in self.comparisons:
                numbers = each.numbers
                counts = [f"{count:,}" for count in (numbers.wins, numbers.ties, numbers.losses)]
                flips = f"{100 * numbers.flips / numbers.n:.0f} %"
                longer = "-" if numbers.longer_wins is None else f"{100 * numbers.longer_wins:.0f} %"
                shares = (*share(numbers.rate), *share(numbers.controlled), *counts, flips, longer, f"{each.p_adjusted:.2g}")
                rows.append((each.model, each.baseline, *shares))
            lines += aligned(rows)
        for each in self.comparisons:
            if each.left_out:
                lines.append(f"{each.model}: left out: {told(each.left_out)}")
            if each.p_adjusted > 0.05:
                lines.append(f"{each.model} against {each.baseline}: not significant")
        lines += agreement_lines(self.agreements)
        lines += [f"warning: {each}" for each in self.warnings]
        return "\n".join([*lines, *([f"verdicts: {self.folder / 'judgements.parquet'}"] if self.folder else [])])


def judge(sources: Sequence[str | Path], out: Path | None, config: JudgeConfig) -> JudgeResult:
    """Let a judge compare stored answers: all models of a run's `compare` with its first, or a file of answers with another.

    Answers are matched by their question. Into the run folder `out` (a run that is judged, where it is not given) go
    evaluate/judgements.parquet and the section `judge` of evaluate/results.json; verdicts are stored under keys of what decides
    them. The judge also judges the labelled pairs of `calibrate`, so that a reader knows what it is worth. Raises UserError
    for sources that are neither, and where no question was answered by both.
    """
    run = Path(sources[0]) if len(sources) == 1 else None
    if run is not None and out is None:
        out = run
    questions, answers = read_run(run) if run is not None else read_files(sources)
    (model,) = find_models({config.judge: config.judge}, config.engine)
    references = {} if config.references is None else read_references(config.references)
    settings = {"sources": [str(each) for each in sources], **to_mapping(config)}
    with open_section(out, "judge", settings) as folder:
        with (
            ValueStore(folder / "judgements.sqlite") as store,
            Judge(model, store, rubric=config.rubric, parse=config.parse) as judging,
        ):
            compared, tables = [], []
            for other in answers[1:]:
                numbers, removed, table = _compare(judging, questions, other, answers[0], references, config)
                compared.append((other.name, numbers, removed))
                tables.append(table)
            agreements = [] if config.calibrate == "none" else calibrate(judging, config.calibrate, config.calibrate_limit)
        adjusted = holm([numbers.p_value for _, numbers, _ in compared])
        result = JudgeResult(
            folder=folder if out else None,
            judge=config.judge,
            parsed=judging.parse,
            comparisons=[
                Comparison(model=name, baseline=answers[0].name, numbers=numbers, p_adjusted=p_value, left_out=removed)
                for (name, numbers, removed), p_value in zip(compared, adjusted, strict=True)
            ],
            agreements=agreements,
            warnings=_warnings(model, answers, run, [numbers for _, numbers, _ in compared], bool(agreements)),
        )
        with write_atomically(folder / "judgements.parquet") as temporary:
            pl.concat(tables).write_parquet(temporary)
        of_this_run = run is not None and out is not None and run.resolve() == out.resolve()  # void when `compare` makes others
        finish_section(
            folder,
            "judge",
            {**result.facts(), "of_this_run": of_this_run},
            {"judge": config.judge, "models": [each.name for each in answers]},
        )
        return result


def read_run(run: Path) -> tuple[dict[str, list[Message]], list[Answers]]:
    """Return the questions by id and the answers of all models that `compare` stored in a run, in its order."""
    folder = run / "evaluate"
    if run.is_file():
        raise UserError(f"{run}: is one file of answers; expected two, the second to compare it with, or a run with compared answers")
    if not (folder / "answers.parquet").exists():
        raise UserError(f"{run}: has no stored answers; `sftkit evaluate compare … -o {run}` makes some, or give two files of answers")
    table = read_parquet(folder / "answers.parquet")
    names = table["model"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        raise UserError(f"{run}: has the answers of {names[0]} alone; compare it with another model first")
    Run.open(run)
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    facts = results.get("compare", {}).get("models", {})
    if set(names) - set(facts):
        raise UserError(f"{run}: its comparison was not finished; give the same `sftkit evaluate compare` command again")
    questions = {key: json.loads(text) for key, text in table.select("example_id", "question").unique("example_id").iter_rows()}
    answered = table.filter(pl.col("error").is_null())
    texts = {name: dict(answered.filter(model=name).select("example_id", "text").iter_rows()) for name in names}
    return questions, [Answers(name, facts[name]["identity"], texts[name]) for name in names]


def read_files(sources: Sequence[str | Path]) -> tuple[dict[str, list[Message]], list[Answers]]:
    """Return the questions by id and the answers of two files, each named after its file. A question counts once, the first time."""
    if len(sources) != 2:
        raise UserError(f"judge: expected a run with compared answers or two files of answers, found {len(sources)} names")
    names = [Path(str(each)).name for each in sources]
    if names[0] == names[1]:
        names = [str(each) for each in sources]
    if names[0] == names[1]:
        raise UserError(f"{names[0]}: is given twice; expected the answers of two models")
    questions: dict[str, list[Message]] = {}
    found = []
    for name, source in zip(names, sources, strict=True):
        texts: dict[str, str] = {}
        repeated = 0
        for example in iterate_examples(source):
            messages, answer = split_prompt(example)
            key = content_id(messages)
            if answer is None:
                continue
            repeated += key in texts
            questions.setdefault(key, messages)
            texts.setdefault(key, answer)
        if not texts:
            raise UserError(f"{source}: holds no answers; expected conversations with an answer, or prompts and responses")
        if repeated:
            log.warning("%s: %s rows repeat a question; the first answer to it counts", source, f"{repeated:,}")
        found.append(Answers(name, None, texts))
    return questions, found


def read_references(source: str) -> dict[str, str]:
    """Return the right answers of a file by question: its answers, or its column `reference`."""
    found = {}
    for example in iterate_examples(source):
        messages, answer = split_prompt(example)
        reference = example.meta.get("reference", answer)
        if reference is not None:
            found[content_id([each for each in messages if each["role"] != "system"])] = str(reference)
    if not found:
        raise UserError(f"{source}: holds no reference answers; expected a column `reference`, or answers")
    return found


def _compare(
    judging: Judge,
    questions: Mapping[str, list[Message]],
    model: Answers,
    baseline: Answers,
    references: Mapping[str, str],
    config: JudgeConfig,
) -> tuple[WinRate, dict[str, int], pl.DataFrame]:
    """Judge all pairs of two models; return the numbers, the questions left out by reason, and the table of verdicts."""
    keys = list(questions)[: config.limit]
    judged = [key for key in keys if key in model.texts and key in baseline.texts]
    if not judged:
        raise UserError(f"{model.name} and {baseline.name}: none of {len(keys):,} questions was answered by both")
    pairs = []
    for key in judged:
        said = [each for each in questions[key] if each["role"] != "system"]
        pairs.append(Pair(told_question(said), model.texts[key], baseline.texts[key], references.get(content_id(said))))
    verdicts = judging.compare(pairs)
    sound = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.winner is not None]
    errors = [verdict.error.partition(":")[0] for verdict in verdicts if verdict.winner is None]
    reasons = counted([*errors, *["not answered by both"] * (len(keys) - len(judged))])
    if not sound:
        raise UserError(f"{judging.model.name}: gave no verdict on any of {len(pairs):,} pairs; the first: {verdicts[0].error}")
    numbers = win_rate(
        [verdict.winner or 0 for _, verdict in sound],
        [verdict.flipped for _, verdict in sound],
        [(len(pair.first), len(pair.second)) for pair, _ in sound],
    )
    rows = [_row(model.name, baseline.name, *each) for each in zip(judged, pairs, verdicts, strict=True)]
    return numbers, reasons, pl.DataFrame(rows, schema=JUDGEMENTS)


def _row(model: str, baseline: str, key: str, pair: Pair, verdict: Verdict) -> dict[str, Any]:
    orders = verdict.orders or (None, None)
    return {
        "model": model,
        "baseline": baseline,
        "example_id": key,
        "winner": None if verdict.winner is None else ("tie", model, baseline)[verdict.winner],
        "preference": verdict.preference,
        "shown_first": orders[0],
        "shown_second": orders[1],
        "flipped": verdict.flipped,
        "chars": len(pair.first),
        "baseline_chars": len(pair.second),
        "error": verdict.error or None,
    }


def _warnings(judge: NamedModel, answers: Sequence[Answers], run: Path | None, numbers: Sequence[WinRate], calibrated: bool) -> list[str]:
    """Return what a reader should know before believing the numbers."""
    found = []
    flips, pairs = sum(each.flips for each in numbers), sum(each.n for each in numbers)
    if flips > MANY_FLIPS * pairs:
        found.append(f"{100 * flips / pairs:.0f} % of the verdicts flip with the order: this judge sees places more than answers")
    for each in answers:
        if each.identity == judge.identity:
            found.append(f"the judge is {each.name} itself: judges prefer their own answers")
    teacher = (Run.open(run).config().get("distill") or {}).get("teacher") if run is not None else None
    if teacher is not None and teacher in (judge.reference, judge.identity):
        found.append("the judge is the teacher of this run's answers: it prefers models that write as it does")
    if not calibrated:
        found.append("what this judge is worth is not known: --calibrate llmbar lets it judge labelled pairs")
    return found
