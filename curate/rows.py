"""The candidate rows of a run: read them, and write some as a data set."""

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ..core.errors import UserError
from ..core.example import Message, row_id
from ..core.files import scan_parquet, write_atomically
from ..core.ledger import KEY as KEY
from ..core.ledger import RowKey
from ..core.reasoning import CLOSE, OPEN
from ..core.run import Run
from .turns import TURNS, plain_answers, plain_turns

log = logging.getLogger(__name__)

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
UNREADABLE = "unreadable"  # the rule of rows that cannot be read; the reason follows it, with the row's place
SCHEMA = {**STORED, "prompt": pl.String, "response": pl.String}


ESCAPED = {chr(code): json.dumps(chr(code))[1:-1] for code in (*range(32), 34, 92)}  # what JSON writes otherwise in a text


def load_rows(
    run: Run, *, all: bool = False, before: str | None = None, after: str | None = None, columns: Sequence[str] = tuple(SCHEMA)
) -> pl.DataFrame:
    """Return the candidate rows that the newest stage kept, `columns` of SCHEMA, in input order.

    `all` returns every candidate, kept or not; `after` those that the stage of this name kept; `before` what it has for
    its input, the rows that the stage before it kept. The texts of prompt and response are read out of the conversations
    only where they are asked for. Raises UserError for a run without rows.
    """
    return scan_rows(run, all=all, before=before, after=after, columns=columns).collect(engine="streaming")


def scan_rows(
    run: Run, *, all: bool = False, before: str | None = None, after: str | None = None, columns: Sequence[str] = tuple(SCHEMA)
) -> pl.LazyFrame:
    """Return what `load_rows` does as a plan: written to a file, its rows are never in memory together."""
    curate = run.path / "curate"
    if (curate / "rows.parquet").exists():
        rows = _imported(curate / "rows.parquet", columns)
    elif (curate / "prompts.parquet").exists():
        rows = _distilled(curate, columns)
    else:
        raise UserError(f"{run.path}: has no rows yet; `sftkit curate distill` or `sftkit curate import` brings some")
    if all:
        return rows.select(columns)
    steps = run.ledger.steps()
    known = [name for name in steps if before not in steps or steps[name] < steps[before]]
    known = [name for name in known if after is None or steps[name] <= steps[after]]
    if not known:
        return rows.select(columns)
    if (curate / "prompts.parquet").exists() and known[-1] == "prompts":
        raise UserError(f"{run.path}: the distillation has not finished; the same `sftkit curate distill` command finishes it")
    kept = run.ledger.scan().filter((pl.col("stage") == known[-1]) & (pl.col("action") == "kept")).select(KEY)
    return rows.join(kept, on=KEY, how="semi", nulls_equal=True, maintain_order="left").select(columns)


def _imported(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    """Return the rows of a rows.parquet, with the texts of prompt and response if they are among the columns."""
    stored = scan_parquet(path)
    there = stored.collect_schema()
    own = [name for name in STORED if name in (*columns, *KEY) or name == "messages"]
    rows = stored.select([pl.col(name).cast(STORED[name]) if name in there else pl.lit(None, STORED[name]).alias(name) for name in own])
    if not {"prompt", "response"} & set(columns):
        return rows
    names = [name for name in TEXT if name in columns]
    kind = pl.Struct(dict.fromkeys(names, pl.String))
    texts = pl.col("messages").map_batches(functools.partial(text_columns, names=names), return_dtype=kind, is_elementwise=True)
    return rows.with_columns(texts.alias("texts")).unnest("texts").select(*(name for name in own if name in columns or name in KEY), *names)


def _distilled(curate: Path, columns: Sequence[str]) -> pl.LazyFrame:
    from ..core.store import SampleStore

    if not (curate / "samples.sqlite").exists():
        return pl.LazyFrame(schema=SCHEMA)
    asked = scan_parquet(curate / "prompts.parquet").with_row_index("order")
    if "prompt" in columns:
        asked = asked.with_columns(pl.col("messages").map_batches(all_text, return_dtype=pl.String, is_elementwise=True).alias("prompt"))
    with SampleStore(curate / "samples.sqlite", made=True) as store:
        samples = store.frame().select("example_id", "sample_index", "text", "finish_reason", "num_tokens", "logprob", "reasoning")
    # asked again because it was cut, an answer is there twice: the one that is whole counts, or the longer
    samples = samples.sort(pl.col("finish_reason") == "length", -pl.col("num_tokens")).unique(KEY, keep="first", maintain_order=True)
    rows = asked.join(samples.lazy(), on="example_id").sort("order", "sample_index")
    said = pl.col("text")
    if Run.open(curate.parent).config().get("distill", {}).get("reasoning") == "inline":
        thought = pl.concat_str(pl.lit(f"{OPEN}\n"), "reasoning", pl.lit(f"\n{CLOSE}\n\n"), "text")
        said = pl.when(pl.col("reasoning").is_null()).then(said).otherwise(thought)
    answer = pl.concat_str(pl.lit(', {"role": "assistant", "content": '), json_text(said), pl.lit("}]"))
    rows = rows.with_columns(pl.col("messages").str.head(-1) + answer, pl.col("text").alias("response"))
    return rows.select([pl.col(name).cast(kind) for name, kind in SCHEMA.items() if name != "prompt" or "prompt" in columns])


TEXT = ("prompt", "response")


def text_columns(messages: pl.Series, names: Sequence[str] = TEXT) -> pl.Series:
    """Return what `split_texts` says of each conversation, given as JSON text, as a column of prompt and response, or one of them."""

    def other(text: str) -> dict[str, str | None]:
        both = dict(zip(TEXT, split_texts(json.loads(text)), strict=True))
        return {name: both[name] for name in names}

    kind = pl.Struct(dict.fromkeys(names, pl.String))
    if list(names) == ["response"]:
        answers, told = plain_answers(messages)
        return _with_others(messages, told, answers.alias("response").to_frame().to_struct(messages.name), kind, other)
    turns, contents = pl.col("turns"), pl.col("turns").list.eval(pl.element().struct.field("content"))
    answered = turns.list.last().struct.field("role") == "assistant"
    plain = {
        "prompt": contents.list.head(turns.list.len() - answered.cast(pl.UInt32)).list.join("\n"),
        "response": pl.when(answered).then(contents.list.last()),
    }
    return _by_turns(messages, kind, pl.struct(plain[name].alias(name) for name in names), other)


def all_text(messages: pl.Series) -> pl.Series:
    """Return the text of all turns of each conversation, given as JSON text."""
    texts = pl.col("turns").list.eval(pl.element().struct.field("content")).list.join("\n")
    return _by_turns(messages, pl.String(), texts, lambda text: _text(json.loads(text)))


def written_turns(messages: pl.Series) -> pl.Series:
    """Return the turns of each conversation, given as JSON text, as TURNS has them: the content is `message_text`."""

    def other(text: str) -> list[dict[str, Any]]:
        return [{"role": each.get("role"), "content": message_text(each)} for each in json.loads(text)]

    return _by_turns(messages, TURNS, pl.col("turns"), other)


def _by_turns(messages: pl.Series, kind: Any, plain: pl.Expr, other: Callable[[str], Any]) -> pl.Series:
    """Return `plain` of the conversations that are turns of a role and a text alone, as the column `turns`, and `other` of the rest."""
    turns = plain_turns(messages)
    found = turns.to_frame("turns").select(plain.alias(messages.name)).to_series()
    return _with_others(messages, turns.is_not_null(), found, kind, other)


def _with_others(messages: pl.Series, is_plain: pl.Series, found: pl.Series, kind: Any, other: Callable[[str], Any]) -> pl.Series:
    """Return what was found of the plain conversations, and `other` of the rest."""
    if is_plain.all():
        return found
    rest = pl.Series(messages.name, [other(each) for each in messages.filter(~is_plain)], kind)
    return pl.concat([found.filter(is_plain), rest]).gather(pl.concat([is_plain.arg_true(), (~is_plain).arg_true()]).arg_sort())


def json_text(text: pl.Expr) -> pl.Expr:
    """Return a text as JSON writes it, in quotes; letters beyond ASCII stand as they are."""
    return pl.concat_str(pl.lit('"'), text.str.replace_many(ESCAPED), pl.lit('"'))


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


def keys(rows: pl.DataFrame) -> list[RowKey]:
    """Return (example_id, sample_index) of each row."""
    return list(zip(rows["example_id"].to_list(), rows["sample_index"].to_list(), strict=True))


def row_name() -> pl.Expr:
    """Return how each row is written for people and as a witness, as `row_id` says, from its columns KEY."""
    return pl.when(pl.col("sample_index").is_null()).then("example_id").otherwise(pl.concat_str(KEY, separator="/"))


def row_ids(rows: pl.DataFrame) -> list[str]:
    """Return how each row is written for people and as a witness."""
    return [row_id(*key) for key in keys(rows)]


def input_rows(run: Run, stage: str, columns: Sequence[str] = tuple(SCHEMA)) -> pl.DataFrame:
    """Return what a stage has to decide on. Raises UserError when nothing is left for it."""
    rows = load_rows(run, before=stage, columns=columns)
    if rows.is_empty():
        raise UserError(f"{run.path}: no row is left to decide on{_what_took_the_last(run, stage)}")
    return rows


def _what_took_the_last(run: Run, stage: str) -> str:
    summary = run.ledger.summary().filter(pl.col("action") != "kept")
    mine = summary.filter(pl.col("stage") == stage)
    earlier = summary if mine.is_empty() else summary.filter(pl.col("step") < mine["step"][0])
    if earlier.is_empty():
        return ""
    last = earlier.sort("step", "rows")[-1]  # an earlier stage may have removed more, and rows were left then
    removed = f"removed the last {last['rows'].item():,} by its rule {last['rule'].item()!r}"
    return f": stage {last['stage'].item()} {removed}; loosen that and run it again"


EXPORTED = (*KEY, "messages", "source", "meta")
DATASET = ("dataset.jsonl", "dataset.parquet")
WRITTEN = {"turns": TURNS, "extra": pl.String()}


def write_dataset(rows: pl.DataFrame | pl.LazyFrame, folder: Path) -> None:
    """Write rows as dataset.jsonl and dataset.parquet, from one reading of them: id (as `row_id`), messages, source, meta.

    In the Parquet file `messages` is a list of {role, content}. Where a turn holds more than two texts (tool calls, names,
    parts), the column `extra` has the JSON text of the whole conversation and the content is the turn's text.
    """
    rows, with_more = rows.lazy(), threading.Event()
    written = pl.col("messages").map_batches(
        functools.partial(_written, with_more=with_more), return_dtype=pl.Struct(WRITTEN), is_elementwise=True
    )
    columns = rows.select(row_name().alias("id"), *KEY, "source", "meta", written=written)
    table = columns.unnest("written").rename({"turns": "messages"})
    names = ["id", *KEY, "messages", "source", "meta"]
    with write_atomically(folder / "dataset.jsonl") as as_lines, write_atomically(folder / "dataset.parquet") as as_table:
        sinks = [_lines(rows, as_lines), table.select(names).sink_parquet(as_table, compression_level=1, lazy=True)]
        pl.collect_all(sinks, engine="streaming")
        if with_more.is_set():  # known only now, and rare: the table is written again
            table.select(*names, "extra").sink_parquet(as_table, compression_level=1, engine="streaming")


def _is_simple(messages: Sequence[Message]) -> bool:
    return all(set(each) == {"role", "content"} and isinstance(each["content"], str) for each in messages)


def _written(messages: pl.Series, with_more: threading.Event) -> pl.Series:
    """Return each conversation, given as JSON text, as turns, and as the text itself where those lack some of it (sets `with_more`)."""

    def other(text: str) -> dict[str, Any]:
        conversation = json.loads(text)
        turns = [{"role": each["role"], "content": message_text(each)} for each in conversation]
        extra = None if _is_simple(conversation) else text
        if extra is not None:
            with_more.set()
        return {"turns": turns, "extra": extra}

    return _by_turns(messages, pl.Struct(WRITTEN), pl.struct("turns", extra=pl.lit(None, pl.String)), other)


def export_rows(rows: pl.DataFrame | pl.LazyFrame, path: Path) -> None:
    """Write rows as JSONL, one conversation a line: {"id": …, "messages": […], "source": …, "meta": {…}}."""
    with write_atomically(path) as temporary:
        _lines(rows.lazy(), temporary).collect(engine="streaming")


def _lines(rows: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    """Return the plan that writes what `export_rows` says."""
    meta = pl.when(pl.col("meta").fill_null("") == "").then(pl.lit("{}")).otherwise("meta")
    source = json_text(pl.col("source")).fill_null("null")
    parts = ['{"id": ', json_text(row_name()), ', "messages": ', pl.col("messages"), ', "source": ', source, ', "meta": ', meta, "}"]
    line = pl.concat_str([pl.lit(part) if isinstance(part, str) else part for part in parts])
    return rows.select(line).sink_csv(path, include_header=False, quote_style="never", lazy=True)
