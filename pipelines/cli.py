"""The commands `sftkit run`, `sftkit ablate` and `sftkit report`."""

from pathlib import Path
from typing import Any

import click

from ..core.cli import config_option, given
from ..core.config import load_config, read_yaml
from .config import AblationConfig


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
    from .config import find_recipe, load_recipe

    path = find_recipe(recipe, full=full)
    config = load_recipe(path)
    from .chain import run_chain  # after what a user may have to mend: it takes seconds to import

    target = out or Path("runs") / path.stem
    click.echo(run_chain(config, target, name=path.stem, accept_licence=accept_licence).summary())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model that every training begins with.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Rows to measure on; those that RUN held out when not given.")
@config_option(AblationConfig, "seeds")
@config_option(AblationConfig, "equal_tokens")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file: train: {…}, loss: {…}; options win over it.")
def ablate(run: Path, model: str, out: Path, heldout: Path | None, settings: Path | None, **options: Any) -> None:
    """Say whether a selection paid: train MODEL on it and on its controls in RUN, and compare the held-out loss, paired.

    \b
    sftkit curate select runs/a --budget 1000 --controls
    sftkit ablate runs/a --model smollm2-135m-instruct -o runs/ablation --seeds 3
    """
    from .ablation import ablate as run_ablation
    from .report import write_report

    config = load_config(AblationConfig, {**(read_yaml(settings) if settings else {}), **given(options)}, str(settings or ""))
    result = run_ablation(run, model, out, config, heldout=heldout)
    click.echo(f"{result.summary()}\nreport: {write_report(out)}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html of RUN again, from the files that stand in it.

    \b
    sftkit report runs/quickstart
    """
    from .report import write_report

    click.echo(write_report(run))
