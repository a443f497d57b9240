"""Controls of a selection: rows drawn at random from the same rows, as many, or of the same lengths."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ..core.run import Run
from ..core.text import counted
from .rows import EXPORTED, export_rows, load_rows
from .scored import random_numbers

CONTROLS = ("random", "length_matched")
BUCKETS_PER_DOUBLING = 4


def random_order(rows: pl.DataFrame, seed: int) -> list[int]:
    """Return the rows in the order of a number drawn from the seed and each row's own id."""
    return np.argsort(random_numbers(rows, seed), kind="stable").tolist()  # type: ignore[no-any-return]


def length_bucket(length: float, per_doubling: int = 1) -> int:
    """Return the bucket of a length: in each rise of so many buckets lengths double."""
    return math.floor(per_doubling * math.log2(max(length, 0) + 1))


def length_buckets(lengths: Sequence[float], per_doubling: int = 1) -> list[int]:
    """Return the bucket of each length; equal ones are asked for once."""
    different, places = np.unique(np.asarray(lengths, dtype=np.float64), return_inverse=True)
    return np.array([length_bucket(length, per_doubling) for length in different.tolist()], dtype=np.int64)[places].tolist()


def length_matched(order: Sequence[int], lengths: Sequence[float], taken: Sequence[int]) -> list[int]:
    """Return rows, first come first taken in `order`, so that each bucket of lengths has as many as the `taken` rows have."""
    buckets, visited = np.array(length_buckets(lengths, BUCKETS_PER_DOUBLING)), np.asarray(order, dtype=np.int64)
    wanted = np.bincount(buckets[np.asarray(taken, dtype=np.int64)], minlength=int(buckets.max(initial=0)) + 1)
    by_bucket = np.argsort(buckets[visited], kind="stable")
    sizes = np.bincount(buckets[visited], minlength=len(wanted))
    place = np.empty(len(visited), dtype=np.int64)  # of each row among those of its bucket
    place[by_bucket] = np.arange(len(visited)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return visited[place < wanted[buckets[visited]]].tolist()


def clear_controls(run: Run, prefix: str = "") -> None:
    """Remove the controls of an earlier selection: they are none of this one."""
    for name in CONTROLS:
        _path(run, prefix + name).unlink(missing_ok=True)


def write_controls(
    run: Run, rows: pl.DataFrame, drawn: Sequence[list[int]], lengths: Sequence[float], taken: Sequence[int], unit: str, prefix: str = ""
) -> list[str]:
    """Write curate/controls/NAME.jsonl for each of CONTROLS; return a line about each, beside the selection.

    `unit` is that of the lengths: tokens, characters.
    """
    told = []
    sizes, is_taken = np.asarray(lengths, dtype=np.float64), np.zeros(len(rows), dtype=bool)
    is_taken[taken] = True
    for name, chosen in zip(CONTROLS, drawn, strict=True):
        path = _path(run, prefix + name)
        export_rows(rows[sorted(chosen)], path)
        told.append(
            f"control {prefix}{name}: {counted(len(chosen), 'row')}, {is_taken[chosen].sum():,} of them selected too; mean length "
            f"{sizes[chosen].mean():,.1f} {unit}, of the selection {sizes[is_taken].mean():,.1f}: {path}"
        )
    return told


def write_controls_of(
    run: Run, stage: str, decisions: pl.DataFrame, lengths: pl.Series, seed: int, pool: pl.Series, *, within_prompts: bool = False
) -> list[str]:
    """Write the controls of a stage's decisions, as STAGE_NAME.jsonl: as many rows as it kept, drawn from those of the `pool`.

    `lengths` are in characters. Within prompts, the random control has as many samples of each prompt as were kept of it.
    """
    rows = load_rows(run, before=stage, columns=EXPORTED)
    taken = (decisions["action"] == "kept").arg_true().to_list()
    if not taken:
        return []
    in_order = np.array(random_order(rows, seed))
    order = in_order[pool.to_numpy()[in_order]].tolist()
    drawn = order[: len(taken)]
    if within_prompts:
        left: defaultdict[str, int] = defaultdict(int)
        names = rows["example_id"].to_list()
        for row in taken:
            left[names[row]] += 1
        drawn = []
        for row in order:
            if left[names[row]]:
                left[names[row]] -= 1
                drawn.append(row)
    numbers = lengths.cast(pl.Float64).to_list()
    return write_controls(run, rows, [drawn, length_matched(order, numbers, taken)], numbers, taken, "characters", f"{stage}_")


def _path(run: Run, name: str) -> Path:
    return run.path / "curate" / "controls" / f"{name}.jsonl"


def rank_correlation(scores: Sequence[float | None] | pl.Series, lengths: Sequence[float]) -> tuple[float | None, int]:
    """Return Spearman's correlation of score and length over the rows with a score, None where one is constant, and their number."""
    both = pl.DataFrame({"score": scores, "length": lengths}, schema={"score": pl.Float64, "length": pl.Float64}).drop_nulls()
    if both["score"].n_unique() < 2 or both["length"].n_unique() < 2:
        return None, len(both)
    return float(both.select(pl.corr("score", "length", method="spearman")).item()), len(both)
