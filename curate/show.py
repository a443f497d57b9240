"""Show rows of a run or a data file in the terminal, and why a row stayed or left."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from ..core.errors import UserError
from ..core.example import Message, row_id
from ..core.files import read_json_lines, scan_parquet
from ..core.formats import iterate_examples
from ..core.ledger import Ledger
from ..core.run import Run
from ..core.text import shortened, visible
from .card import few_rules
from .rows import KEY, keys, load_rows, message_text
from .score import known_scores, read_score

log = logging.getLogger(__name__)

ROLE_STYLES = {"system": "dim", "user": "bold", "assistant": "green", "tool": "cyan"}


@dataclass(frozen=True, slots=True)
class Shown:
    """One row as it is shown."""

    name: str
    messages: Sequence[Message]
    facts: Sequence[str] = ()  # lines below the conversation


def show(
    source: str | Path, *, limit: int = 5, wanted: str | None = None, rejected: str | None = None, console: Console | None = None
) -> int:
    """Print rows of a run (those that are kept; with `rejected` those that a rule removed) or of a data file; return how many.

    `wanted` is an id, the beginning of one, ID/INDEX, or what the row's file calls it. Control characters in the data are shown,
    never sent.
    """
    if rejected and not is_run(source):
        raise UserError(f"{source}: is no run, so nothing was rejected in it")
    if is_run(source) and not rejected and _grown_path(Path(source)).exists():
        source = _grown_path(Path(source))
    if wanted and is_run(source):
        wanted = _by_own_id(Run.open(Path(source)), wanted)
    shown = list(_of_run(Run.open(Path(source)), limit, wanted, rejected) if is_run(source) else _of_file(source, limit, wanted))
    if wanted and not shown:
        raise UserError(f"{source}: no row {wanted!r}; the ids stand in its ledger and data set")
    if not shown and is_run(source):
        rules = Run.open(Path(source)).ledger.summary().filter(pl.col("action") != "kept").sort("rows", descending=True)["rule"]
        named = ", ".join(few_rules(dict.fromkeys(rules, 1))) or "none"
        log.warning("%s: no row is left to show; --rejected RULE shows what a rule removed: %s", source, named)
    console = console or Console()
    for row in shown:
        console.print(_panel(row))
    return len(shown)


def why(run: Run, wanted: str, *, console: Console | None = None) -> None:
    """Print every decision on a row, in order, those of its training too. Raises UserError for an id that no stage saw.

    A row is known by the id that its file gave it, too (column `id`), and a prompt that a teacher has written by its own id, beside
    that of the answer that it stood in.
    """
    wanted = _by_own_id(run, wanted)
    written = _grown(run)
    grown = next((each for each in written if each["id"].startswith(wanted)), None)
    if grown is not None:
        wanted = grown["meta"].get("answer") or grown["meta"]["parents"][0]
    ledgers = [ledger for ledger in (run.ledger, Ledger(run.path / "train" / "ledger.parquet")) if ledger.path.exists()] or [run.ledger]
    decisions = pl.concat([ledgers[0].why(wanted), *(ledger.about(wanted) for ledger in ledgers[1:])])
    witnesses = decisions["witness_id"].drop_nulls().to_list()
    texts = _prompts(run, [*decisions["example_id"], *witnesses, *([] if grown is None else [grown["id"]])], written)
    console = console or Console()
    first = decisions["example_id"][0] if grown is None else grown["id"]
    console.print(Text(f"{first}: {shortened(texts.get(first, ''), 200)}"), soft_wrap=True)
    several = decisions.select(KEY).n_unique() > 1  # samples of one prompt
    cells = [_decided(row, several=several) for row in decisions.iter_rows(named=True)]
    widths = [max(len(each[column]) for each in cells) for column in range(len(cells[0]))]
    for row, each in zip(decisions.iter_rows(named=True), cells, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True)).rstrip()
        console.print(Text(visible(f"  {line}"), style="" if row["action"] == "kept" else "yellow"), soft_wrap=True)
        if row["witness_id"] is not None:  # whole, as it is what one asks about next
            told = shortened(texts.get(row["witness_id"].split("/")[0], ""))
            what = "it comes from" if (row["stage"], row["action"]) == ("grow", "kept") else "for it stands"
            console.print(Text(visible(f"      {what} {row['witness_id']}{told and f': {told}'}")), soft_wrap=True)


def _decided(row: Mapping[str, Any], *, several: bool) -> list[str]:
    """Return what a decision says, to be written in columns."""
    numbers = [f"{name} {row[name]:.6g}" for name in ("score", "threshold") if row[name] is not None]
    names = [row_id(row["example_id"], row["sample_index"])] if several else []
    return [*names, row["stage"], row["action"], row["rule"], ", ".join(numbers)]


def is_run(source: str | Path) -> bool:
    """Say whether this is a run folder."""
    return (Path(source) / "config.yaml").exists()


def find_run(path: Path | None) -> Run:
    """Open a run; without a path the current folder, if it is one, else the newest in runs/, which is said aloud."""
    if path is not None:
        return Run.open(path)
    if is_run("."):
        return Run.open(Path("."))
    runs = [each for each in Path("runs").glob("*") if (each / "ledger.parquet").exists()]
    if not runs:
        raise UserError("say which run: `sftkit curate why ID RUN`")
    return Run.open(max(runs, key=lambda each: (each / "ledger.parquet").stat().st_mtime))


def _by_own_id(run: Run, wanted: str) -> str:
    """Return our id of the row that its file called `wanted` (its column `id`, kept in meta); `wanted` where no row was called so.

    Raises UserError where several were.
    """
    curate = run.path / "curate"
    stored = next((path for path in (curate / "rows.parquet", curate / "prompts.parquet") if path.exists()), None)
    if stored is None:
        return wanted
    name, slash, index = wanted.partition("/")
    within = {json.dumps(each, ensure_ascii=ascii)[1:-1] for each in (wanted, name) for ascii in (True, False)}
    may_be = scan_parquet(stored).filter(pl.col("meta").str.contains_any(sorted(within))).select("example_id", "meta")
    called = may_be.collect(engine="streaming").select("example_id", own=pl.col("meta").str.json_path_match("$.id"))  # of few rows
    for own, place in ((wanted, ""), (name, slash + index)):  # a file's id may hold a / of its own
        found = called.filter(own=own)["example_id"].unique().sort()
        if len(found) > 1:
            raise UserError(f"{run.path}: {len(found):,} rows are called {own!r} by their files: give one of our ids, as {found[0]}")
        if len(found):
            return f"{found[0]}{place}"
    return wanted


def _of_run(run: Run, limit: int, wanted: str | None, rejected: str | None) -> list[Shown]:
    if rejected is not None:
        rows, told = _rejected(run, rejected, None if wanted else limit)
    else:
        rows, told = load_rows(run, all=wanted is not None), {}
    if wanted is not None:
        example_id, _, index = wanted.partition("/")
        rows = rows.filter(pl.col("example_id").str.starts_with(example_id))
        if index:
            rows = rows.filter(pl.col("sample_index").cast(pl.String) == index)
    else:
        rows = rows.head(limit)
    scores = {name: read_score(run, rows, name)["value"].to_list() for name in known_scores(run)}
    shown = []
    columns = ["messages", "reference", "source", "finish_reason", "num_tokens", "logprob"]
    for place, (key, values) in enumerate(zip(keys(rows), rows.select(columns).iter_rows(named=True), strict=True)):
        facts = [f"{name} {_number(column[place])}" for name, column in scores.items()]
        facts += [f"{name} {values[name]}" for name in ("finish_reason", "num_tokens") if values[name] is not None]
        facts += [f"logprob {values['logprob']:.4g}"] if values["logprob"] is not None and "logprob" not in scores else []
        lines = [*told.get(row_id(*key), []), ", ".join(facts), f"from {values['source']}" if values["source"] else ""]
        if values["reference"]:
            lines.insert(0, f"reference: {shortened(values['reference'], 300)}")
        shown.append(Shown(row_id(*key), json.loads(values["messages"]), [line for line in lines if line]))
    names = {each.name for each in shown}
    others = [name for name in told if name not in names and name.startswith(wanted or "")]  # without an answer, or never read
    texts = _prompts(run, others, _grown(run)) if others else {}
    asked = {name: texts.get(name.split("/")[0]) for name in others}
    return shown + [Shown(name, [{"role": "user", "content": text}] if text else [], told[name]) for name, text in asked.items()]


def _rejected(run: Run, rule: str, limit: int | None) -> tuple[pl.DataFrame, dict[str, list[str]]]:
    removed = run.ledger.scan().filter(pl.col("action") != "kept")
    found = removed.filter((pl.col("rule") == rule) | pl.col("rule").str.starts_with(f"{rule}:")).collect(engine="streaming")
    if found.is_empty():
        rules = removed.select(pl.col("rule").unique()).collect(engine="streaming")["rule"].to_list()
        told = f"its rules were {', '.join(sorted(few_rules(dict.fromkeys(rules, 1))))}" if rules else "it has rejected nothing"
        raise UserError(f"{run.path}: no row was rejected by {rule!r}; {told}")
    every = load_rows(run, all=True)
    rows = every.join(found.select(KEY), on=KEY, how="semi", nulls_equal=True, maintain_order="left")
    if limit is not None:
        rows = rows.head(limit)
        beside = found.join(every.select(KEY), on=KEY, how="anti", nulls_equal=True, maintain_order="left")  # that could not be read
        found = found.join(rows.select(KEY), on=KEY, how="semi", nulls_equal=True, maintain_order="left")
        found = pl.concat([found, beside.head(limit - len(rows))])
    texts = _prompts(run, found["witness_id"].drop_nulls().to_list(), _grown(run))
    reasons = {}
    for row in found.iter_rows(named=True):
        numbers = "".join(f", {name} {row[name]:.6g}" for name in ("score", "threshold") if row[name] is not None)
        lines = [f"{row['action']} by {row['rule']} in {row['stage']}{numbers}"]
        if row["witness_id"]:
            lines.append(f"witness {row['witness_id']}: {shortened(texts.get(row['witness_id'].split('/')[0], ''), 200)}")
        reasons[row_id(row["example_id"], row["sample_index"])] = lines
    return rows, reasons


def _of_file(source: str | Path, limit: int, wanted: str | None) -> list[Shown]:
    rows = (each for each in iterate_examples(source) if wanted is None or each.id.startswith(wanted) or str(each.meta.get("id")) == wanted)
    return [
        Shown(example.id, example.messages, [f"from {example.source}", *_meta(example.meta)])
        for example in islice(rows, None if wanted else limit)
    ]


def _meta(meta: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {shortened(str(value), 200)}" for name, value in meta.items()]


def _prompts(run: Run, names: Sequence[str], written: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the first text of the user's of the rows of these names, by example id; a file's own witnesses have none.

    `written` are the prompts of a run that has grown (`_grown`).
    """
    if _grown_path(run.path).exists():
        return {each["id"]: message_text(each["messages"][0]) for each in written}
    curate = run.path / "curate"
    path = curate / ("rows.parquet" if (curate / "rows.parquet").exists() else "prompts.parquet")
    wanted = list({name.split("/")[0] for name in names})
    found = scan_parquet(path).filter(pl.col("example_id").is_in(wanted)).select("example_id", "messages")
    texts = {}
    for example_id, messages in found.unique("example_id").collect(engine="streaming").iter_rows():
        users = [message for message in json.loads(messages) if message.get("role") == "user"]
        texts[example_id] = message_text(users[0]) if users else ""
    return texts


def _grown_path(run: Path) -> Path:
    return run / "curate" / "prompts.jsonl"


def _grown(run: Run) -> list[dict[str, Any]]:
    """Return the prompts that `sftkit curate prompts` has written into a run, none in another run."""
    return read_json_lines(_grown_path(run.path))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _panel(row: Shown) -> Panel:
    parts: list[RenderableType] = []
    for message in row.messages:
        role = str(message.get("role", ""))
        parts.append(Text.assemble((f"{visible(role)}: ", "bold magenta"), (visible(message_text(message)), ROLE_STYLES.get(role, ""))))
    if row.facts:
        parts.append(Text("\n".join(visible(line) for line in row.facts), style="dim"))
    return Panel(Group(*parts), title=Text(visible(row.name)), title_align="left", box=box.ROUNDED)
