"""The commands of `sftkit curate`."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..core.cli import Commands, config_option, given
from ..core.config import load_config, read_yaml
from ..core.engines.base import EngineConfig
from ..core.errors import UserError
from .config import (
    BestConfig,
    BuildConfig,
    DecontaminateConfig,
    DedupConfig,
    DistillConfig,
    EmbedConfig,
    FilterConfig,
    HeldoutConfig,
    ImportConfig,
    ScoreConfig,
    SelectConfig,
)


@click.group(cls=Commands)
def curate() -> None:
    """Build a data set: distill, score, choose, filter, deduplicate, select."""


def sampling_options(*, show_default: bool = True) -> Callable[[Any], Any]:
    """Return a decorator that adds the options that decide a sample, and the server that is asked for it."""
    of_sample = ("teacher", "revision", "system", "temperature", "top_p", "max_new_tokens", "seed")
    options = [config_option(DistillConfig, name, show_default=show_default) for name in of_sample]
    options += [config_option(EngineConfig, name, show_default=show_default) for name in ("engine", "base_url")]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def distill_settings(options: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a DistillConfig: options over `base`, those of the engine in their own section."""
    chosen = given(options)
    engine = {name: chosen.pop(name) for name in ("engine", "base_url", "concurrency") if name in chosen}
    merged = {**base, **chosen}
    if engine:
        merged["engine"] = {**base.get("engine", {}), **engine}
    return merged


@curate.command()
@click.argument("prompts")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@config_option(DistillConfig, "k", "-k")
@sampling_options()
@config_option(EngineConfig, "concurrency")
@config_option(DistillConfig, "limit")
@config_option(DistillConfig, "retry_truncated")
@config_option(DistillConfig, "budget_tokens")
@config_option(DistillConfig, "budget_hours")
@config_option(DistillConfig, "max_failed")
@click.option("--dry-run", is_flag=True, help="Answer 16 of the prompts, keep those answers, and say what the rest will take.")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def distill(prompts: str, out: Path, dry_run: bool, settings: Path | None, **options: Any) -> None:
    """Ask a teacher for k answers to each of the PROMPTS, a file, folder, `-`, or Hub data set.

    Stopped at any time, even by `kill -9`, the same command goes on; a larger -k adds to what is there.

    \b
    sftkit curate distill prompts.jsonl -o runs/a --teacher smollm2-135m-instruct -k 4
    sftkit curate distill prompts.jsonl -o runs/a --teacher smollm2-135m-instruct -k 8      four more of each
    sftkit curate distill prompts.jsonl -o runs/b --teacher org/name --system "Be brief." --dry-run
    sftkit curate distill prompts.jsonl -o runs/c --teacher name --engine openai --base-url http://localhost:8000/v1
    """
    config = load_config(DistillConfig, distill_settings(options, read_yaml(settings) if settings else {}))
    if dry_run:
        from .estimate import estimate

        click.echo(estimate(prompts, out, config).summary())
    else:
        from .distill import distill

        click.echo(distill(prompts, out, config).summary())


@curate.group(cls=Commands)
def cache() -> None:
    """Look into the store of samples."""


@cache.command()
@click.argument("run", type=click.Path(path_type=Path))
@sampling_options(show_default=False)
def explain(run: Path, **options: Any) -> None:
    """Say which stored samples of RUN these settings would use, and by which fields the others differ.

    Settings that are not given are the run's own; the teacher's weights and template are looked at as they are now.

    \b
    sftkit curate cache explain runs/a
    sftkit curate cache explain runs/a --temperature 1.0
    sftkit curate cache explain runs/a --teacher other-model
    """
    from .cache import explain

    click.echo("\n".join(each.summary() for each in explain(run, distill_settings(options, {}))))


@curate.command("import")
@click.argument("data")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed.")
@config_option(ImportConfig, "samples")
@config_option(ImportConfig, "prompt_column")
@config_option(ImportConfig, "reference_column")
@config_option(ImportConfig, "format")
@config_option(ImportConfig, "limit")
def import_(data: str, out: Path, **options: Any) -> None:
    """Take the rows of DATA, a file, folder, `-`, or Hub data set, into a run, so that the other commands can decide on them.

    \b
    sftkit curate import data.jsonl -o runs/a
    sftkit curate import answers.jsonl -o runs/b --samples model_1 --samples model_2     two answers to each question
    """
    from ..core.run import Run
    from .intake import take_in

    config = load_config(ImportConfig, given(options))
    with closing(Run.create(out)) as run:
        take_in(data, run, config)
        _tell(run)


def decide_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every step that works on a run takes: the run, or a data file and a run folder, and a file of settings."""
    command = click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")(
        command
    )
    command = click.option(
        "-o", "--out", type=click.Path(path_type=Path), help="Run folder for the rows of a data file; not needed when RUN is a run."
    )(command)
    return click.argument("run")(command)


@curate.command()
@decide_options
@click.option("--with", "scorers", multiple=True, help="Scorer to apply: NAME or NAME:option=value,option=value (name=… calls it so).")
def score(run: str, out: Path | None, settings: Path | None, scorers: tuple[str, ...]) -> None:
    """Attach scores to every row of a RUN, kept or not.

    \b
    numeric     the final number is that of the reference: 1 or 0 (rule=strict|flexible, gold=COLUMN)
    exact       the answer is the reference (ignore_case=false, gold=COLUMN)
    regex       a pattern is found (pattern=…, ignore_case=true)
    length      num_chars, num_words and num_tokens (num_tokens:model=… counts by that model's tokenizer)
    logprob     the teacher's mean log-probability per token

    \b
    sftkit curate score runs/a --with numeric --with length
    sftkit curate score runs/a --with 'regex:pattern=```python,name=has_code'
    sftkit curate score data.jsonl -o runs/b --with numeric:gold=answer
    """
    from .intake import open_run
    from .score import parse_scorers, score, summary

    base = read_yaml(settings) if settings else {}
    config = load_config(ScoreConfig, {**base, "scorers": {**base.get("scorers", {}), **parse_scorers(list(scorers))}})
    with closing(open_run(run, out)) as opened:
        for name, scores in score(opened, config).items():
            click.echo(summary(name, scores))


@curate.command()
@decide_options
@config_option(BestConfig, "by")
@config_option(BestConfig, "majority")
@config_option(BestConfig, "min_share")
@config_option(BestConfig, "gate")
@config_option(BestConfig, "keep")
@config_option(BestConfig, "seed")
def best(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Keep the best of each prompt's samples in a RUN. Cut answers are never kept.

    Of equals the shorter is kept, then the one with the lower index.

    \b
    sftkit curate best runs/a --by numeric --by logprob              right first, then likely
    sftkit curate best runs/a --gate numeric --by -num_tokens        the shortest right answer
    sftkit curate best runs/a --majority --by logprob                the answer most samples agree on
    sftkit curate best runs/a --by random --seed 1 --keep 2          a control
    """
    from .best import best
    from .intake import open_run

    config = load_config(BestConfig, {**(read_yaml(settings) if settings else {}), **given(options)})
    with closing(open_run(run, out)) as opened:
        _tell(opened, best(opened, config))


@curate.command("filter")
@decide_options
@config_option(FilterConfig, "min_words")
@config_option(FilterConfig, "max_words")
@config_option(FilterConfig, "languages")
@config_option(FilterConfig, "refusal")
@config_option(FilterConfig, "repetition")
@config_option(FilterConfig, "include")
@config_option(FilterConfig, "exclude")
@click.option("--min", "min_score", multiple=True, metavar="NAME=VALUE", help="Lowest value of a score.")
@click.option("--max", "max_score", multiple=True, metavar="NAME=VALUE", help="Highest value of a score.")
def filter_(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Reject rows of a RUN that break a rule; the first rule broken is named.

    Cut, empty, refusing and repeating answers are rejected unless told otherwise.

    \b
    sftkit curate filter runs/a
    sftkit curate filter runs/a --min numeric=1 --max-words 400 --languages en,zh
    sftkit curate filter data.jsonl -o runs/b --exclude 'as an AI' --no-repetition
    """
    from .filters import filter_rows
    from .intake import open_run

    chosen = given(options)
    for name in ("min_score", "max_score"):
        if name in chosen:
            chosen[name] = {score: _number(value, f"{score}={value}") for score, _, value in (text.partition("=") for text in chosen[name])}
    if "languages" in chosen:
        chosen["languages"] = [each.strip() for text in chosen["languages"] for each in text.split(",")]
    config = load_config(FilterConfig, {**(read_yaml(settings) if settings else {}), **chosen})
    with closing(open_run(run, out)) as opened:
        _tell(opened, filter_rows(opened, config))


@curate.command()
@decide_options
@config_option(DecontaminateConfig, "benchmarks", "--benchmark")
@config_option(DecontaminateConfig, "ngram")
@config_option(DecontaminateConfig, "min_coverage")
@config_option(DecontaminateConfig, "on")
def decontaminate(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Remove rows of a RUN that hold an item of a benchmark: copied runs of words, short items word for word.

    Hashes of GSM8K (test), IFEval, MMLU (test), HumanEval and MT-bench come along. curate/contamination.parquet lists
    what was found, the longest copied run first.

    \b
    sftkit curate decontaminate runs/a
    sftkit curate decontaminate runs/a --benchmark gsm8k --benchmark my_test.jsonl --ngram 13 --min-coverage 0
    """
    from .decontaminate import decontaminate
    from .intake import open_run

    config = load_config(DecontaminateConfig, {**(read_yaml(settings) if settings else {}), **given(options)})
    with closing(open_run(run, out)) as opened:
        _tell(opened, decontaminate(opened, config))


@curate.command()
@decide_options
@config_option(DedupConfig, "exact")
@config_option(DedupConfig, "minhash")
@config_option(DedupConfig, "candidates")
@config_option(DedupConfig, "semantic")
@click.option("--no-semantic", is_flag=True, help="No duplicates by meaning: no embeddings are made.")
@config_option(DedupConfig, "on")
@config_option(DedupConfig, "by")
@config_option(DedupConfig, "against")
@config_option(EmbedConfig, "model")
def dedup(run: str, out: Path | None, settings: Path | None, no_semantic: bool, **options: Any) -> None:
    """Remove rows of a RUN that an earlier (or better) row stands for; each names that row.

    \b
    sftkit curate dedup runs/a
    sftkit curate dedup runs/a --semantic 0.9 --on prompt --by numeric
    sftkit curate dedup data.jsonl -o runs/b --no-semantic --minhash 0.8      the same words, nearly
    sftkit curate dedup runs/a --against older.jsonl                          what that set has already goes too
    """
    from .dedup import dedup
    from .intake import open_run

    chosen = _with_embedder(options, settings)
    config = load_config(DedupConfig, {**chosen, "semantic": None} if no_semantic else chosen)
    with closing(open_run(run, out)) as opened:
        _tell(opened, *dedup(opened, config))


@curate.command()
@decide_options
@config_option(SelectConfig, "method")
@config_option(SelectConfig, "budget")
@config_option(SelectConfig, "budget_tokens")
@config_option(SelectConfig, "on")
@config_option(SelectConfig, "by")
@config_option(SelectConfig, "quality_weight")
@config_option(SelectConfig, "controls")
@config_option(SelectConfig, "seed")
@config_option(EmbedConfig, "model")
def select(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Take the rows of a RUN that a method ranks first, within a budget. The ranking stands in curate/selection.parquet.

    \b
    k-center            the row farthest from all taken ones (first: the best --by, or the nearest to the mean)
    facility-location   the row that makes the taken ones stand best for all rows
    qdit                the same and the score --by, weighed by --quality-weight
    mmr                 the score --by less the cosine with the nearest taken row, weighed
    dpp                 the row that the taken ones explain least (and --by, weighed)
    deita               best --by first, none with a cosine of 0.9 (max_cosine) or more to a taken one
    stratified          every source × length × cluster (strata) has its share
    cluster-balanced    a row of every cluster in turn
    top, longest        the highest --by (`--by=-NAME`: the lowest); the longest answers
    random              a control

    \b
    sftkit curate select runs/a --budget 1000
    sftkit curate select runs/a --budget-tokens 200000 --method qdit --by logprob --controls
    sftkit curate select runs/a --budget 1000 --method random --seed 1
    """
    from .intake import open_run
    from .selection import select

    config = load_config(SelectConfig, _with_embedder(options, settings))
    with closing(open_run(run, out)) as opened:
        _tell(opened, select(opened, config))


@curate.command()
@click.argument("data", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@click.option(
    "--config", "settings", type=click.Path(path_type=Path), help="YAML file with a section for each step; a run's config.yaml is one."
)
@config_option(SelectConfig, "budget")
@config_option(SelectConfig, "budget_tokens")
@config_option(DedupConfig, "semantic")
@config_option(DedupConfig, "on")
@config_option(EmbedConfig, "model")
def build(data: str | None, out: Path, settings: Path | None, **options: Any) -> None:
    """Make a data set of DATA in one go: distill or import, score, best, filter, decontaminate, dedup, hold out, select.

    The steps are those with a section in the config file; without one, rows are taken in, and those that hold items
    of benchmarks and exact and semantic duplicates removed (`decontaminate: null` leaves the former in). A budget
    adds the selection. Without DATA the rows that RUN has are decided on anew.

    \b
    sftkit curate build data.jsonl -o runs/a --budget 1000
    sftkit curate build prompts.jsonl -o runs/b --config build.yaml

    \b
    build.yaml:   distill: {teacher: smollm2-135m-instruct, k: 4}
                  score: {scorers: {numeric: {}}}
                  best: {by: [numeric, logprob]}
                  filter: {max_words: 400}
                  decontaminate: {benchmarks: [gsm8k, my_test.jsonl]}
                  dedup: {semantic: 0.95, on: prompt}
                  heldout: {prompts: 200}                    not trained on; curate/heldout.jsonl
                  select: {budget: 1000}
    """
    from .build import build

    sections = build_sections(given(options), read_steps(settings) if settings else {})
    result = build(data, out, load_config(BuildConfig, sections, str(settings or "")))
    from ..core.run import Run

    _tell(Run.open(out), *result.outcomes)
    click.echo("seconds: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in result.seconds.items()))


def read_steps(path: Path) -> dict[str, Any]:
    """Read the settings of a build. Of a run's own config.yaml only what a build is told; the rest is what the run noted."""
    sections = read_yaml(path)
    if not (path.parent / "versions.json").exists():
        return sections
    steps = {}
    for each in fields(BuildConfig):
        if each.name in sections:
            known = {setting.name for setting in fields(STEPS[each.name])}
            steps[each.name] = {name: value for name, value in sections[each.name].items() if name in known}
    return steps


STEPS: dict[str, Any] = {
    "distill": DistillConfig,
    "intake": ImportConfig,
    "score": ScoreConfig,
    "best": BestConfig,
    "filter": FilterConfig,
    "decontaminate": DecontaminateConfig,
    "dedup": DedupConfig,
    "heldout": HeldoutConfig,
    "select": SelectConfig,
}


def build_sections(chosen: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a BuildConfig with the options that were given; only a budget adds a section, that of `select`."""
    merged = dict(sections)
    for name in ("dedup", "select"):
        section = merged.get(name, {} if name == "dedup" or {"budget", "budget_tokens"} & set(chosen) else None)
        if section is None:
            continue
        known = {setting.name for setting in fields(STEPS[name])}
        merged[name] = {**section, **{key: value for key, value in chosen.items() if key in known}}
        if "model" in chosen:
            merged[name]["embed"] = {**section.get("embed", {}), "model": chosen["model"]}
    return merged


@curate.command()
@click.argument("source")
@click.option("-n", "--limit", default=5, show_default=True, help="Rows to show.")
@click.option("--id", "wanted", help="The row with this id, the beginning of one, or ID/INDEX.")
@click.option("--rejected", metavar="RULE", help="Rows that this rule removed, with the reason.")
def show(source: str, limit: int, wanted: str | None, rejected: str | None) -> None:
    """Show rows of SOURCE, a run or a data file: conversation, scores, origin.

    \b
    sftkit curate show runs/a -n 3
    sftkit curate show runs/a --rejected semantic_duplicate
    sftkit curate show data.jsonl
    """
    from .show import show

    show(source, limit=limit, wanted=wanted, rejected=rejected)


@curate.command()
@click.argument("wanted", metavar="ID")
@click.argument("run", required=False, type=click.Path(path_type=Path))
def why(wanted: str, run: Path | None) -> None:
    """Say what every step decided on the row ID of RUN (the newest in runs/ when not given), and which row stands for it.

    \b
    sftkit curate why 3f9a12 runs/a
    sftkit curate why 3f9a12bc04d1e877/2 runs/a
    """
    from .show import find_run, why

    opened = find_run(run)
    click.echo(f"run {opened.path}", err=True)
    why(opened, wanted)


@curate.command()
@click.argument("run", type=click.Path(path_type=Path))
def verify(run: Path) -> None:
    """Prove from the files of RUN that no row is missing and its duplicates are gone; exit code 1, with the rows, where it fails.

    Every stage accounts for each row once; each removed duplicate has a kept witness, as like as it must be when computed
    anew by another way (texts, Jaccard similarities, cosines); no two kept rows are that much alike.

    \b
    sftkit curate verify runs/a
    """
    from ..core.run import Run
    from .certificate import check_run, report

    checks = check_run(Run.open(run))
    click.echo(report(checks))
    failed = [check.stage for check in checks if check.faults]
    if failed:
        raise UserError(f"{run}: {len(failed)} of {len(checks)} statements fail, of {', '.join(dict.fromkeys(failed))}")


def _with_embedder(options: dict[str, Any], settings: Path | None) -> dict[str, Any]:
    base = read_yaml(settings) if settings else {}
    chosen = given(options)
    if "model" in chosen:
        base["embed"] = {**base.get("embed", {}), "model": chosen.pop("model")}
    return {**base, **chosen}


def _number(text: str, place: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--min/--max {place}: expected NAME=VALUE with a number") from None


def _tell(run: Any, *outcomes: Any) -> None:
    from .card import funnel_text

    click.echo(funnel_text(run))
    for outcome in outcomes:
        for note in outcome.notes:
            click.echo(f"{outcome.stage}: {note}")
    click.echo(f"data set: {run.path / 'curate' / 'dataset.jsonl'}")
