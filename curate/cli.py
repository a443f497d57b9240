"""The commands of `sftkit curate`."""

from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..core.cli import Commands, config_option, given
from ..core.config import load_config, read_yaml
from ..core.errors import UserError
from .config import BuildConfig, DistillConfig, ImportConfig, ScoreConfig
from .data_cli import export, mix
from .decide_cli import NO_SEMANTIC, best, decontaminate, dedup, filter_, select, tell, with_model
from .decide_config import BestConfig, DecontaminateConfig, DedupConfig, EmbedConfig, FilterConfig, HeldoutConfig, SelectConfig
from .distill_cli import cache, distill
from .prompts_cli import prompts, teacher_rank, tune
from .score_cli import score


@click.group(cls=Commands)
def curate() -> None:
    """Build a data set: distill, score, choose, filter, deduplicate, select."""


@click.command("import")
@click.argument("data")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed.")
@config_option(ImportConfig, "samples")
@config_option(ImportConfig, "prompt_column")
@config_option(ImportConfig, "answer_column")
@config_option(ImportConfig, "reference_column")
@config_option(ImportConfig, "format")
@config_option(ImportConfig, "limit")
@config_option(ImportConfig, "max_failed")
def import_(data: str, out: Path, **options: Any) -> None:
    """Take the rows of DATA, a file, folder, `-`, or Hub data set, into a run, so that the other commands can decide on them.

    \b
    sftkit curate import data.jsonl -o runs/a
    sftkit curate import answers.jsonl -o runs/b --samples model_1 --samples model_2     two answers to each question
    sftkit curate import faq.csv -o runs/c --prompt-column title --answer-column body
    sftkit curate import crawled.jsonl -o runs/d --max-failed 0.01     without rows that cannot be read; show RUN --rejected unreadable
    """
    from .intake import import_run

    with closing(import_run(data, out, load_config(ImportConfig, given(options)))) as run:
        tell(run)


@click.command()
@click.argument("data", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@click.option(
    "--config", "settings", type=click.Path(path_type=Path), help="YAML file with a section for each step; a run's config.yaml is one."
)
@config_option(SelectConfig, "budget")
@config_option(SelectConfig, "budget_tokens")
@config_option(DedupConfig, "semantic")
@NO_SEMANTIC
@config_option(DedupConfig, "on")
@config_option(EmbedConfig, "model")
def build(data: str | None, out: Path, settings: Path | None, no_semantic: bool, **options: Any) -> None:
    """Make a data set of DATA in one go: distill or import, score, best, filter, decontaminate, dedup, hold out, select.

    The steps are those with a section in the config file; without one, rows are taken in, and those that hold items
    of benchmarks and exact and semantic duplicates removed (`decontaminate: null` leaves the former in). A budget
    adds the selection. Without DATA the rows that RUN has are decided on anew.

    \b
    sftkit curate build data.jsonl -o runs/a --budget 1000
    sftkit curate build data.jsonl -o runs/b --no-semantic      no embeddings: in seconds
    sftkit curate build prompts.jsonl -o runs/c --config build.yaml

    \b
    build.yaml:   distill: {teacher: smollm2-135m-instruct, k: 4, logprobs: true}
                  score: {scorers: {numeric: {}}}
                  best: {by: [numeric, logprob]}
                  filter: {max_words: 400}
                  decontaminate: {benchmarks: [gsm8k, my_test.jsonl]}
                  dedup: {semantic: 0.95, on: prompt}
                  heldout: {prompts: 200}                    not trained on; curate/heldout.jsonl
                  select: {budget: 1000}
    """
    from .build import build

    chosen = {**given(options), **({"semantic": None} if no_semantic else {})}
    sections = build_sections(chosen, read_steps(settings) if settings else {})
    result = build(data, out, load_config(BuildConfig, sections, str(settings or "")))
    from ..core.run import Run

    tell(Run.open(out), *result.outcomes)
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
        if not isinstance(section, dict):  # none, or what the loader refuses
            continue
        known = {setting.name for setting in fields(STEPS[name])}
        own = {key: value for key, value in chosen.items() if key in known}
        merged[name] = with_model({**section, **own}, chosen.get("model"))
    return merged


@click.command()
@click.argument("source")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=5, show_default=True, help="Rows to show.")
@click.option("--id", "wanted", help="The row with this id (ours or its file's), the beginning of one, or ID/INDEX.")
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


@click.command()
@click.argument("wanted", metavar="ID")
@click.argument("run", required=False, type=click.Path(path_type=Path))
def why(wanted: str, run: Path | None) -> None:
    """Say what every step decided on the row ID of RUN (the newest in runs/ when not given), and which row stands for it.

    ID is ours, as `show` has it, or its beginning, or what the row's file has in its column id.

    \b
    sftkit curate why 3f9a12 runs/a
    sftkit curate why 3f9a12bc04d1e877/2 runs/a
    """
    from .show import find_run, why

    opened = find_run(run)
    click.echo(f"run {opened.path}", err=True)
    why(opened, wanted)


@click.command()
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


for command in (
    prompts,
    teacher_rank,
    tune,
    distill,
    cache,
    import_,
    score,
    best,
    filter_,
    decontaminate,
    dedup,
    select,
    mix,
    build,
    export,
    show,
    why,
    verify,
):
    curate.add_command(command)
