"""The commands of `sftkit curate` that ask a teacher: distill, and a look into the store of samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..core.cli import Commands, config_option, given
from ..core.config import load_config, read_yaml
from ..core.engines.base import EngineConfig
from ..core.text import counted
from .config import DistillConfig


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
    of_engine = ("engine", "base_url", "concurrency", "replicas", "executor", "ray_address")
    engine = {name: chosen.pop(name) for name in of_engine if name in chosen}
    merged = {**base, **chosen}
    if engine:
        merged["engine"] = {**base.get("engine", {}), **engine}
    return merged


@click.command()
@click.argument("prompts")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@config_option(DistillConfig, "k", "-k")
@sampling_options()
@config_option(EngineConfig, "concurrency")
@config_option(EngineConfig, "replicas")
@config_option(EngineConfig, "executor")
@config_option(EngineConfig, "ray_address", "--address")
@config_option(DistillConfig, "limit")
@config_option(DistillConfig, "logprobs")
@config_option(DistillConfig, "retry_truncated")
@config_option(DistillConfig, "budget_tokens")
@config_option(DistillConfig, "budget_hours")
@config_option(DistillConfig, "budget_cost")
@config_option(DistillConfig, "price_input")
@config_option(DistillConfig, "price_output")
@config_option(DistillConfig, "price_hour")
@config_option(DistillConfig, "max_failed")
@config_option(DistillConfig, "reasoning")
@config_option(DistillConfig, "json_schema")
@config_option(DistillConfig, "want_format")
@config_option(DistillConfig, "stop_below")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Answer 50 of the prompts, more where there are thousands or lengths differ much, keep those answers, tell what the rest takes.",
)
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def distill(prompts: str, out: Path, dry_run: bool, settings: Path | None, **options: Any) -> None:
    """Ask a teacher for k answers to each of the PROMPTS, a file, folder, `-`, or Hub data set.

    Stopped at any time, even by `kill -9`, the same command goes on; a larger -k adds to what is there.

    The engine auto gives a few short answers, 256 of up to 512 tokens, to transformers, which is done before vLLM has started.

    \b
    sftkit curate distill prompts.jsonl -o runs/a --teacher smollm2-135m-instruct -k 4
    sftkit curate distill prompts.jsonl -o runs/a --teacher smollm2-135m-instruct -k 8      four more of each
    sftkit curate distill prompts.jsonl -o runs/b --teacher org/name --system "Be brief." --dry-run
    sftkit curate distill math.jsonl -o runs/m --teacher org/name --want-format '####' --stop-below 0.9    a probe first
    sftkit curate distill prompts.jsonl -o runs/c --teacher name --engine openai --base-url http://localhost:8000/v1
    """
    config = load_config(DistillConfig, distill_settings(options, read_yaml(settings) if settings else {}))
    if dry_run:
        from .estimate import estimate

        click.echo(estimate(prompts, out, config).summary())
    else:
        from .distill import distill

        click.echo(distill(prompts, out, config).summary())


@click.group(cls=Commands)
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


@cache.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Parquet file to write.")
def export(run: Path, out: Path) -> None:
    """Write all stored samples of RUN to a Parquet file, also those that no settings ask for any more.

    \b
    sftkit curate cache export runs/a -o samples.parquet
    """
    from .cache import export

    click.echo(f"{out}: {counted(export(run, out), 'sample')}")
