"""The data-set card of a run: where its rows come from, what each step removed, and how to make it again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import yaml

from .. import __version__
from ..core.files import scan_parquet, write_text
from ..core.run import Run
from ..core.text import counted
from .rows import UNREADABLE

MOST_REASONS = 5  # of one rule, that a funnel names: the ledger has them all


def funnel(run: Run) -> list[tuple[str, int, int, dict[str, int]]]:
    """Return for each stage of a run: its name, rows in, rows kept, and the rows removed by each rule, most first.

    A rule with a reason behind it, as `error: timed out`, is counted with the others of its kind where they are many.
    """
    stages = []
    for (_, stage), part in run.ledger.summary().group_by(["step", "stage"], maintain_order=True):
        removed = part.filter(pl.col("action") != "kept").sort("rows", "rule", descending=[True, False])
        rules = few_rules(dict(zip(removed["rule"].to_list(), removed["rows"].to_list(), strict=True)))
        num_input = int(part["rows"].sum())
        stages.append((str(stage), num_input, num_input - sum(rules.values()), rules))
    return stages


def few_rules(rules: Mapping[str, int]) -> dict[str, int]:
    """Return rules with how many rows each removed, most first, those that have many reasons behind them, or one for each row, as one."""
    kinds = Counter(rule.partition(": ")[0] for rule in rules)
    told: Counter[str] = Counter()
    for rule, count in rules.items():
        kind = rule.partition(": ")[0]
        told[kind if kind == UNREADABLE or kinds[kind] > MOST_REASONS else rule] += count
    return dict(told.most_common())


def funnel_text(run: Run) -> str:
    """Write the funnel for a terminal, a line per stage."""
    lines = [("stage", "input", "kept", "rejected by rule")]
    for stage, num_input, kept, rules in funnel(run):
        told = ", ".join(f"{rule} {count:,}" for rule, count in rules.items())
        lines.append((stage, f"{num_input:,}", f"{kept:,}", told))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)


def write_card(run: Run, rows: pl.DataFrame, plots: Sequence[tuple[str, str]] = ()) -> None:
    """Write curate/README.md on the rows that are kept; `plots` are files beside it, with what they show."""
    config = run.config()
    prompts = rows["example_id"].n_unique()
    answers = counted(len(rows), "row") + ("" if prompts == len(rows) else f" of {counted(prompts, 'prompt')}")
    table = ["| stage | input | kept | rejected by rule |", "|---|---:|---:|---|"]
    for stage, num_input, kept, rules in funnel(run):
        told = ", ".join(f"{_cell(rule)} {count:,}" for rule, count in rules.items())
        table.append(f"| {stage} | {num_input:,} | {kept:,} | {told} |")
    steps = {name: settings for name, settings in config.items() if name in SECTIONS}
    text = f"""# {run.path.name}

{answers}, as messages, in `dataset.jsonl` and `dataset.parquet`. Made by sftkit {__version__}.

## Where the rows come from

{_sources(config, rows)}

## What each step did

{chr(10).join(table)}

`ledger.parquet` says of every row which rule removed it, by what score and threshold, and which kept row stands for it:
`sftkit curate why ID {run.path.name}` reads it.

{_contamination(run)}{_pictures(plots)}## How to make it again

`sftkit curate build DATA -o NEW --config {run.path.name}/config.yaml`, with the versions in `versions.json`. The settings were:

```yaml
{yaml.safe_dump(steps, sort_keys=False, allow_unicode=True).strip()}
```
"""
    write_text(run.room("curate") / "README.md", text)


SECTIONS = ("distill", "intake", "mix", "score", "best", "filter", "decontaminate", "dedup", "select", "embed", "heldout")


def _sources(config: dict[str, Any], rows: pl.DataFrame) -> str:
    files = (
        rows.select(pl.col("source").str.replace(r":\d+$", "").alias("file"))
        .group_by("file")
        .len()
        .sort("len", "file", descending=[True, False])
    )
    lines = [f"- {_cell(file or 'unknown')}: {counted(count, 'row')}" for file, count in files.head(20).iter_rows()]
    if len(files) > 20:
        lines.append(f"- and {len(files) - 20:,} more files")
    if "distill" in config:
        teacher = config["distill"]
        lines.append(f"- answers by the teacher `{teacher.get('teacher')}`, {teacher.get('k')} for each prompt")
    lines.append("\nThe licence of the sources, and of a teacher's output, is theirs.")
    return "\n".join(lines)


def _contamination(run: Run) -> str:
    """Say what the decontamination of a run found, where it was looked for."""
    path = run.path / "curate" / "contamination.parquet"
    if "decontaminate" not in run.ledger.stages() or not path.exists():
        return ""
    found = scan_parquet(path).group_by("benchmark").agg(pl.col("row").n_unique(), pl.col("item").n_unique(), pl.col("longest").max())
    looked = ", ".join(run.config().get("decontaminate", {}).get("benchmarks", []))
    lines = [
        f"| {_cell(name)} | {rows:,} | {items:,} | {longest:,} words |"
        for name, rows, items, longest in found.sort("row", "benchmark", descending=[True, False]).collect().iter_rows()
    ]
    if not lines:
        return f"## Benchmarks\n\nNo row holds an item of {looked}.\n\n"
    table = "\n".join(["| benchmark | rows removed | items | longest copied run |", "|---|---:|---:|---:|", *lines])
    return f"## Benchmarks\n\nLooked for: {looked}. `contamination.parquet` has what was found.\n\n{table}\n\n"


def _pictures(plots: Sequence[tuple[str, str]]) -> str:
    lines = [f"![{_cell(caption)}]({name})\n\n{caption}.\n" for name, caption in plots]
    return "## What the rows are like\n\n" + "\n".join(lines) + "\n" if lines else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
