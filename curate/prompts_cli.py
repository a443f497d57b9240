"""The commands of `sftkit curate` that come before a distillation: more prompts, and which teacher to ask."""

from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option
from ..core.config import load_config, read_yaml
from ..core.engines.base import EngineConfig
from .config import DistillConfig, GrowConfig, RankConfig
from .distill_cli import distill_settings


@click.command()
@click.argument("seeds", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@config_option(GrowConfig, "method")
@config_option(GrowConfig, "teacher")
@config_option(GrowConfig, "count")
@config_option(GrowConfig, "rounds")
@config_option(GrowConfig, "similarity")
@config_option(GrowConfig, "max_words")
@config_option(GrowConfig, "temperature")
@config_option(GrowConfig, "max_new_tokens")
@config_option(GrowConfig, "seed")
@config_option(GrowConfig, "budget_tokens")
@config_option(EngineConfig, "engine")
@config_option(EngineConfig, "base_url")
@config_option(EngineConfig, "replicas")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def prompts(seeds: str | None, out: Path, settings: Path | None, **options: Any) -> None:
    """Grow a set of prompts with a teacher, into curate/prompts.jsonl of a run folder.

    \b
    self-instruct   shows some of the SEEDS and some new prompts, and asks for more
    evol            rewrites each of the SEEDS into a harder one, round after round
    documents       SEEDS is a text or Markdown file, or a folder of them: asks for questions that their passages answer
    converse        answers the SEEDS, writes the user's next turn, and so on; `distill` then gives the last answer
    magpie          no SEEDS: lets an aligned teacher write what a user would say to it

    \b
    Copies (by ROUGE-L), lists cut short, prompts without what they speak of: left out, each with its reason in the ledger.
    Every prompt has its parents in its meta. Stopped at any time, the same command goes on; a larger --count adds.

    \b
    sftkit curate prompts seeds.jsonl -o runs/p --teacher MODEL --count 1000
    sftkit curate prompts seeds.jsonl -o runs/e --teacher MODEL --method evol --rounds 2
    sftkit curate prompts handbook/ -o runs/d --teacher MODEL --method documents
    sftkit curate prompts seeds.jsonl -o runs/c --teacher MODEL --method converse --rounds 2
    sftkit curate prompts -o runs/m --teacher MODEL --method magpie --temperature 1
    sftkit curate distill runs/p -o runs/a --teacher MODEL
    """
    from .grow import grow

    config = load_config(GrowConfig, distill_settings(options, read_yaml(settings) if settings else {}))
    click.echo(grow(seeds, out, config).summary())


@click.command("teacher-rank")
@click.argument("source", metavar="PROMPTS")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder, made if needed; the same one goes on.")
@click.option("--teacher", "teachers", multiple=True, help="NAME=MODEL, or NAME=MODEL@http://… at a server. Several.")
@config_option(RankConfig, "prompts")
@config_option(RankConfig, "k", "-k")
@click.option("--with", "scorers", multiple=True, help="Scorer of the answers, as for `score`: NAME or NAME:option=value,option=value.")
@config_option(RankConfig, "accept")
@config_option(RankConfig, "student")
@click.option("--price", "prices", multiple=True, help="NAME=IN,OUT: what a million tokens of prompts and of answers cost.")
@config_option(RankConfig, "system")
@config_option(RankConfig, "max_new_tokens")
@config_option(EngineConfig, "engine")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def teacher_rank(source: str, out: Path, settings: Path | None, scorers: tuple[str, ...], **options: Any) -> None:
    """Compare teachers on a few of the PROMPTS before the budget is spent: what an accepted answer takes, with 95 % intervals.

    An answer is accepted when it ended with words and passes the first scorer, or --accept. Without a scorer, give --student.
    The engine auto gives a few short answers, 256 of up to 512 tokens, to transformers, which is done before vLLM has started.

    \b
    sftkit curate teacher-rank gsm8k.jsonl -o runs/rank --teacher a=MODEL --teacher b=OTHER --with numeric
    sftkit curate teacher-rank prompts.jsonl -o runs/rank --teacher a=MODEL --teacher b=big@http://localhost:8000/v1 --student SMALL
    sftkit curate teacher-rank gsm8k.jsonl -o runs/rank --teacher a=MODEL --teacher b=OTHER --with numeric --price a=0,0.1 --price b=0,0.6
    """
    from .score import parse_scorers
    from .teacher_rank import rank_teachers, settings_of, tell

    base = read_yaml(settings) if settings else {}
    found = distill_settings(settings_of(options), base)
    if scorers:
        found["scorers"] = parse_scorers(list(scorers))
    ranking = rank_teachers(source, out, load_config(RankConfig, found))
    click.echo(f"{tell(ranking)}\n{out / 'ranking.json'}")


@click.command()
@click.argument("source", metavar="PROMPTS")
@config_option(DistillConfig, "teacher")
@config_option(DistillConfig, "revision")
@config_option(DistillConfig, "system")
@config_option(DistillConfig, "temperature")
@config_option(DistillConfig, "max_new_tokens")
@config_option(DistillConfig, "limit")
@config_option(EngineConfig, "engine")
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Time of each measurement, after half of it to warm up.")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def tune(source: str, seconds: float, settings: Path | None, **options: Any) -> None:
    """Measure which engine settings answer the PROMPTS fastest on this machine: sequences and tokens at once, processes on a card.

    Settings take the place of the defaults where they were faster three times, in turns with them: the choice is not to hang on what
    else runs here. What is found is remembered by model, card and version, and taken by `distill` for settings that are not given. It
    changes how fast answers come, not which: samples stay valid.

    \b
    sftkit curate tune prompts.jsonl --teacher org/name --max-new-tokens 400
    """
    from ..core.engines.tuning import tuned_settings
    from .estimate import tune_teacher

    config = load_config(DistillConfig, distill_settings(options, read_yaml(settings) if settings else {}))

    def written(settings: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) or "its defaults"

    def tell(trial: Any) -> None:
        found = f"cannot be run: {trial.error}" if trial.error else f"{trial.tokens_per_second:,.0f} tokens/s"
        click.echo(f"{written(trial.settings)}: {found} (start {trial.seconds_to_start:.0f} s)")

    click.echo(f"distill takes {written(tuned_settings(tune_teacher(source, config, seconds=seconds, tell=tell)))}")
