"""The candidate rows of a run: read them, decide on them, write those that are left as the run's data set."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..core.errors import UserError
from ..core.example import Decision, Message, row_id
from ..core.files import write_atomically
from ..core.ledger import RowKey
from ..core.run import Run
from .card import write_card

log = logging.getLogger(__name__)

KEY = ["example_id", "sample_index"]
STORED = {  # rows.parquet (imported rows); prompts.parquet (of a distillation) has those that do not belong to an answer
    "example_id": pl.String,
    "sample_index": pl.Int32,  # null unless several answers were imported for one prompt
    "messages": pl.String,  # JSON text of the conversation, with the answer
    "reference": pl.String,
    "source": pl.String,
    "meta": pl.String,  # JSON text
    "finish_reason": pl.String,
    "num_tokens": pl.Int64,
    "logprob": pl.Float64,
}
SCHEMA = {**STORED, "prompt": pl.String, "response": pl.String}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage did: rows in, rows kept, and how many each rule removed."""

    stage: str
    num_input: int
    kept: pl.DataFrame
    removed: dict[str, int]  # by rule, most first
    notes: tuple[str, ...] = ()  # what else a person should know


def load_rows(run: Run, *, all: bool = False, before: str | None = None, after: str | None = None) -> pl.DataFrame:
    """Return the candidate rows that the newest stage kept, columns as in SCHEMA, in input order.

    `all` returns every candidate, kept or not; `after` those that the stage of this name kept; `before` what it has for
    its input, the rows that the stage before it kept. Raises UserError for a run without rows.
    """
    curate = run.path / "curate"
    if (curate / "rows.parquet").exists():
        rows = imported_rows(curate / "rows.parquet")
    elif (curate / "prompts.parquet").exists():
        rows = _distilled_rows(curate)
    else:
        raise UserError(f"{run.path}: has no rows yet; `sftkit curate distill` or `sftkit curate import` brings some")
    if all:
        return rows
    ledger = run.ledger.read()
    steps = dict(ledger.select("stage", "step").unique().iter_rows())
    if before in steps:
        ledger = ledger.filter(pl.col("step") < steps[before])
    if after is not None:
        ledger = ledger.filter(pl.col("step") <= steps[after])
    if ledger.is_empty():
        return rows
    newest = ledger.filter(pl.col("step") == pl.col("step").max())
    if (curate / "prompts.parquet").exists() and newest["stage"][0] == "prompts":
        raise UserError(f"{run.path}: the distillation has not finished; the same `sftkit curate distill` command finishes it")
    kept = newest.filter(pl.col("action") == "kept").select(KEY)
    return rows.join(kept, on=KEY, how="semi", nulls_equal=True, maintain_order="left")


def imported_rows(path: Path) -> pl.DataFrame:
    """Read a rows.parquet and add the texts of prompt and response."""
    stored = pl.read_parquet(path)
    columns = [pl.col(name).cast(kind) if name in stored.columns else pl.lit(None, kind).alias(name) for name, kind in STORED.items()]
    rows = stored.select(columns)
    texts = [split_texts(json.loads(messages)) for messages in rows["messages"]]
    return rows.with_columns(
        pl.Series("prompt", [prompt for prompt, _ in texts], pl.String),
        pl.Series("response", [response for _, response in texts], pl.String),
    )


def _distilled_rows(curate: Path) -> pl.DataFrame:
    from ..core.store import SampleStore

    prompts = pl.read_parquet(curate / "prompts.parquet").with_row_index("order")
    conversations = [json.loads(messages) for messages in prompts["messages"]]
    prompts = prompts.with_columns(pl.Series("prompt", [_text(each) for each in conversations], pl.String))
    if not (curate / "samples.sqlite").exists():
        return pl.DataFrame(schema=SCHEMA)
    with SampleStore(curate / "samples.sqlite") as store:
        samples = store.frame().select("example_id", "sample_index", "text", "finish_reason", "num_tokens", "logprob")
    # asked again because it was cut, an answer is there twice: the one that is whole counts, or the longer
    samples = samples.sort(pl.col("finish_reason") == "length", -pl.col("num_tokens")).unique(KEY, keep="first", maintain_order=True)
    rows = prompts.join(samples, on="example_id").sort("order", "sample_index")
    answered = [
        _json([*conversations[order], {"role": "assistant", "content": text}])
        for order, text in zip(rows["order"], rows["text"], strict=True)
    ]
    rows = rows.with_columns(pl.Series("messages", answered, pl.String), pl.col("text").alias("response"))
    return rows.select([pl.col(name).cast(kind) for name, kind in SCHEMA.items()])


def split_texts(messages: Sequence[Message]) -> tuple[str, str | None]:
    """Return the text of everything before the final answer, and the answer's own; None where the conversation has none."""
    if messages and messages[-1].get("role") == "assistant":
        return _text(messages[:-1]), message_text(messages[-1])
    return _text(messages), None


def message_text(message: Message) -> str:
    """Return the text of one turn. Tool calls are written out; a part that is no text stands as its type and hash."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [str(content)]
    texts = [part if isinstance(part, str) else _part_text(part) for part in parts]
    if message.get("tool_calls"):
        texts.append(json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True))
    return "\n".join(texts)


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    digest = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
    return f"[{part.get('type', 'part') if isinstance(part, dict) else 'part'} {digest}]"


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message_text(message) for message in messages)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def keys(rows: pl.DataFrame) -> list[RowKey]:
    """Return (example_id, sample_index) of each row."""
    return list(zip(rows["example_id"].to_list(), rows["sample_index"].to_list(), strict=True))


def row_ids(rows: pl.DataFrame) -> list[str]:
    """Return how each row is written for people and as a witness."""
    return [row_id(*key) for key in keys(rows)]


def input_rows(run: Run, stage: str) -> pl.DataFrame:
    """Return what a stage has to decide on. Raises UserError when nothing is left for it."""
    rows = load_rows(run, before=stage)
    if rows.is_empty():
        raise UserError(f"{run.path}: no row is left to decide on{_what_removed_most(run, stage)}")
    return rows


def _what_removed_most(run: Run, stage: str) -> str:
    summary = run.ledger.summary().filter(pl.col("action") != "kept")
    mine = summary.filter(pl.col("stage") == stage)
    earlier = summary if mine.is_empty() else summary.filter(pl.col("step") < mine["step"][0])
    if earlier.is_empty():
        return ""
    most = earlier.sort("rows")[-1]
    return (
        f": stage {most['stage'].item()} removed {most['rows'].item():,} by its rule {most['rule'].item()!r}; loosen that and run it again"
    )


def record(
    run: Run, stage: str, rows: pl.DataFrame | Sequence[RowKey], decisions: Iterable[Decision], notes: Sequence[str] = ()
) -> Outcome:
    """Enter a stage's decisions on its input `rows` in the ledger and make the kept rows the run's data set.

    Says which later stages became void; decisions that stand there already make none void.
    Raises ConservationError unless every input row has exactly one decision.
    """
    decided = list(decisions)
    if run.ledger.holds(stage, decided):
        left = load_rows(run, after=stage)
    else:
        void = run.ledger.record(stage, keys(rows) if isinstance(rows, pl.DataFrame) else rows, decided)
        if void:
            log.info(
                "%s: %s stood on the former rows and %s void now: run again", stage, ", ".join(void), "is" if len(void) == 1 else "are"
            )
        left = load_rows(run)
    if run.ledger.stages()[-1] == stage:
        write_dataset(left, run.room("curate"))
        write_card(run, left)
    removed = Counter(d.rule for d in decided if d.action != "kept")
    if left.is_empty() and decided:
        rule, count = removed.most_common(1)[0]
        log.warning("%s kept none of %s rows; the rule %r alone removed %s", stage, f"{len(decided):,}", rule, f"{count:,}")
    return Outcome(stage, len(decided), left, dict(removed.most_common()), tuple(notes))


def write_dataset(rows: pl.DataFrame, folder: Path) -> None:
    """Write rows as dataset.jsonl and dataset.parquet: id (as `row_id`), messages, source, meta.

    In the Parquet file `messages` is a list of {role, content}. Where a turn holds more than two texts (tool calls, names,
    parts), the column `extra` has the JSON text of the whole conversation and the content is the turn's text.
    """
    export_rows(rows, folder / "dataset.jsonl")
    turns, extra = [], []
    for text in rows["messages"]:
        messages = json.loads(text)
        simple = all(set(each) == {"role", "content"} and isinstance(each["content"], str) for each in messages)
        turns.append([{"role": each["role"], "content": message_text(each)} for each in messages])
        extra.append(None if simple else text)
    message_type = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    columns = [
        pl.Series("id", row_ids(rows), pl.String),
        rows["example_id"],
        rows["sample_index"],
        pl.Series("messages", turns, message_type),
        rows["source"],
        rows["meta"],
    ]
    if any(each is not None for each in extra):
        columns.append(pl.Series("extra", extra, pl.String))
    with write_atomically(folder / "dataset.parquet") as temporary:
        pl.DataFrame(columns).write_parquet(temporary)


def export_rows(rows: pl.DataFrame, path: Path) -> None:
    """Write rows as JSONL, one conversation a line: {"id": …, "messages": […], "source": …, "meta": {…}}."""
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name, messages, source, meta in zip(row_ids(rows), rows["messages"], rows["source"], rows["meta"], strict=True):
            file.write(f'{{"id": {_json(name)}, "messages": {messages}, "source": {_json(source)}, "meta": {meta or "{}"}}}\n')
