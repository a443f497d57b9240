"""Remove rows that hold an item of a benchmark: copied runs of words, and short items word for word.

Of the benchmarks that come along only hashes of 8-word runs are kept (curate/data/, made by benchmarks/build_indexes.py).
core/copies.py has the search.
"""

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.copies import LEAST, Index, Match, Matcher, build_index, plain
from ..core.errors import UserError, unknown_name
from ..core.example import row_id
from ..core.files import write_atomically
from ..core.formats import iterate_examples
from ..core.ngrams import Runs, words
from ..core.progress import Progress
from ..core.run import Run
from ..core.text import counted
from .decide_config import DecontaminateConfig
from .decided import Outcome, decision_table, record
from .rows import KEY, input_rows, message_text, written_turns

log = logging.getLogger(__name__)

STAGE = "decontaminate"
BUNDLED = Path(__file__).parent / "data"
ROWS_AT_A_TIME = 10_000
TURNS_AT_A_TIME = 2_000  # their words stay in the processor's cache
THREADS = 2  # numpy leaves the interpreter while it computes
COLUMNS = {
    "row": pl.String,
    "turn": pl.Int32,
    "benchmark": pl.String,
    "item": pl.String,
    "longest": pl.Int32,  # words in a row that stand in both
    "coverage": pl.Float64,
    "text": pl.String,  # the longest run, as normalised words
}


def open_benchmark(name: str) -> Index:
    """Return a benchmark by its name, or from a data file: the user's turns of its rows, called FILE:ROW.

    Raises UserError for a name that is neither, and for a file whose items are all too short to be told.
    """
    stored = BUNDLED / f"{name}.npz"
    if stored.exists():
        with np.load(stored, allow_pickle=False) as arrays:
            return Index(name, arrays["items"].tolist(), arrays["sizes"], Runs(arrays["grams"], arrays["starts"]), arrays["whole"])
    if not Path(name).expanduser().exists() and "/" not in name and "." not in name:
        raise unknown_name("benchmark", name, bundled(), also="a data file")
    file = Path(name).name
    entries = [
        (f"{file}:{example.source.rpartition(':')[2]}", message_text(message))
        for example in iterate_examples(name)
        for message in example.messages
        if message["role"] == "user"
    ]
    index = build_index(file.partition(".")[0], entries)
    if not (index.sizes >= LEAST).any():
        raise UserError(f"{name}: none of its {len(entries):,} items has {LEAST} words, so none can be told from other texts")
    return index


def bundled() -> list[str]:
    """Return the names of the benchmarks that come along."""
    return sorted(path.stem for path in BUNDLED.glob("*.npz"))


def decontaminate(run: Run, config: DecontaminateConfig) -> Outcome:
    """Remove rows that hold an item of a benchmark, as the stage "decontaminate", rule contaminated:BENCHMARK.

    A row is removed where runs of `ngram` words that it shares with an item cover `min_coverage` of the item's words, or where it
    has the item whole; the score is that coverage, the witness the item with the longest run. An item of 5 to 7 words must stand
    whole in a turn of the user's, or be a whole sentence of an answer; one of 3 or 4 must be a whole turn of the user's.
    curate/contamination.parquet lists the items, longest run first, of one turn 5 at most.
    """
    matcher = Matcher([open_benchmark(name) for name in config.benchmarks], config.ngram, config.min_coverage)
    rows = input_rows(run, STAGE, [*KEY, "messages"])
    run.configure(STAGE, to_mapping(config), free=("*",))
    matches: list[_Found] = []
    with Progress(STAGE, total=len(rows), unit="rows") as progress, ThreadPoolExecutor(THREADS) as pool:
        find = functools.partial(_find, matcher, rows["messages"], prompt_only=config.on == "prompt")
        for found in pool.map(find, range(0, len(rows), ROWS_AT_A_TIME)):
            matches += found
            progress.advance(min(ROWS_AT_A_TIME, len(rows) - progress.done))
    matches.sort(key=lambda found: (found.row, -found.match.longest, -found.match.coverage, found.match.entry, found.turn))
    best: dict[int, Match] = {}
    for each in matches:
        best.setdefault(each.row, each.match)
    _report(run, rows, matches, matcher)
    items = [matcher.item(match.entry) for match in best.values()]
    told = pl.DataFrame(
        [(row, f"contaminated:{name}", match.coverage, item) for (row, match), (name, item) in zip(best.items(), items, strict=True)],
        schema={"row": pl.UInt32, "rule": pl.String, "score": pl.Float64, "witness": pl.String},
        orient="row",
    )
    decided = rows.select(KEY).with_row_index("row").join(told, on="row", how="left", maintain_order="left")
    threshold = pl.when(pl.col("rule").is_not_null()).then(config.min_coverage)
    decisions = decision_table(decided, STAGE, pl.col("rule"), score=pl.col("score"), threshold=threshold, witness_id=pl.col("witness"))
    notes = [f"{counted(count, 'row')} with an item of {name}" for name, count in Counter(name for name, _ in items).items()]
    return record(run, STAGE, rows.select(KEY), decisions, [*notes, *(["curate/contamination.parquet has the items"] if best else [])])


def turn_table(messages: pl.Series, *, prompt_only: bool) -> pl.DataFrame:
    """Return the turns of conversations, given as JSON text: row, turn, text and whether it is `asked`, no answer.

    With `prompt_only` without the answer that a conversation ends with.
    """
    table = pl.DataFrame({"turns": written_turns(messages)}).with_row_index("row")
    table = table.with_columns(turn=pl.int_ranges(pl.col("turns").list.len())).explode("turns", "turn").drop_nulls("turns").unnest("turns")
    asked = pl.col("role").ne_missing("assistant")
    if prompt_only:
        table = table.filter(asked | (pl.col("turn") < pl.col("turn").max().over("row")))
    return table.select("row", "turn", text="content", asked=asked)


@dataclass(frozen=True, slots=True)
class _Found:
    """An item found in a turn of a row, and the words of its longest run there."""

    row: int
    turn: int
    match: Match
    text: str


def _find(matcher: Matcher, messages: pl.Series, first: int, *, prompt_only: bool) -> list[_Found]:
    """Return what ROWS_AT_A_TIME rows hold, from the row `first` on."""
    turns = turn_table(messages[first : first + ROWS_AT_A_TIME], prompt_only=prompt_only)
    found = []
    for start in range(0, len(turns), TURNS_AT_A_TIME):
        part = turns[start : start + TURNS_AT_A_TIME]
        texts = part["text"].to_list()
        for match in matcher.find(texts, part["asked"].to_numpy()):
            run_of_words = words(plain(texts[match.text]))[match.place : match.place + match.longest]
            told = b" ".join(run_of_words).decode("utf-8", "replace")
            found.append(_Found(first + part["row"][match.text], part["turn"][match.text], match, told))
    return found


def _report(run: Run, rows: pl.DataFrame, matches: Sequence[_Found], matcher: Matcher) -> None:
    found = [
        (row_id(*rows.row(each.row)[:2]), each.turn, *matcher.item(each.match.entry), each.match.longest, each.match.coverage, each.text)
        for each in matches
    ]
    table = pl.DataFrame(found, schema=COLUMNS, orient="row").sort("longest", "coverage", descending=True, maintain_order=True)
    with write_atomically(run.room("curate") / "contamination.parquet") as temporary:
        table.write_parquet(temporary)
