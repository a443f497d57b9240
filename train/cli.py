"""The commands of `sftkit train`."""

from pathlib import Path
from typing import Any, TypeVar

import click

from ..core.cli import Commands, config_option, given
from ..core.config import load_config, read_yaml
from .config import RECIPES, PreferenceConfig, TrainConfig, recipe_settings

T = TypeVar("T")


def _settings(kind: type[T], file: Path | None, options: dict[str, Any], base: dict[str, Any] | None = None) -> T:
    """Load a command's settings: options win over the file, and this over the base."""
    return load_config(kind, {**(base or {}), **(read_yaml(file) if file else {}), **given(options)}, str(file or ""))


def _sources(data: tuple[str, ...]) -> str | list[str]:
    """Return one source as it is, several as a mixture."""
    return data[0] if len(data) == 1 else list(data)


def _check_there(data: tuple[str, ...], model: str, revision: str | None) -> None:
    """Raise UserError for a model or data that is not there, before imports that take seconds."""
    from ..core.models import resolve_model
    from ..core.sources import find_source
    from .mixture import parse_mixture

    resolve_model(model, revision=revision)
    for source in data if len(data) == 1 else (name for name, _ in parse_mixture(data)):
        if source != "-":
            find_source(source)


@click.group(cls=Commands)
def train() -> None:
    """Fine-tune a model, and look at what it is trained on."""


@train.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--model", required=True, help="The model to begin with: a folder, a Hub id, a .gguf file, a run, a catalogue name.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="A named set of settings; options and --config win over it.")
@config_option(TrainConfig, "lora")
@config_option(TrainConfig, "qlora")
@config_option(TrainConfig, "epochs")
@config_option(TrainConfig, "learning_rate")
@config_option(TrainConfig, "batch_size")
@config_option(TrainConfig, "batch_tokens")
@config_option(TrainConfig, "max_length")
@config_option(TrainConfig, "limit")
@config_option(TrainConfig, "train_on")
@config_option(TrainConfig, "mask_thinking")
@config_option(TrainConfig, "mask_tool_calls")
@config_option(TrainConfig, "init")
@config_option(TrainConfig, "loss")
@config_option(TrainConfig, "neftune")
@config_option(TrainConfig, "weight_by")
@config_option(TrainConfig, "curriculum")
@config_option(TrainConfig, "max_hours")
@config_option(TrainConfig, "trackers", "--tracker")
@config_option(TrainConfig, "gpus")
@config_option(TrainConfig, "parallel")
@config_option(TrainConfig, "auto")
@config_option(TrainConfig, "memory_gb")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file with all settings; options win over it.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def sft(
    data: tuple[str, ...], model: str, out: Path, recipe: str | None, settings: Path | None, revision: str | None, **options: Any
) -> None:
    """Fine-tune MODEL on DATA, a run or a data file: the loss is on the assistant's tokens only. Several, each with its share: a mixture.

    Stopped at any time, the same command goes on from the last checkpoint. The final model is in RUN/train/final. A row that cannot be read
    ends it before it begins; `sftkit curate import` makes a run without such rows, up to its --max-failed, and records each.

    \b
    sftkit train sft runs/a --model smollm2-135m-instruct -o runs/b
    sftkit train sft chats.jsonl --model org/name -o runs/c --lora --epochs 3
    sftkit train sft chats.jsonl --model org/name -o runs/d --recipe classic       lr 8e-5, 1 epoch, 8 rows a step
    sftkit train sft a.jsonl:0.7 b.jsonl:0.3 --model org/name -o runs/f              seven rows of a to three of b
    sftkit train sft chats.jsonl --model org/name -o runs/e --max-hours 11.5       for notebooks that end after 12
    """
    from ..core.hardware import pick_device

    _check_there(data, model, revision)
    base = recipe_settings(recipe, gpu=pick_device() != "cpu") if recipe else {}
    config = _settings(TrainConfig, settings, options, base)
    if "limit" in base and config.limit == base["limit"] and "limit" not in given(options):
        click.echo(f"recipe {recipe}: only the first {config.limit} rows, as this machine has no GPU; --limit says otherwise", err=True)
    from .sft import train as run_training

    click.echo(run_training(_sources(data), model, out, config, revision=revision).summary())


@train.command()
@click.argument("data")
@click.option("--model", required=True, help="The model to begin with, best one that was fine-tuned: a folder, a run, a Hub id, …")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Run folder, made if needed; the same one goes on.")
@config_option(PreferenceConfig, "beta")
@config_option(PreferenceConfig, "objective")
@config_option(PreferenceConfig, "lora")
@config_option(PreferenceConfig, "epochs")
@click.option("--learning-rate", type=float, help="Highest learning rate, at most 1; 1e-6, with LoRA 1e-5, when not given.")
@config_option(PreferenceConfig, "batch_size")
@config_option(PreferenceConfig, "batch_tokens")
@config_option(PreferenceConfig, "max_length")
@config_option(PreferenceConfig, "limit")
@config_option(PreferenceConfig, "max_hours")
@config_option(PreferenceConfig, "gpus")
@config_option(PreferenceConfig, "parallel")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file with all settings; options win over it.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def preference(data: str, model: str, out: Path, settings: Path | None, revision: str | None, **options: Any) -> None:
    """Teach MODEL which of two answers is the better one (DPO). DATA has the columns prompt, chosen and rejected.

    Rendered, masked, reported, resumed, saved and checked as by `train sft`. The final model is in RUN/train/final.

    \b
    sftkit train preference pairs.jsonl --model runs/b -o runs/p
    sftkit train preference pairs.jsonl --model org/name -o runs/p --lora --beta 0.05
    """
    _check_there((data,), model, revision)
    config = _settings(PreferenceConfig, settings, options)
    from .sft import train as run_training

    click.echo(run_training(data, model, out, config, revision=revision).summary())


@train.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--model", required=True, help="The model whose tokenizer and template are used.")
@click.option("-n", "--rows", type=click.IntRange(min=0), default=3, show_default=True, help="Rows to show.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write this HTML file too, of 20 rows or more.")
@config_option(TrainConfig, "train_on")
@config_option(TrainConfig, "mask_thinking")
@config_option(TrainConfig, "mask_tool_calls")
@config_option(TrainConfig, "max_length")
@config_option(TrainConfig, "limit")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def preview(data: tuple[str, ...], model: str, rows: int, html_path: Path | None, revision: str | None, **options: Any) -> None:
    """Show which tokens of DATA are trained on, and the report over all its rows, of a mixture too. Nothing is trained.

    \b
    sftkit train preview runs/a --model smollm2-135m-instruct
    sftkit train preview chats.jsonl --model org/name -n 10 --html preview.html --train-on last
    sftkit train preview a.jsonl:0.7 b.jsonl:0.3 --model org/name
    """
    _check_there(data, model, revision)
    from .preview import preview as show

    show(_sources(data), model, load_config(TrainConfig, given(options)), limit=rows, html_path=html_path, revision=revision)


@train.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--model", required=True, help="The model that every run begins with.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the runs; the same one goes on.")
@click.option("--vary", multiple=True, required=True, help="NAME=VALUE,VALUE,…: a setting and what to try; several: all combinations.")
@config_option(TrainConfig, "lora")
@config_option(TrainConfig, "epochs")
@config_option(TrainConfig, "max_length")
@config_option(TrainConfig, "limit")
@config_option(TrainConfig, "validation")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file with the settings that all runs share.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def sweep(
    data: tuple[str, ...], model: str, out: Path, vary: tuple[str, ...], settings: Path | None, revision: str | None, **options: Any
) -> None:
    """Compare settings: train MODEL on DATA once for each, on the same rows, and compare the losses on held-out rows.

    \b
    sftkit train sweep chats.jsonl --model org/name -o sweeps/a --vary learning_rate=1e-5,2e-5,5e-5
    sftkit train sweep chats.jsonl --model org/name -o sweeps/b --lora --vary lora_rank=8,32 --vary learning_rate=1e-4,4e-4
    """
    _check_there(data, model, revision)
    from .sweep import parse_variations
    from .sweep import sweep as run_sweep

    variations = parse_variations(vary)
    config = _settings(TrainConfig, settings, options)
    click.echo(run_sweep(_sources(data), model, out, config, variations, revision=revision).summary())


@train.command()
@click.argument("data", nargs=-1)
@click.option("--data", "named", multiple=True, help="The same as DATA.")
@click.option("--model", required=True, help="The model to begin with.")
@click.option("--gpu", "cards", multiple=True, help="A card to plan for, or several: T4, A100, 'RTX 3080', …, or its memory, as 24GB;"
              " this machine's without.")  # fmt: skip
@config_option(TrainConfig, "epochs")
@config_option(TrainConfig, "batch_size")
@config_option(TrainConfig, "max_length")
@config_option(TrainConfig, "limit")
@config_option(TrainConfig, "gpus")
@config_option(TrainConfig, "memory_gb")
@click.option("--config", "settings", type=click.Path(path_type=Path), help="YAML file with all settings; options win over it.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def plan(
    data: tuple[str, ...],
    named: tuple[str, ...],
    model: str,
    cards: tuple[str, ...],
    settings: Path | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Say what training MODEL on DATA takes on a graphics card: what fits, how fast, how long. Nothing is trained.

    Full fine-tuning, LoRA and QLoRA, with and without activations computed twice, at three sizes of a forward pass. With --gpus, what each
    of several takes: with the whole model on each, and sharing it (fsdp).

    \b
    sftkit train plan chats.jsonl --model smollm2-135m-instruct --gpu T4
    sftkit train plan --data chats.jsonl --model org/name --gpu "RTX 3080" --gpu A100
    sftkit train plan runs/a --model org/name --gpu 24GB --batch-size 64
    """
    if bool(data) == bool(named):
        raise click.UsageError("give the data once: as DATA or with --data")
    _check_there(data or named, model, revision)
    config = _settings(TrainConfig, settings, options)
    from .plan import plans

    found = plans(_sources(data or named), model, config, gpus=cards, revision=revision)
    click.echo("\n\n".join(each.summary() for each in found))


@train.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", help="The unquantised model to merge into; the one that the adapter names, when not given.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="A new folder for the model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Number format; the base's, when not given.")
@click.option("--revision", help="Branch, tag or commit of a Hub base.")
def merge(adapter: Path, base: str | None, out: Path, dtype: str | None, revision: str | None) -> None:
    """Merge ADAPTER, a folder or the run that trained it, into its base: a whole model, which loads like any other.

    Refused where the merged model does not say the same as base and adapter apart (KL above 1e-3 nats a token), with the figure.
    `train sft` merges too, and refuses no such model: it says so, saves it as train/final and keeps the adapter in train/adapter.

    \b
    sftkit train merge runs/b -o models/mine
    sftkit train merge adapters/a --base org/name -o models/mine --dtype bfloat16
    """
    from .merge import merge as run_merge

    click.echo(run_merge(adapter, out, base=base, dtype=dtype, revision=revision).summary())


@train.command()
@click.argument("model")
@click.option("--gguf", type=click.Path(path_type=Path), required=True, help="The file to write, as model.gguf.")
@click.option("--format", type=click.Choice(["f16", "f32"]), default="f16", show_default=True, help="Number format of the weights.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
def export(model: str, gguf: Path, format: str, revision: str | None) -> None:
    """Write MODEL, a folder or a run, as one GGUF file for llama.cpp. Llama, Qwen2 and Qwen3 models with byte-level tokenizers.

    The file is loaded again, and its logits are held against the model's before it counts as written.

    \b
    sftkit train export runs/b --gguf models/mine.gguf
    """
    from .export import export_gguf

    click.echo(export_gguf(model, gguf, format=format, revision=revision).summary())
