"""The commands of `sftkit train`."""

import click

from ..core.cli import Commands


@click.group(cls=Commands)
def train() -> None:
    """Fine-tune a model, and look at what it is trained on."""
