"""The chain of curation in one go: answers or rows in, one data set out, every step from one config."""

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..core.engines.loading import choose
from ..core.errors import UserError
from ..core.models import resolve_model
from ..core.progress import timed
from ..core.run import Run
from .best import best
from .config import BuildConfig, ImportConfig
from .decide_config import parse_gate
from .decided import Outcome, take_back
from .decontaminate import decontaminate, open_benchmark
from .dedup import dedup
from .filters import filter_rows, read_conditions, text_rules
from .heldout import hold_out
from .intake import import_run
from .score import check_score_name, open_scorer, reads_told_logprobs, score
from .selection import select

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What each stage of a build did, and how long its steps took."""

    outcomes: tuple[Outcome, ...]
    seconds: dict[str, float]


def build(source: str | Path | None, out: Path, config: BuildConfig) -> BuildResult:
    """Distill or take in the rows of `source`, then score, best, filter, decontaminate, dedup, hold out and select.

    Only the steps that the config has are done.
    Answers and embeddings that are there are used again; to decide takes seconds and is done anew. Without `source` the run's
    own rows are decided on. Raises UserError when a step leaves nothing for the next.
    """
    check_early(out, config)
    outcomes: list[Outcome] = []
    seconds: dict[str, float] = {}
    if config.distill:
        from .distill import distill

        if source is None:
            raise UserError("build: give the prompts that the teacher answers")
        with timed("distill", seconds):
            distill(source, out, config.distill)
    elif source is None:
        Run.open(out)
    if source is not None and not config.distill:
        with timed("import", seconds):
            run = import_run(source, out, config.intake or ImportConfig())
    else:
        run = Run.create(out)
    with closing(run):
        _begin_anew(run, planned_stages(config))
        if config.score:
            with timed("score", seconds):
                score(run, config.score)
        if config.best:
            with timed("best", seconds):
                outcomes.append(best(run, config.best))
        if config.filter:
            with timed("filter", seconds):
                outcomes.append(filter_rows(run, config.filter))
        if config.decontaminate:
            with timed("decontaminate", seconds):
                outcomes.append(decontaminate(run, config.decontaminate))
        if config.dedup:
            with timed("dedup", seconds):
                outcomes += dedup(run, config.dedup)
        if config.heldout:
            with timed("heldout", seconds):
                outcomes.append(hold_out(run, config.heldout))
        if config.select:
            with timed("select", seconds):
                outcomes.append(select(run, config.select))
    return BuildResult(tuple(outcomes), seconds)


def check_early(out: Path, config: BuildConfig) -> None:
    """Raise UserError for what a later step would refuse, before the first one costs anything."""
    scorers = config.score.scorers if config.score else {}
    for name, options in scorers.items():
        open_scorer(name, options)
    conditions = []
    if config.filter:
        text_rules(config.filter)
        conditions = read_conditions(Run(out), config.filter, list(scorers))
    for benchmark in config.decontaminate.benchmarks if config.decontaminate else ():
        open_benchmark(benchmark)
    names = [name for step in (config.best, config.dedup, config.select) if step for name in step.by if name.removeprefix("-") != "random"]
    names += [parse_gate(text).name for text in config.best.gate] if config.best else []
    names += [*config.filter.min_score, *config.filter.max_score] if config.filter else []
    names += [config.best.answers] if config.best and config.best.majority else []
    for name in names:
        if name.removeprefix("-") not in scorers:
            check_score_name(Run(out), name.removeprefix("-"))
    names += [name for each in conditions for name in each.names]
    untold = config.distill and not config.distill.logprobs and choose(config.distill.engine) != "transformers"
    if untold and reads_told_logprobs(scorers, names):
        raise UserError("build: the score logprob is asked for, which this teacher tells only with distill: {logprobs: true}")
    if config.dedup and config.dedup.semantic is not None:
        resolve_model(config.dedup.embed.model)
    if config.select and config.select.needs_vectors:
        resolve_model(config.select.embed.model)


def planned_stages(config: BuildConfig) -> list[str]:
    """Return the stages that decide in a build, in order."""
    stages = ["best"] * bool(config.best) + ["filter"] * bool(config.filter) + ["decontaminate"] * bool(config.decontaminate)
    if config.dedup:
        asked = (config.dedup.exact, config.dedup.minhash is not None, config.dedup.semantic is not None)
        stages += [f"dedup_{name}" for name, wanted in zip(("exact", "minhash", "semantic"), asked, strict=True) if wanted]
    return stages + ["heldout"] * bool(config.heldout) + ["select"] * bool(config.select)


def _begin_anew(run: Run, planned: list[str]) -> None:
    """Take back what this build does not have, or has in another order: its own decisions would stand on that."""
    stages = run.ledger.stages()
    first = max((place for place, stage in enumerate(stages) if stage in ("import", "distill", "mix")), default=-1)
    later = stages[first + 1 :]
    if first < 0 or later == planned[: len(later)]:
        return
    take_back(run, later[0])
    log.info("%s: the former decisions of %s are taken back; this build decides anew", run.path, ", ".join(later))
