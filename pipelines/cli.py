"""The commands `sftkit run` and `sftkit report`."""

from pathlib import Path

import click


@click.command()
@click.argument("recipe")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder, made if needed; runs/RECIPE when not given.")
@click.option("--full", is_flag=True, help="quickstart with a teacher of 1.5 B parameters: for a GPU, or a night.")
@click.option("--accept-licence", is_flag=True, help="Accept the licence of a model that the recipe names and that asks for it.")
def run(recipe: str, out: Path | None, full: bool, accept_licence: bool) -> None:
    """Run the whole chain, curate, train, evaluate, as RECIPE says: a YAML file, or the name of one that comes with sftkit.

    A finished step is not done again; stopped at any time, the same command goes on.

    \b
    sftkit run quickstart
    sftkit run quickstart --full --accept-licence
    sftkit run my-recipe.yaml -o runs/mine
    """
    from .chain import run_chain
    from .config import find_recipe, load_recipe

    path = find_recipe(f"{recipe}-full" if full else recipe)
    target = out or Path("runs") / path.stem
    click.echo(run_chain(load_recipe(path), target, name=path.stem, accept_licence=accept_licence).summary())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html of RUN again, from the files that stand in it.

    \b
    sftkit report runs/quickstart
    """
    from .report import write_report

    click.echo(write_report(run))
