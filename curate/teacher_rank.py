"""Which teacher to ask: each answers the same few prompts, and what counts is what an accepted answer costs."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..core.config import part, to_mapping
from ..core.engines.base import Sampling
from ..core.errors import UserError
from ..core.example import evenly_spaced
from ..core.files import read_json_lines, write_json, write_text
from ..core.run import Run
from ..core.statistics import Estimate, bootstrap_ratio, bootstrap_ratio_difference, wilson
from ..core.store import SampleStore
from ..core.text import counted
from .config import DistillConfig, RankConfig, ScoreConfig
from .decide_config import parse_gate
from .distill import distill
from .prompts import read_prompts
from .rows import load_rows
from .score import open_scorer, read_score, reads_told_logprobs, score

log = logging.getLogger(__name__)

STUDENT = "student_logprob"
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with its 95 % interval over prompts; None where there is nothing to take it from."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def write(self, form: str) -> str:
        """Write it for people."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None or not (math.isfinite(self.low) and math.isfinite(self.high)):
            return format(self.value, form)
        return f"{self.value:{form}} ({self.low:{form}}–{self.high:{form}})"


@dataclass(frozen=True, kw_only=True)
class TeacherRank:
    """One teacher's answers to the prompts."""

    name: str
    model: str
    answers: int
    failed: int
    not_asked: int  # of prompts that others are asked: too long for its context, or refused by its template
    stopped: Measure  # share that was not cut
    accepted: Measure  # share that ended by itself, with words, and passes
    tokens: Measure  # of an answer, accepted or not
    tokens_per_accepted: Measure  # of all answers, over those accepted
    cost_per_accepted: Measure  # by the price of the teacher's tokens
    student_logprob: Measure  # mean over the accepted answers, nats per token: the higher, the better the student takes to them
    behind_best: Measure  # accepted share of the first in the ranking less this one's, paired by prompt


def rank_teachers(source: str | Path, out: Path, config: RankConfig) -> list[TeacherRank]:
    """Let each teacher answer the same prompts, score the answers, and return the teachers, best first; out/ranking.json has it too.

    Each has a run folder of its own in out/teachers, durable and resumed as any distillation; a teacher who fails at some
    prompts stays in the ranking. Its failures count as not accepted, and so do prompts that are asked of others but do not fit its
    own context. The order is that of the accepted share, then of the student's log-probability, then of the tokens of an accepted
    answer. Intervals are from 10,000 bootstrap samples of prompts.
    """
    for name, options in config.scorers.items():
        open_scorer(name, options)
    if config.gate is not None and (wanted := parse_gate(config.gate).name) not in config.scorers:
        raise UserError(f"accept: no score {wanted!r} is asked for; add --with {wanted}")
    unknown = [name for name in config.prices if name not in config.teachers]
    if unknown:
        raise UserError(f"price: there is no teacher {unknown[0]!r}; teachers are {', '.join(config.teachers)}")
    prompts = _choose(source, out, config)
    tables = {name: _answers(prompts, out, name, model, config) for name, model in config.teachers.items()}
    everyone = sorted(set().union(*(table["example_id"].to_list() for table in tables.values())))
    unasked = {name: sorted(set(everyone).difference(table["example_id"])) for name, table in tables.items()}
    tables = {
        name: pl.concat([table, pl.DataFrame({"example_id": unasked[name] * config.k}, {"example_id": pl.String})], how="diagonal")
        for name, table in tables.items()
    }
    sums = {name: _sums(table, everyone, config.prices.get(name)) for name, table in tables.items()}
    shares = {name: _ratio(each, "accepted", "wanted").value or 0.0 for name, each in sums.items()}
    fits = {name: _ratio(each, "logprob", "scored").value for name, each in sums.items()}
    order = sorted(
        config.teachers,
        key=lambda name: (-shares[name], _last_if_none(fits[name]), sums[name]["tokens"].sum()),
    )
    ranking = []
    for name in order:
        each, table = sums[name], tables[name]
        priced = name in config.prices
        ranking.append(
            TeacherRank(
                name=name,
                model=config.teachers[name],
                answers=table.filter(pl.col("num_tokens").is_not_null()).height,
                failed=table["num_tokens"].null_count() - config.k * len(unasked[name]),
                not_asked=config.k * len(unasked[name]),
                stopped=_ratio(each, "stopped", "wanted"),
                accepted=_ratio(each, "accepted", "wanted"),
                tokens=_ratio(each, "tokens", "answered"),
                tokens_per_accepted=_ratio(each, "tokens", "accepted"),
                cost_per_accepted=_ratio(each, "cost", "accepted") if priced else Measure(None),
                student_logprob=_ratio(each, "logprob", "scored"),
                behind_best=_difference(sums[order[0]], each) if name != order[0] else Measure(0.0),
            )
        )
    write_json(out / "ranking.json", [asdict(each) for each in ranking])
    return ranking


def tell(ranking: Sequence[TeacherRank]) -> str:
    """Write a ranking for people."""
    lines = []
    for place, each in enumerate(ranking, 1):
        lines.append(f"{place}. {each.name} ({each.model}): accepted {each.accepted.write('.1%')}, stopped {each.stopped.write('.1%')}")
        facts = [f"tokens an answer {each.tokens.write(',.0f')}", f"tokens an accepted answer {each.tokens_per_accepted.write(',.0f')}"]
        if each.cost_per_accepted.value is not None:
            facts.append(f"cost of an accepted answer {each.cost_per_accepted.write('.6f')}")
        if each.student_logprob.value is not None:
            facts.append(f"the student's log-probability {each.student_logprob.write('.3f')}")
        gone = f"; {each.failed:,} failed" if each.failed else ""
        gone += f"; {each.not_asked:,} not asked, which count as not accepted" if each.not_asked else ""
        lines.append("   " + ", ".join(facts) + gone)
        if place > 1:
            behind = each.behind_best
            clear = behind.low is not None and behind.low > 0
            lines.append(f"   behind the first by {behind.write('.1%')}" + ("" if clear else ": that may be chance"))
    return "\n".join(lines)


def _choose(source: str | Path, out: Path, config: RankConfig) -> Path:
    """Write the prompts that all teachers answer, evenly spaced over the file; the same ones when it is called again.

    Raises UserError where teachers have answered others in this folder.
    """
    examples = read_prompts(source)
    if not examples:
        raise UserError(f"{source}: holds no prompts")
    chosen = evenly_spaced(examples, config.prompts)
    path = out / "prompts.jsonl"
    if path.exists() and any(out.glob("teachers/*/curate/samples.sqlite")):
        before, now = [str(row["id"]) for row in read_json_lines(path)], {each.id for each in chosen}
        if gone := len(set(before) - now):
            raise UserError(
                f"{out}: its teachers answered {counted(len(before), 'prompt')}, of which {gone:,} are not among the {len(now):,} now"
                " (evenly spaced ones stay when their number is multiplied); give another folder, or the same file and"
                f" --prompts {len(before)}"
            )
    rows = [{"id": each.id, "messages": each.messages, "source": each.source, "meta": each.meta} for each in chosen]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return path


def _answers(prompts: Path, out: Path, name: str, model: str, config: RankConfig) -> pl.DataFrame:
    """Return a row for each wanted answer: example_id, num_tokens (null where it failed), prompt_tokens, stopped, accepted, logprob."""
    reference, _, address = model.partition("@http")
    engine = to_mapping(config.engine) | ({"engine": "openai", "base_url": f"http{address}"} if address else {})
    asking = DistillConfig(
        **to_mapping(part(config, Sampling)),
        teacher=reference,
        k=config.k,
        system=config.system,
        thinking=config.thinking,
        max_failed=1.0,
        logprobs=reads_told_logprobs(config.scorers),
        engine=type(config.engine)(**engine),
    )
    path = out / "teachers" / name
    log.info("%s: %s answers", name, model)
    distill(prompts, path, asking)
    run = Run.open(path)
    scorers = dict(config.scorers)
    if config.student is not None:
        scorers[STUDENT] = {"scorer": "grape", "model": config.student}
    if scorers:
        with Run.create(path) as writing:
            score(writing, ScoreConfig(scorers=scorers))
    rows = load_rows(run, all=True, columns=["example_id", "sample_index", "finish_reason", "num_tokens"])
    with SampleStore(path / "curate" / "samples.sqlite") as store:
        asked = store.frame().select("example_id", "sample_index", "prompt_tokens")
    passes = pl.Series([True] * len(rows), dtype=pl.Boolean)
    if config.gate is not None:
        gate = parse_gate(config.gate)
        values = read_score(run, rows, gate.name)["value"]
        passes = pl.Series([value is not None and bool(gate.passes(value)) for value in values], dtype=pl.Boolean)
    fit = read_score(run, rows, STUDENT)["value"] if config.student is not None else pl.Series([None] * len(rows), dtype=pl.Float64)
    rows = rows.with_columns((rows["finish_reason"] != "length").alias("stopped"), passes.alias("passes"), fit.alias("logprob"))
    decided = run.ledger.read().filter(pl.col("stage") == "distill").select("example_id", "sample_index", kept=pl.col("action") == "kept")
    keys = ["example_id", "sample_index"]
    both = decided.join(rows, on=keys, how="left", maintain_order="left").join(asked, on=keys, how="left", maintain_order="left")
    return both.with_columns(accepted=pl.col("kept") & pl.col("passes"))  # no data set has the others: cut, or without a word


def _sums(table: pl.DataFrame, prompts: Sequence[str], price: Sequence[float] | None) -> dict[str, Numbers]:
    """Return what is summed up, by prompt, in the order of `prompts`."""
    cost_in, cost_out = price or (0.0, 0.0)
    accepted = pl.col("accepted").fill_null(False)
    scored = accepted & pl.col("logprob").is_not_null()
    by_prompt = table.group_by("example_id").agg(
        wanted=pl.len(),
        answered=pl.col("num_tokens").count(),
        stopped=pl.col("stopped").fill_null(False).sum(),
        accepted=accepted.sum(),
        tokens=pl.col("num_tokens").fill_null(0).sum(),
        cost=(pl.col("prompt_tokens").fill_null(0) * cost_in + pl.col("num_tokens").fill_null(0) * cost_out).sum() / 1e6,
        logprob=pl.when(scored).then(pl.col("logprob")).otherwise(0.0).sum(),
        scored=scored.sum(),
    )
    ordered = pl.DataFrame({"example_id": prompts}).join(by_prompt, on="example_id", how="left", maintain_order="left").fill_null(0)
    return {name: ordered[name].to_numpy().astype(np.float64) for name in ordered.columns if name != "example_id"}


def _ratio(sums: Mapping[str, Numbers], above: str, below: str) -> Measure:
    """Return a ratio of sums. The interval of a share that is 0 or 1 throughout is Wilson's: a bootstrap of that has no width."""
    top, bottom = sums[above], sums[below]
    if not bottom.sum():
        return Measure(None)
    if below == "wanted" and top.sum() in (0.0, bottom.sum()):  # a prompt's answers count as one observation
        return _measured(Estimate(float(top.sum() / bottom.sum()), wilson(len(top) if top.sum() else 0, len(top))))
    return _measured(bootstrap_ratio(top, bottom))


def _difference(first: Mapping[str, Numbers], other: Mapping[str, Numbers]) -> Measure:
    shares = [(each["accepted"], each["wanted"]) for each in (other, first)]
    return _measured(bootstrap_ratio_difference(*shares))


def _measured(found: Estimate) -> Measure:
    ends = (None, None) if found.interval is None else (found.interval.low, found.interval.high)
    return Measure(found.value, *(end if end is not None and math.isfinite(end) else None for end in ends))


def parse_pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """Read NAME=VALUE each. Raises UserError for what has no name, a name that cannot be a folder's, or one that is there twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UserError(f"--{what} {text!r}: expected NAME={what.upper()}, the name of letters, digits, -, _ and .")
        if name in found:
            raise UserError(f"--{what}: {name!r} is there twice")
        found[name] = value
    return found


def parse_price(text: str) -> tuple[float, float]:
    """Read IN,OUT: the prices of a million tokens of prompts and of answers."""
    try:
        into, out = (float(each) for each in text.split(","))
        if min(into, out) >= 0:
            return into, out
    except ValueError:
        pass
    raise UserError(f"price {text!r}: expected IN,OUT, the prices of a million tokens of prompts and of answers, as 0.15,0.6")


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that command-line options mean."""
    teachers = parse_pairs(options.pop("teachers"), "teacher")
    prices = {name: list(parse_price(text)) for name, text in parse_pairs(options.pop("prices"), "price").items()}
    return {**options, **({"teachers": teachers} if teachers else {}), **({"prices": prices} if prices else {})}


def _last_if_none(value: float | None) -> float:
    """Return what sorts higher values first, and none last."""
    return math.inf if value is None else -value
