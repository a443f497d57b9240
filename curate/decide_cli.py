"""The commands of `sftkit curate` that decide which rows stay, and what they share."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option, given
from ..core.config import load_config, read_yaml
from ..core.errors import UserError
from .decide_config import BestConfig, DecontaminateConfig, DedupConfig, EmbedConfig, FilterConfig, SelectConfig

NO_SEMANTIC = click.option("--no-semantic", is_flag=True, help="No duplicates by meaning: no embeddings are made.")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every step that works on a run takes: the run, or a data file and a run folder, and a file of settings."""
    command = click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")(
        command
    )
    command = click.option(
        "-o", "--out", type=click.Path(path_type=Path), help="Run folder for the rows of a data file; not needed when RUN is a run."
    )(command)
    return click.argument("run")(command)


@click.command()
@run_options
@config_option(BestConfig, "by")
@config_option(BestConfig, "majority")
@config_option(BestConfig, "min_share")
@config_option(BestConfig, "gate")
@config_option(BestConfig, "keep")
@config_option(BestConfig, "keep_all")
@config_option(BestConfig, "min_pass_rate")
@config_option(BestConfig, "max_pass_rate")
@config_option(BestConfig, "min_margin")
@config_option(BestConfig, "controls")
@config_option(BestConfig, "seed")
def best(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Keep the best of each prompt's samples in a RUN. Cut answers are never kept.

    Of equals the shorter is kept, then the one with the lower index.

    \b
    sftkit curate best runs/a --by numeric --by logprob              right first, then likely
    sftkit curate best runs/a --gate numeric --by -num_tokens        the shortest right answer
    sftkit curate best runs/a --gate numeric --keep-all              every right answer
    sftkit curate best runs/a --gate numeric --by logprob --min-pass-rate 0.1 --max-pass-rate 0.6    prompts neither hopeless nor easy
    sftkit curate best runs/a --majority --by logprob                the answer most samples agree on
    sftkit curate best runs/a --by random --seed 1 --keep 2          a control
    """
    from .best import best
    from .intake import open_run

    config = load_config(BestConfig, {**(read_yaml(settings) if settings else {}), **given(options)})
    with closing(open_run(run, out)) as opened:
        tell(opened, best(opened, config))


@click.command("filter")
@run_options
@config_option(FilterConfig, "min_words")
@config_option(FilterConfig, "max_words")
@config_option(FilterConfig, "languages")
@config_option(FilterConfig, "refusal")
@config_option(FilterConfig, "repetition")
@config_option(FilterConfig, "include")
@config_option(FilterConfig, "exclude")
@config_option(FilterConfig, "where")
@config_option(FilterConfig, "presets", "--preset")
@config_option(FilterConfig, "keep_unscored")
@config_option(FilterConfig, "controls")
@click.option("--min", "min_score", multiple=True, metavar="NAME=VALUE", help="Lowest value of a score.")
@click.option("--max", "max_score", multiple=True, metavar="NAME=VALUE", help="Highest value of a score.")
def filter_(run: str, out: Path | None, settings: Path | None, **options: Any) -> None:
    """Reject rows of a RUN that break a rule; the first rule broken is named.

    Cut, empty, refusing and repeating answers are rejected unless told otherwise. A condition of --where is over scores,
    their details (NAME.detail, as which language it is), source, prompt, response, reference, finish_reason, sample_index and
    meta.KEY, with and, or, not, < <= == != >= >, in, is None, len(…) and arithmetic. A row of which it says nothing, as a value
    is missing, is rejected as unscored.

    \b
    sftkit curate filter runs/a
    sftkit curate filter runs/a --where 'num_tokens < 800 and ifd < 1' --where "known: meta.topic in ('a', 'b')"
    sftkit curate filter runs/a --where "language.detail == 'zh-Hant' and language > 0.9"
    sftkit curate filter runs/a --min numeric=1 --max-words 400 --languages en,zh
    sftkit curate filter data.jsonl -o runs/b --exclude 'as an AI' --no-repetition
    """
    from .filters import filter_rows
    from .intake import open_run

    chosen = given(options)
    for name in ("min_score", "max_score"):
        if name in chosen:
            chosen[name] = {
                score: number(value, f"--min/--max {score}={value}") for score, _, value in (text.partition("=") for text in chosen[name])
            }
    if "languages" in chosen:
        chosen["languages"] = [each.strip() for text in chosen["languages"] for each in text.split(",")]
    config = load_config(FilterConfig, {**(read_yaml(settings) if settings else {}), **chosen})
    with closing(open_run(run, out)) as opened:
        tell(opened, filter_rows(opened, config))


@click.command()
@run_options
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
        tell(opened, decontaminate(opened, config))


@click.command()
@run_options
@config_option(DedupConfig, "exact")
@config_option(DedupConfig, "minhash")
@config_option(DedupConfig, "candidates")
@config_option(DedupConfig, "semantic")
@NO_SEMANTIC
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
        tell(opened, *dedup(opened, config))


@click.command()
@run_options
@config_option(SelectConfig, "method")
@config_option(SelectConfig, "budget")
@config_option(SelectConfig, "budget_tokens")
@config_option(SelectConfig, "on")
@config_option(SelectConfig, "by")
@config_option(SelectConfig, "quality_weight")
@config_option(SelectConfig, "fast")
@config_option(SelectConfig, "memory_gb")
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
    sftkit curate select runs/a --budget 1000 --method facility-location --fast
    sftkit curate select runs/a --budget-tokens 200000 --method qdit --by logprob --controls
    sftkit curate select runs/a --budget 1000 --method random --seed 1
    """
    from .intake import open_run
    from .selection import select

    config = load_config(SelectConfig, _with_embedder(options, settings))
    with closing(open_run(run, out)) as opened:
        tell(opened, select(opened, config))


def _with_embedder(options: dict[str, Any], settings: Path | None) -> dict[str, Any]:
    base = read_yaml(settings) if settings else {}
    chosen = given(options)
    model = chosen.pop("model", None)
    return with_model({**base, **chosen}, model)


def with_model(section: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return settings of a step with this embedder, if one is given; an `embed` that is no mapping is left for the loader to refuse."""
    embed = section.get("embed", {})
    return {**section, "embed": {**embed, "model": model}} if model is not None and isinstance(embed, dict) else section


def number(text: str, place: str) -> float:
    """Read a number of NAME=NUMBER."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{place}: expected NAME=VALUE with a number") from None


def tell(run: Any, *outcomes: Any) -> None:
    """Print the funnel of a run, the notes of what was just done, and where the data set is."""
    from .card import funnel_text

    click.echo(funnel_text(run))
    for outcome in outcomes:
        for note in outcome.notes:
            click.echo(f"{outcome.stage}: {note}")
    click.echo(f"data set: {run.path / 'curate' / 'dataset.jsonl'}")
