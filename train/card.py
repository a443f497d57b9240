"""The model card of a run: what the model began as, what it learned from and how, what came out, and how to make it again."""

import re
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..core.catalogue import CATALOGUE
from ..core.config import to_mapping
from ..core.files import read_json, read_json_lines, write_text
from ..core.models import ModelRef
from .config import PreferenceConfig, TrainConfig
from .data import DataReport

POINTS = 12  # lines of the table of losses
HUB_DATA = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
UNKNOWN = "its licence is not known here"


def write_card(room: Path, ref: ModelRef, data: str, report: DataReport, config: TrainConfig) -> None:
    """Write final/README.md in a train folder whose final model and results.json stand, with front matter as the Hub reads it."""
    entry = CATALOGUE.get(ref.name)
    hub_data = bool(HUB_DATA.fullmatch(data)) and not Path(data).exists()
    front = {
        "license": entry.licence.lower() if entry and re.fullmatch(r"[\w.-]+", entry.licence) else None,
        "base_model": ref.hub_id,
        "base_model_relation": "finetune" if ref.hub_id else None,
        "datasets": [data.partition(":")[0]] if hub_data else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo" if isinstance(config, PreferenceConfig) else "sft", "sftkit", *(["lora"] if config.adapter else [])],
    }
    results = read_json(room / "results.json")
    base = ref.name if ref.hub_id or entry else Path(ref.name).name
    text = f"""---
{yaml.safe_dump({key: value for key, value in front.items() if value is not None}, sort_keys=False, allow_unicode=True).strip()}
---

# {_cell(base)}, fine-tuned

{_cell(base)}{f" ({config.init})" if config.init else ""}, fine-tuned on {_learned(config)} {report.train_rows:,} conversations \
with sftkit {__version__}{_method(config)}. {report.trained_tokens:,} of {report.tokens:,} tokens an epoch were trained on: those of \
the assistant, each answer up to its `{report.end_of_turn}`.

## Data

| source | rows |
|---|---:|
{chr(10).join(f"| {_cell(name)} | {count:,} |" for name, count in report.sources.items())}

{report.validation_rows:,} of them were held out to validate on. {_left_out(report)}

## Results

{_results(results, config)}

{_curve(room / "metrics.jsonl")}

## How to make it again

`sftkit train {_command(config)} {data if hub_data else "DATA"} --model {base} -o RUN --config settings.yaml`, with the versions in the
run's `versions.json` and these settings:

```yaml
{yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True).strip()}
```

## Licence

- {_cell(base)}: {f"{entry.licence} ({entry.licence_url})" if entry else UNKNOWN}
{_data_licences(report)}

What was made of them is bound by the licences of the model and of the data; sftkit adds no terms of its own.
"""
    write_text(room / "final" / "README.md", text)


def _learned(config: TrainConfig) -> str:
    return "the better of two answers in" if isinstance(config, PreferenceConfig) else "the answers of"


def _command(config: TrainConfig) -> str:
    return "preference" if isinstance(config, PreferenceConfig) else "sft"


def _method(config: TrainConfig) -> str:
    if not config.adapter:
        return ""
    return f" by {'QLoRA' if config.qlora else 'LoRA'} of rank {config.lora_rank}, merged in"


def _left_out(report: DataReport) -> str:
    told = ", ".join(f"{_cell(rule)} {count:,}" for rule, count in report.rejected.items())
    return f"Left out: {told}; `train/ledger.parquet` of the run names them." if told else "No row was left out."


def _results(results: dict[str, Any], config: TrainConfig) -> str:
    steps = f"{results['steps']:,} steps of {config.batch_size} rows over {results['tokens']:,} tokens"
    lines = [f"- {steps}, prompts included; the highest learning rate was {config.rate:g}"]
    lines.append(f"- training loss {results['first_loss']:.4f} at first, {results['last_loss']:.4f} at last {_unit(results)}")
    if results["validation"]:
        lines.append(f"- validation loss {results['validation'][0]:.4f} before, {results['validation'][1]:.4f} after")
    if (right := results.get("preferred")) is not None:
        lines.append(f"- validation pairs: the better answer gained on the worse in {right:.1%}")
    if check := results.get("stop_check"):
        whose = "held-out" if check["held_out"] else "training"
        ended = f"{check['stopped']} of {check['prompts']} greedy answers to {whose} prompts ended"
        lines.append(f"- {ended} within {check['max_new_tokens']} tokens")
    return "\n".join(lines)


def _unit(results: dict[str, Any]) -> str:
    if results["loss"] not in ("nll", "dft"):
        return "(of a pair)"
    return "(nats a token of the answers" + (", each times its probability)" if results["loss"] == "dft" else ")")


def _curve(metrics: Path) -> str:
    """Return losses by step as a table of a few lines."""
    steps: dict[int, dict[str, float | None]] = {}
    for line in read_json_lines(metrics):
        steps.setdefault(line["step"], {}).update({key: line[key] for key in ("loss", "eval_loss") if key in line})
    places = sorted(steps)
    chosen = sorted({places[round(number * (len(places) - 1) / (POINTS - 1))] for number in range(POINTS)}) if places else []
    table = ["| step | training loss | validation loss |", "|---:|---:|---:|"]
    for step in chosen:
        cells = [f"{value:.4f}" if (value := steps[step].get(name)) is not None else "" for name in ("loss", "eval_loss")]
        table.append(f"| {step:,} | {cells[0]} | {cells[1]} |")
    return "\n".join(table)


def _data_licences(report: DataReport) -> str:
    rows = sum(report.sources.values()) - sum(report.licences.values())
    lines = [f"- {count:,} rows of the data: {_cell(name)}" for name, count in report.licences.items()]
    return "\n".join([*lines, *([f"- {rows:,} rows of the data say nothing of their licence"] if rows else [])])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
