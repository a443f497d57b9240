"""The commands of `sftkit evaluate`."""

import click

from ..core.cli import Commands


@click.group(cls=Commands)
def evaluate() -> None:
    """Compare models: answers side by side, held-out loss."""
