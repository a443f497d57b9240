"""The command line's face: it only adds the rooms' commands."""

import click

from . import __version__
from .core.cli import Commands, run_command_line
from .core.models_cli import doctor, models
from .curate.cli import curate
from .evaluate.cli import evaluate
from .pipelines.cli import ablate, report, run
from .train.cli import train


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sftkit")
def sftkit() -> None:
    """From a file of prompts to a better model, with a receipt for every row.

    \b
    sftkit run quickstart                                    the whole chain, on this machine, in minutes
    sftkit curate distill prompts.jsonl -o runs/a --teacher MODEL -k 4
    sftkit train sft runs/a --model MODEL -o runs/b
    sftkit evaluate compare --model base=MODEL --model sft=runs/b
    """


for command in (curate, train, evaluate, run, ablate, report, models, doctor):
    sftkit.add_command(command)


def main() -> None:
    """Run `sftkit`, the console script."""
    run_command_line(sftkit)
