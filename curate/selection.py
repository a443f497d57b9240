"""Rank rows so that any beginning of the ranking is a good choice of that size, and take what a budget allows."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.example import Decision
from ..core.files import write_atomically
from ..core.progress import Progress
from ..core.run import Run
from .config import SelectConfig
from .controls import clear_controls, length_bucket, length_matched, random_order, rank_correlation, write_controls
from .coverage import Pick, k_center, nearest_to_mean
from .diversity import deita_filter, dpp, mmr
from .embed import embed_rows
from .facility_location import facility_location
from .quotas import balanced_order, cluster, num_clusters, quota_order
from .rows import Outcome, input_rows, keys, record, row_ids
from .score import best_first, read_score, sort_columns
from .similarity import Cosines, Indices, Vectors, nearest

ONLY_SCORED = ("top", "deita", "qdit", "mmr", "dpp")  # these never take a row without the score
WEIGHED = ("qdit", "mmr", "dpp")  # these weigh the score against how different a row is


def select(run: Run, config: SelectConfig) -> Outcome:
    """Take the rows that fit the budget, as the stage "select"; write the ranking to curate/selection.parquet.

    Rows are ranked in the order of their ids, so that the order of a file decides nothing: of equals the lower id comes first.
    A row that is not taken (not_selected) names the nearest taken row as its witness and the cosine with it as its score,
    where texts are compared; one that deita leaves out for that cosine is too_similar. A row without the score that the method
    chooses by is never taken (unscored); k-center and the methods with strata or clusters put such rows last.
    """
    rows = input_rows(run, "select").sort("example_id", "sample_index")
    tokens = _tokens(run, rows) if config.budget_tokens is not None else None
    columns = sort_columns(run, rows, config.by, config.seed)
    lengths = row_lengths(rows)
    eligible = _eligible(run, rows, columns, config)
    run.configure("select", to_mapping(config), free=("*",))
    vectors = embed_rows(run, rows, config.on, config.embed) if config.needs_vectors else None
    picks: list[Pick] = []
    spent = 0.0
    size = len(eligible) if config.budget is None else min(config.budget, len(eligible))
    with Progress("select", total=size, unit="rows") as progress:
        for pick in _ranking(rows, eligible, vectors, columns, lengths, size, config):
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
    notes = _budget_notes(len(rows), len(eligible), len(taken), size, spent, config)
    if config.by and not config.by[0].endswith("random"):
        notes.append(_told_correlation(config.by[0], columns[0], lengths))
    clear_controls(run)
    if config.controls:
        order = random_order(rows, config.seed)
        drawn = [_fitting(order, len(taken), tokens, config.budget_tokens), length_matched(order, lengths, taken)]
        notes += write_controls(run, rows, drawn, lengths, taken)
    return record(run, "select", rows, _decide(rows, eligible, taken, vectors, config), notes)


def _ranking(
    rows: pl.DataFrame,
    eligible: Indices,
    vectors: Vectors | None,
    columns: Sequence[Sequence[float | None]],
    lengths: Sequence[float],
    size: int,
    config: SelectConfig,
) -> Iterator[Pick]:
    """Yield the eligible rows as the method ranks them, `size` of them at least."""
    own = [[column[row] for row in eligible] for column in columns]
    best = sorted(range(len(eligible)), key=lambda row: best_first(own, row))
    draws = config.method == "random" or (config.method in ("stratified", "cluster-balanced") and not config.by)
    within = random_order(rows[eligible], config.seed) if draws else best  # the order within a stratum or cluster, too
    quality = share_of_rows(own) if config.by and config.method in WEIGHED else None
    near = vectors if vectors is None or len(eligible) == len(rows) else vectors[eligible]
    ranking: Iterator[Pick]
    if config.method == "random":
        ranking = ((row, None, None) for row in within)
    elif config.method == "top":
        ranking = ((row, own[0][row], None) for row in best)
    elif config.method == "longest":
        ranking = ((row, lengths[row], None) for row in sorted(range(len(rows)), key=lambda row: -lengths[row]))
    elif config.method == "stratified":
        ranking = quota_order(_strata(rows, near, lengths, config), within)
    else:
        assert near is not None
        ranking = _compared(near, quality, best, within, size, config)
    for row, gain, witness in ranking:
        yield int(eligible[row]), gain, None if witness is None else int(eligible[witness])


def _compared(
    vectors: Vectors, quality: Cosines | None, best: Sequence[int], within: Sequence[int], size: int, config: SelectConfig
) -> Iterator[Pick]:
    """Yield rows as the methods rank them that look at vectors alone, or at vectors and quality."""
    if config.method == "k-center":
        return k_center(vectors, best[0] if config.by else nearest_to_mean(vectors))
    if config.method == "facility-location":
        return facility_location(vectors)
    if config.method == "dpp":
        return dpp(vectors, quality, config.quality_weight, size)
    if config.method == "cluster-balanced":
        return balanced_order(cluster(vectors, num_clusters(len(vectors), config.clusters), config.seed).tolist(), within)
    if config.method == "deita":
        return deita_filter(vectors, best, config.max_cosine)
    assert quality is not None  # qdit and mmr; the config asks for a score
    if config.method == "qdit":
        return facility_location(vectors, quality, config.quality_weight)
    return mmr(vectors, quality, config.quality_weight)


def share_of_rows(columns: Sequence[Sequence[float | None]]) -> Cosines:
    """Return for each row the share of the other rows that are worse by the scores, equals counting half: 0 worst, 1 best.

    A rank has no unit, so that a weight against cosines means the same for any score.
    """
    from scipy.stats import rankdata

    num_rows = len(columns[0])
    order = [best_first(columns, row) for row in range(num_rows)]
    place = {key: number for number, key in enumerate(sorted(set(order), reverse=True))}
    ranks = rankdata([place[key] for key in order], method="average")
    return np.asarray((ranks - 1) / max(num_rows - 1, 1), dtype=np.float64)


def row_lengths(rows: pl.DataFrame) -> list[float]:
    """Return the length of each answer: in tokens where every row has their number, else in characters; without an answer, its prompt's."""
    if not rows["num_tokens"].null_count():
        return [float(count) for count in rows["num_tokens"]]
    return [float(len(prompt if response is None else response)) for prompt, response in zip(rows["prompt"], rows["response"], strict=True)]


def _strata(rows: pl.DataFrame, vectors: Vectors | None, lengths: Sequence[float], config: SelectConfig) -> list[tuple[str | int, ...]]:
    """Return the stratum of each row: its file, the bucket of its length (each twice as long as the one before), its cluster."""
    parts: dict[str, list[str] | list[int]] = {
        "source": [re.sub(r":\d+$", "", source or "") for source in rows["source"]],
        "length": [length_bucket(length) for length in lengths],
    }
    if vectors is not None:
        parts["cluster"] = cluster(vectors, num_clusters(len(rows), config.clusters), config.seed).tolist()
    return list(zip(*(parts[name] for name in config.strata), strict=True))


def _eligible(run: Run, rows: pl.DataFrame, columns: Sequence[Sequence[float | None]], config: SelectConfig) -> Indices:
    """Return the rows that the method may take."""
    if config.method not in ONLY_SCORED or not columns:
        return np.arange(len(rows))
    eligible = np.array([row for row, value in enumerate(columns[0]) if value is not None], dtype=np.int64)
    if not len(eligible):
        raise UserError(
            f"{run.path}: none of {len(rows):,} rows has a score {config.by[0].removeprefix('-')!r}, which {config.method} chooses by; "
            "`sftkit curate score` says why, or choose by another"
        )
    return eligible


def _budget_notes(num_rows: int, num_eligible: int, num_taken: int, size: int, spent: float, config: SelectConfig) -> list[str]:
    notes = []
    if num_eligible < num_rows:
        notes.append(f"{num_rows - num_eligible:,} of {num_rows:,} rows have no score {config.by[0].removeprefix('-')!r} and are not taken")
    if num_taken == num_rows:
        notes.append(f"the budget holds all {num_rows:,} rows: every one is kept")
    elif config.method == "deita" and num_taken < size and (config.budget_tokens is None or spent <= config.budget_tokens):
        notes.append(f"only {num_taken:,} rows are less similar than {config.max_cosine} to each other: the budget is not used up")
    return notes


def _told_correlation(name: str, scores: Sequence[float | None], lengths: Sequence[float]) -> str:
    given = [None if value is None else -value for value in scores] if name.startswith("-") else scores
    correlation, count = rank_correlation(given, lengths)
    if correlation is None:
        return f"the rank correlation of {name.removeprefix('-')} and length is not defined: one of them is the same for all rows"
    return f"rank correlation (Spearman) of {name.removeprefix('-')} and length: {correlation:+.2f} over {count:,} rows"


def _fitting(order: list[int], size: int, tokens: Sequence[float] | None, budget_tokens: int | None) -> list[int]:
    """Return the beginning of `order` that a budget of rows, or of tokens, allows; a row at least."""
    if tokens is None or budget_tokens is None:
        return order[:size]
    spent = np.cumsum([tokens[row] for row in order])
    return order[: max(int(np.searchsorted(spent, budget_tokens, side="right")), 1)]


def _decide(rows: pl.DataFrame, eligible: Indices, taken: list[int], vectors: Vectors | None, config: SelectConfig) -> list[Decision]:
    ids = row_ids(rows)
    chosen, scored = set(taken), set(eligible.tolist())
    left = [row for row in range(len(rows)) if row not in chosen and row in scored]
    witnesses: dict[int, tuple[int, float]] = {}
    if vectors is not None and left:
        found: tuple[Indices, Cosines] = nearest(vectors, left, taken)
        witnesses = {row: (int(witness), float(cosine)) for row, witness, cosine in zip(left, *found, strict=True)}
    decisions = []
    for row, (example_id, index) in enumerate(keys(rows)):
        if row in chosen:
            decisions.append(Decision(example_id, index, "select", "kept"))
        elif row not in scored:
            decisions.append(Decision(example_id, index, "select", "rejected", "unscored"))
        else:
            witness, cosine = witnesses.get(row, (None, None))
            alike = config.method == "deita" and cosine is not None and cosine >= config.max_cosine
            rule, threshold = ("too_similar", config.max_cosine) if alike else ("not_selected", None)
            told = None if witness is None else ids[witness]
            decisions.append(Decision(example_id, index, "select", "rejected", rule, cosine, threshold, told))
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
