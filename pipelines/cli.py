"""The commands `sftkit run` and `sftkit report`."""

import click


@click.command()
def run() -> None:
    """Run the whole chain from one recipe."""


@click.command()
def report() -> None:
    """Write a run's report again."""
