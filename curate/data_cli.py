"""The commands of `sftkit curate` that hand a data set on: export."""

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option, given
from ..core.config import load_config
from .config import ExportConfig


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
    if config.push_to_hub:
        click.echo(f"pushed to {config.push_to_hub}")
