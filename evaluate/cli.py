"""The commands of `sftkit evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..core.cli import Commands, config_option, given
from ..core.config import load_config, read_yaml
from ..core.engines.base import EngineConfig
from ..core.errors import UserError
from ..core.text import counted
from .config import CompareConfig, JudgeConfig, LossConfig, TasksConfig, parse_models

NAMES = "gsm8k, ifeval, humaneval, mmlu, mmlu_generated, mt_bench, FILE, lm-eval:NAME."
OF_ENGINE = ("engine", "base_url", "device", "dtype", "batch_tokens", "replicas")


@click.group(cls=Commands)
def evaluate() -> None:
    """Compare models: answers side by side, held-out loss, tasks, a judge."""


def model_options(*of_engine: str) -> Callable[[Any], Any]:
    """Return a decorator that adds the models, the run folder, how the models are run, and a file of settings."""
    named = "A model and its name; the others are compared with the first."
    folder = "Run folder, made if needed, for the results; without it they are only printed."
    options = [
        click.option("--model", "models", multiple=True, metavar="NAME=REF", help=named),
        click.option("-o", "--out", type=click.Path(path_type=Path), help=folder),
    ]
    settings = click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
    options += [*(config_option(EngineConfig, name) for name in of_engine), settings]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def merged(options: dict[str, Any], settings: Path | None) -> dict[str, Any]:
    """Return the options that were given over those of a file, the engine's in their own section."""
    base = read_yaml(settings) if settings else {}
    chosen = given(options)
    engine = {name: chosen.pop(name) for name in OF_ENGINE if name in chosen}
    section = base.get("engine") or {}
    if engine and isinstance(section, dict):  # a section that is something else is for the loader to refuse
        section = {**section, **engine}
    return {**base, **chosen, **({"engine": section} if section else {})}


@evaluate.command(short_help="Answers to the same questions side by side, and who stops.")
@model_options("engine", "base_url", "device", "dtype")
@click.option("--questions", help="File, folder, `-` or Hub data set of questions; three to begin with when not given.")
@config_option(CompareConfig, "system")
@config_option(CompareConfig, "max_new_tokens")
@config_option(CompareConfig, "limit")
def compare(models: tuple[str, ...], out: Path | None, settings: Path | None, questions: str | None, **options: Any) -> None:
    """Ask all models the same questions and show their greedy answers side by side: who stops by itself, how long they are.

    In a run folder, answers are stored: the same command generates only for what changed. Without -o nothing is kept.
    The engine auto gives a few short answers, 256 of up to 512 tokens, to transformers, which is done before vLLM has started.

    \b
    sftkit evaluate compare --model base=smollm2-135m-instruct --model sft=runs/b
    sftkit evaluate compare --model base=MODEL --model sft=runs/b --model teacher=org/name --questions prompts.jsonl -o runs/b
    sftkit evaluate compare --model sft=runs/b --questions prompts.jsonl --limit 20 --system "Be brief."
    """
    chosen = parse_models(models)
    config = load_config(CompareConfig, merged(options, settings), str(settings or ""))
    from .compare import compare
    from .show import show_answers

    result = compare(chosen, questions, out, config)
    show_answers(result)
    click.echo(result.summary())


@evaluate.command(short_help="Held-out loss and bits per byte, by source and turn.")
@click.argument("heldout")
@model_options("device", "dtype", "batch_tokens")
@config_option(LossConfig, "text")
@config_option(LossConfig, "limit")
@config_option(LossConfig, "resamples")
@config_option(LossConfig, "seed")
def loss(heldout: str, models: tuple[str, ...], out: Path | None, settings: Path | None, **options: Any) -> None:
    """Say how probable each model finds the answers in HELDOUT, rows that none was trained on: loss and bits per byte.

    The loss is the mean of -ln p over the tokens of the answers, each one's end of turn among them, as in training. Bits per
    byte divide -log2 p of the same tokens by the UTF-8 bytes of the answers, and compare models across tokenizers. Intervals
    are paired: both models on the same rows, prompts drawn anew. In a run folder only what changed is computed again. Half
    precision rounds the number of each token by some hundredths; --dtype float32 does not, at about half the speed.

    \b
    sftkit evaluate loss heldout.jsonl --model base=smollm2-135m-instruct --model sft=runs/b
    sftkit evaluate loss runs/a/curate/heldout.jsonl --model base=MODEL --model sft=runs/b --model teacher=org/name -o runs/b
    sftkit evaluate loss general.txt --text --model base=MODEL --model sft=runs/b          # what training made it forget
    """
    chosen = parse_models(models)
    config = load_config(LossConfig, merged(options, settings), str(settings or ""))
    from .loss import loss

    click.echo(loss(heldout, chosen, out, config).summary())


@evaluate.command(short_help="Let a model judge stored answers in pairs.")
@click.argument("answers", nargs=-1, required=False)
@click.option("--judge", help="The model that judges: a folder, a Hub id, a catalogue name, a server's model.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder for the results; a run that is judged, when not given.")
@click.option("--verdicts", type=click.Path(), help="File of labelled verdicts, as LLMBar's: only say how often --judge was right.")
@config_option(JudgeConfig, "rubric")
@config_option(JudgeConfig, "parse")
@config_option(JudgeConfig, "references")
@config_option(JudgeConfig, "calibrate")
@config_option(JudgeConfig, "calibrate_limit")
@config_option(JudgeConfig, "limit")
@config_option(EngineConfig, "engine")
@config_option(EngineConfig, "base_url")
@config_option(EngineConfig, "device")
@config_option(EngineConfig, "dtype")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file of settings; options win over it.")
def judge(answers: tuple[str, ...], out: Path | None, verdicts: str | None, settings: Path | None, **options: Any) -> None:
    """Let a model judge stored ANSWERS in pairs: those of a run's `compare`, each model against the first, or two files.

    Each pair is judged in both orders, and a flip is a tie. The win rate stands beside the one at equal lengths, for judges
    like long answers, and beside what the judge is worth on labelled pairs: 100 of LLMBar's (--calibrate). Any engine can judge.

    \b
    sftkit evaluate judge runs/b --judge org/name
    sftkit evaluate judge old.jsonl new.jsonl --judge gpt-x --engine openai --base-url https://host/v1 --references gold.jsonl
    sftkit evaluate judge --verdicts judge_verdicts.jsonl.gz --judge GPT-4
    """
    chosen = merged(options, settings)
    if chosen.get("judge") is None:
        raise UserError("no judge was given: expected --judge MODEL, as --judge org/name")
    if verdicts is not None:
        from .calibration import agreement_lines, read_verdicts

        click.echo("\n".join(agreement_lines(read_verdicts(verdicts, judge=chosen["judge"]))))
        return
    config = load_config(JudgeConfig, chosen, str(settings or ""))
    from .judge import judge

    click.echo(judge(answers, out, config).summary())


@evaluate.command(short_help="GSM8K, IFEval, HumanEval, MMLU, your own: marked, compared.")
@model_options("engine", "base_url", "device", "dtype", "replicas")
@click.option("--tasks", "names", metavar="NAME,NAME", required=True, help=NAMES)
@config_option(TasksConfig, "limit")
@config_option(TasksConfig, "ask")
@config_option(TasksConfig, "samples")
@config_option(TasksConfig, "max_new_tokens")
@config_option(TasksConfig, "train_data")
@config_option(TasksConfig, "judge")
@config_option(TasksConfig, "unsafe")
def tasks(models: tuple[str, ...], out: Path | None, settings: Path | None, names: str, **options: Any) -> None:
    """Ask all models the questions of tasks, mark the answers by rules or a judge; compare each with the first, question by question.

    A model with a chat template is asked in a chat. A base model without one is asked twice, as base:completion (a text to go on
    from, with worked examples where the task has some) and as base:chat (by the template that training would give it), and the
    others are compared with both: a model is better than it where it is better than both. A FILE (or FILE:SCORING) has a
    question in each row, and a column scoring: exact, numeric or contains (with a column answer), regex (pattern), json-schema
    (schema), unit-test (tests), judge (graded by --judge). Programs run in a sandbox (bubblewrap). In a run folder answers are
    stored, apart from their marks: the same command generates only for what changed. lm-eval:NAME runs a task of lm-eval (extra
    lm-eval), compared here.

    \b
    sftkit evaluate tasks --model base=MODEL --model sft=runs/b --tasks gsm8k,ifeval,humaneval -o runs/b
    sftkit evaluate tasks --model sft=runs/b --tasks gsm8k --samples 8 --train-data runs/a/curate/dataset.jsonl
    sftkit evaluate tasks --model base=MODEL --model sft=runs/b --tasks mine.jsonl,more.jsonl:numeric --ask chat
    sftkit evaluate tasks --model base=MODEL --model sft=runs/b --tasks mt_bench --judge org/name
    """
    chosen = parse_models(models)
    config = load_config(TasksConfig, merged(options, settings), str(settings or ""))
    from .benchmark import evaluate_tasks

    result = evaluate_tasks(chosen, [each.strip() for each in names.split(",") if each.strip()], out, config)
    click.echo(result.summary())


@evaluate.group(cls=Commands, short_help="The questions of tasks: list them, fetch others.")
def data() -> None:
    """The questions of tasks: which come along, and how to fetch others."""


@data.command("list")
def list_() -> None:
    """List the data sets of tasks with their licences, and say which are here.

    \b
    sftkit evaluate data list
    """
    from .task_data import table

    click.echo(table())


@data.command()
@click.argument("name")
@click.argument("source")
def get(name: str, source: str) -> None:
    """Keep the rows of SOURCE (a file, a folder, or a Hub data set ORG/NAME:SUBSET) as the data set NAME of a task.

    \b
    sftkit evaluate data get mmlu mmlu.jsonl.gz
    sftkit evaluate data get mmlu cais/mmlu:all
    """
    from .task_data import fetch_data

    path, rows = fetch_data(name, source)
    click.echo(f"{name}: {counted(rows, 'row')} in {path}")
