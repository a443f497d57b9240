"""The commands of `sftkit curate` that put data sets together and hand them on: mix, export."""

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option, given
from ..core.config import load_config
from .config import ExportConfig
from .decide_cli import number, tell
from .decide_config import MixConfig


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Run folder of the mixture; without it one RUN is mixed by its own files."
)
@click.option("--share", "shares", multiple=True, metavar="NAME=SHARE", help="Share of a source, called by its file or folder.")
@config_option(MixConfig, "temperature")
@config_option(MixConfig, "budget")
@config_option(MixConfig, "budget_tokens")
@config_option(MixConfig, "repeat")
@config_option(MixConfig, "seed")
def mix(sources: tuple[str, ...], out: Path | None, shares: tuple[str, ...], **options: Any) -> None:
    """Mix SOURCES, runs or data files, in proportions; no row is taken twice unless --repeat says so.

    \b
    sftkit curate mix runs/a runs/b chat.jsonl -o runs/c --share a=2 --share b=1 --share chat=1 --budget 20000
    sftkit curate mix runs/a runs/b -o runs/c --temperature 2                  small sources count for more
    sftkit curate mix runs/a runs/b -o runs/c --budget-tokens 1000000 --share a=0.9 --share b=0.1 --repeat 3
    sftkit curate mix runs/a --temperature 5                                   the files that its rows come from
    """
    from ..core.run import Run
    from .mix import mix as put_together

    chosen = given(options)
    if shares:
        parts = [(each, *each.rpartition("=")[::2]) for each in shares]
        chosen["shares"] = {name: number(value if name else "", f"--share {each}") for each, name, value in parts}
    outcome = put_together(sources, out, load_config(MixConfig, chosen))
    tell(Run.open(out or Path(sources[0])), outcome)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the export, made if needed.")
@config_option(ExportConfig, "format")
@config_option(ExportConfig, "by")
@config_option(ExportConfig, "rejected")
@config_option(ExportConfig, "min_margin")
@config_option(ExportConfig, "seed")
@config_option(ExportConfig, "push_to_hub")
def export(run: Path, out: Path, **options: Any) -> None:
    """Write the data set of RUN for another tool, with its card. What a format cannot hold is refused by row, and counted.

    \b
    trl-messages        TRL and most others: messages, with id, source and meta
    prompt-completion   TRL: prompt and completion as messages
    preference          TRL's DPO: prompt, chosen, rejected as messages; of best-of-k, or of pairs that were taken in
    alpaca              instruction, output, system, history
    sharegpt            conversations of from and value
    openai              fine-tuning JSONL
    llama-factory       train.json and dataset_info.json
    parquet             everything, typed

    \b
    sftkit curate export runs/a --format openai -o out
    sftkit curate export runs/a --format preference --by logprob --rejected worst -o pairs
    sftkit curate export runs/a --format parquet -o out --push-to-hub me/my-data
    """
    from ..core.run import Run
    from .export import export as write

    config = load_config(ExportConfig, given(options))
    with closing(Run.open(run)) as opened:
        click.echo(write(opened, out, config).summary())
