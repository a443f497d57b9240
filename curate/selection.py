"""Rank rows so that any beginning of the ranking is a good choice of that size, and take what a budget allows."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.example import Decision
from ..core.files import write_atomically
from ..core.progress import Progress
from ..core.run import Run
from .config import SelectConfig
from .dedup import visiting_order
from .embed import embed_rows
from .rows import Outcome, input_rows, keys, record, row_ids
from .score import random_number, read_score
from .similarity import MARGIN, TILE, Cosines, Indices, Vectors, exact_cosines, nearest

Pick = tuple[int, float | None, int | None]  # row, gain, witness: the picked row nearest to it


def select(run: Run, config: SelectConfig) -> Outcome:
    """Take the rows that fit the budget, as the stage "select"; write the ranking to curate/selection.parquet.

    k-center starts with the best row by the scores `by`, else with the row nearest to the mean, and goes on with the row that
    is farthest from all that were taken. A row that is not taken (not_selected) names the nearest taken row as its witness and
    the cosine with it as its score. Random draws by the seed and the row's id, and compares nothing.
    """
    rows = input_rows(run, "select")
    tokens = _tokens(run, rows) if config.budget_tokens is not None else None
    run.configure("select", to_mapping(config), free=("*",))
    vectors = embed_rows(run, rows, config.on, config.embed) if config.method == "k-center" else None
    ranking: Iterator[Pick]
    if vectors is None:
        ranking = ((row, None, None) for row in random_order(rows, config.seed))
    else:
        first = visiting_order(run, rows, config.by)[0] if config.by else nearest_to_mean(vectors)
        ranking = k_center(vectors, first)
    picks: list[Pick] = []
    spent = 0.0
    size = len(rows) if config.budget is None else min(config.budget, len(rows))
    with Progress("select", total=size, unit="rows") as progress:
        for pick in ranking:
            spent += tokens[pick[0]] if tokens is not None else 0
            if len(picks) >= size or (config.budget_tokens is not None and spent > config.budget_tokens):
                break
            picks.append(pick)
            progress.advance()
    if not picks:
        raise UserError(
            f"{run.path}: the first row of the ranking alone has {spent:.0f} tokens, more than budget_tokens {config.budget_tokens}"
        )
    _write_ranking(run, rows, picks)
    taken = [row for row, _, _ in picks]
    notes = []
    if len(picks) == len(rows):
        notes.append(f"the budget holds all {len(rows):,} rows: every one is kept")
    return record(run, "select", rows, _decide(rows, taken, vectors), notes)


def k_center(vectors: Vectors, first: int) -> Iterator[Pick]:
    """Yield the rows in the order of k-center greedy (Gonzalez 1985), beginning with `first`; gain is 1 − cosine to the nearest pick.

    Cosines are those of `exact_cosines`; of equally distant rows the lowest comes first. Rows within MARGIN of a pick are
    copies: when only they are left they follow in row order. Costs n·d multiplications a row, and no memory of size n².
    """
    num_rows = len(vectors)
    closest = np.full(num_rows, -np.inf, dtype=np.float32)  # cosine with the nearest pick, in float32: it only proposes
    exact = np.full(num_rows, -np.inf)  # the same exactly, as far as it has been looked at:
    witness = np.full(num_rows, -1, dtype=np.int64)
    compared = np.zeros(num_rows, dtype=np.int64)  # with so many of the picks
    picks = np.empty(num_rows, dtype=np.int64)
    picks[0] = first
    yield first, None, None
    for count in range(1, num_rows):
        last = picks[count - 1]
        np.maximum(closest, vectors @ vectors[last], out=closest)
        closest[last] = np.inf
        farthest = closest.min()
        if farthest >= 1 - MARGIN:
            rest = np.flatnonzero(np.isfinite(closest))
            for copy, near, cosine in zip(rest, *nearest(vectors, rest, picks[:count]), strict=True):
                yield int(copy), 1 - float(cosine), int(near)
            return
        rows = np.flatnonzero(closest <= farthest + 2 * MARGIN)
        fresh = count - compared[rows]
        ends = np.cumsum(fresh)
        which = np.arange(ends[-1]) - np.repeat(ends - fresh, fresh) + np.repeat(compared[rows], fresh)
        cosines = exact_cosines(vectors, np.repeat(rows, fresh), picks[which])
        for row, start, end in zip(rows, ends - fresh, ends, strict=True):
            best = start + int(np.argmax(cosines[start:end]))
            if cosines[best] > exact[row]:
                exact[row], witness[row] = cosines[best], picks[which[best]]
        compared[rows] = count
        pick = int(rows[np.argmin(exact[rows])])
        picks[count] = pick
        yield pick, 1 - float(exact[pick]), int(witness[pick])


def nearest_to_mean(vectors: Vectors) -> int:
    """Return the row with the largest cosine to the mean of all; of equals the lowest."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    products = [vectors[start : start + TILE] @ mean for start in range(0, len(vectors), TILE)]
    return int(np.argmax(np.round(np.concatenate(products), 9)))


def random_order(rows: pl.DataFrame, seed: int) -> list[int]:
    """Return the rows in the order of a number drawn from the seed and each row's own id."""
    names = keys(rows)
    return sorted(range(len(rows)), key=lambda row: random_number(seed, *names[row]))


def _decide(rows: pl.DataFrame, taken: list[int], vectors: Vectors | None) -> list[Decision]:
    ids = row_ids(rows)
    chosen = set(taken)
    left = [row for row in range(len(rows)) if row not in chosen]
    witnesses: dict[int, tuple[int, float]] = {}
    if vectors is not None and left:
        found: tuple[Indices, Cosines] = nearest(vectors, left, taken)
        witnesses = {row: (int(witness), float(cosine)) for row, witness, cosine in zip(left, *found, strict=True)}
    decisions = []
    for row, (example_id, index) in enumerate(keys(rows)):
        if row in chosen:
            decisions.append(Decision(example_id, index, "select", "kept"))
            continue
        witness, cosine = witnesses.get(row, (None, None))
        told = None if witness is None else ids[witness]
        decisions.append(Decision(example_id, index, "select", "rejected", "not_selected", cosine, None, told))
    return decisions


def _tokens(run: Run, rows: pl.DataFrame) -> list[float]:
    tokens = read_score(run, rows, "num_tokens")["value"]
    if tokens.null_count():
        raise UserError(
            f"{run.path}: {tokens.null_count():,} of {len(rows):,} rows have no token count, which budget_tokens needs: "
            f"`sftkit curate score {run.path} --with num_tokens:model=MODEL` counts them"
        )
    return tokens.to_list()


def _write_ranking(run: Run, rows: pl.DataFrame, picks: list[Pick]) -> None:
    ids, names = row_ids(rows), keys(rows)
    ranking = pl.DataFrame(
        {
            "rank": range(len(picks)),
            "example_id": [names[row][0] for row, _, _ in picks],
            "sample_index": [names[row][1] for row, _, _ in picks],
            "gain": [gain for _, gain, _ in picks],
            "witness_id": [None if witness is None else ids[witness] for _, _, witness in picks],
        },
        schema={"rank": pl.Int32, "example_id": pl.String, "sample_index": pl.Int32, "gain": pl.Float64, "witness_id": pl.String},
    )
    with write_atomically(run.room("curate") / "selection.parquet") as temporary:
        ranking.write_parquet(temporary)
