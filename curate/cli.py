"""The commands of `sftkit curate`."""

import click

from ..core.cli import Commands


@click.group(cls=Commands)
def curate() -> None:
    """Build a data set: distill, score, choose, filter, deduplicate, select."""
