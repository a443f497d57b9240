"""The commands of `sftkit curate` that come before a distillation: more prompts, and which teacher to ask."""

from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option
from ..core.config import load_config, read_yaml
from ..core.engines.base import EngineConfig
from .config import GrowConfig
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
    magpie          no SEEDS: lets an aligned teacher write what a user would say to it

    \b
    Copies (by ROUGE-L), lists cut short, prompts without what they speak of: left out, each with its reason in the ledger.
    Every prompt has its parents in its meta. Stopped at any time, the same command goes on; a larger --count adds.

    \b
    sftkit curate prompts seeds.jsonl -o runs/p --teacher MODEL --count 1000
    sftkit curate prompts seeds.jsonl -o runs/e --teacher MODEL --method evol --rounds 2
    sftkit curate prompts handbook/ -o runs/d --teacher MODEL --method documents
    sftkit curate prompts -o runs/m --teacher MODEL --method magpie --temperature 1
    sftkit curate distill runs/p/curate/prompts.jsonl -o runs/a --teacher MODEL
    """
    from .grow import grow

    config = load_config(GrowConfig, distill_settings(options, read_yaml(settings) if settings else {}))
    click.echo(grow(seeds, out, config).summary())
