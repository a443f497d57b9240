"""Scores as columns of numbers beside the rows, and the order that they put rows in: what the deciding steps read of a million rows."""

import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from ..core.run import Run
from .model_scores import UNTOLD
from .rows import row_name
from .score import AS_SCORED, check_score_name, read_score, score_path
from .scorers import count_words

log = logging.getLogger(__name__)

Order = npt.NDArray[np.int64]
READ_OFF = {"num_tokens": "num_tokens", "logprob": "logprob", "num_chars": "response", "num_words": "response"}  # by the column of the rows


def columns_for(run: Run, names: Iterable[str]) -> list[str]:
    """Return the columns of the rows that these scores are read off, or held against where they are stored.

    Raises UserError for an unknown score.
    """
    needed: list[str] = []
    for name in (each.removeprefix("-") for each in names):
        if name == "random":
            continue
        check_score_name(run, name)
        needed += [READ_OFF[name]] if name in READ_OFF and not score_path(run, name).exists() else AS_SCORED
    return list(dict.fromkeys(needed))


def score_values(run: Run, rows: pl.DataFrame, name: str) -> pl.Series:
    """Return the values of a score for these rows, which have KEY and `columns_for` it; null where there is none."""
    check_score_name(run, name)
    if name not in READ_OFF or score_path(run, name).exists():
        return read_score(run, rows, name)["value"].alias(name)
    column = rows[READ_OFF[name]]
    if name == "num_chars":
        column = column.str.len_chars()
    elif name == "num_words":
        column = pl.Series([None if text is None else count_words(text) for text in column], dtype=pl.Float64)
    return column.cast(pl.Float64).fill_nan(None).alias(name)


def reason_of_none(run: Run, rows: pl.DataFrame, name: str) -> str:
    """Return why most of some rows, which have no value of a score, have none; empty where that is not known."""
    if name in READ_OFF and not score_path(run, name).exists():
        return UNTOLD if name == "logprob" else ""
    told = read_score(run, rows, name)["detail"].drop_nulls()
    told = told.filter(told != "")
    return "" if told.is_empty() else str(told.mode(maintain_order=True)[0])


def sort_columns(run: Run, rows: pl.DataFrame, by: Sequence[str], seed: int = 0) -> pl.DataFrame:
    """Return a column per name in `by`, turned so that higher is better: `-NAME` is negated, `random` is drawn by row and seed."""
    columns = []
    for place, name in enumerate(by):
        if name.removeprefix("-") == "random":
            values = pl.Series(random_numbers(rows, seed))
        else:
            values = score_values(run, rows, name.removeprefix("-"))
            if values.null_count() == len(values):
                why = reason_of_none(run, rows, values.name) if len(values) else ""
                log.warning(
                    "none of %s rows has a score %r, so it puts none before another%s", f"{len(rows):,}", values.name, why and f"; {why}"
                )
        columns.append((-values if name.startswith("-") else values).alias(str(place)))
    return pl.DataFrame(columns)


def random_numbers(rows: pl.DataFrame, seed: int) -> npt.NDArray[np.float64]:
    """Return for each row a number in [0, 1) that depends on the seed and the row alone, not on its place or on the other rows."""
    names = rows.select(pl.concat_str(pl.lit(f"{seed}/"), row_name())).to_series()
    digests = b"".join([hashlib.sha256(name.encode()).digest()[:8] for name in names])
    return np.frombuffer(digests, dtype=">u8") / 2.0**64


def best_first(columns: pl.DataFrame, *, ties: Sequence[pl.Series] = ()) -> Order:
    """Return the rows in order: highest first by the first column, of equals by the next, without a value last.

    Of equals in all columns those lowest in `ties` come first; what is equal in these too keeps its order.
    """
    table = pl.DataFrame([*columns.get_columns(), *(each.alias(f"tie {place}") for place, each in enumerate(ties))])
    if not table.width:
        raise ValueError("nothing to sort by")
    falling = [True] * columns.width + [False] * len(ties)
    order = table.with_row_index("row").sort(table.columns, descending=falling, nulls_last=True, maintain_order=True)["row"]
    return order.cast(pl.Int64).to_numpy()
