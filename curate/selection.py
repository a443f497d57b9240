"""Rank rows so that any beginning of the ranking is a good choice of that size, and take what a budget allows."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.files import write_atomically
from ..core.hardware import pick_device
from ..core.progress import Progress
from ..core.run import Run
from .controls import clear_controls, length_buckets, length_matched, random_order, rank_correlation, write_controls
from .coverage import Pick, k_center, nearest_to_mean
from .decide_config import SelectConfig
from .decided import Outcome, decision_table, record
from .diversity import deita_filter, dpp, mmr
from .embed import embed_rows
from .facility_location import facility_location
from .fast_location import fast_location
from .memory import fit_neighbors, least_dimensions
from .quotas import balanced_order, cluster, num_clusters, quota_order
from .rows import EXPORTED, KEY, input_rows, load_rows, row_name
from .scored import best_first, columns_for, score_values, sort_columns
from .similarity import Cosines, Indices, Vectors, nearest

ONLY_SCORED = ("top", "deita", "qdit", "mmr", "dpp")  # these never take a row without the score
FEW = 0.01  # of the rows: with fewer picks the fast way of facility location gives up more than a hundredth of the value
WEIGHED = ("qdit", "mmr", "dpp")  # these weigh the score against how different a row is


def select(run: Run, config: SelectConfig) -> Outcome:
    """Take the rows that fit the budget, as the stage "select"; write the ranking to curate/selection.parquet.

    Rows are ranked in the order of their ids, so that the order of a file decides nothing: of equals the lower id comes first.
    A row that is not taken (not_selected) names the nearest taken row as its witness and the cosine with it as its score,
    where texts are compared; one that deita leaves out for that cosine is too_similar. A row without the score that the method
    chooses by is never taken (unscored); k-center and the methods with strata or clusters put such rows last.
    """
    rows = input_rows(run, "select", _columns(run, config)).sort(KEY)
    tokens = _tokens(run, rows) if config.budget_tokens is not None else None
    columns = sort_columns(run, rows, config.by, config.seed)
    lengths = row_lengths(rows)
    eligible = _eligible(run, rows, columns, config)
    run.configure("select", to_mapping(config), free=("*",))
    size = len(eligible) if config.budget is None else min(config.budget, len(eligible))
    if config.needs_vectors:
        fit_neighbors(config, len(eligible), least_dimensions(config.embed), size, tell=False)
    vectors = embed_rows(run, rows, config.on, config.embed) if config.needs_vectors else None
    picks: list[Pick] = []
    spent = 0.0
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
    if config.by and config.by[0].removeprefix("-") != "random":
        notes.append(_told_correlation(config.by[0], columns["0"], lengths))
    clear_controls(run)
    if config.controls:
        order = random_order(rows, config.seed + 1)  # other numbers than `random` itself draws
        drawn = [_fitting(order, len(taken), tokens, config.budget_tokens), length_matched(order, lengths, taken)]
        whole = load_rows(run, before="select", columns=EXPORTED).sort(KEY)
        unit = "characters" if rows["num_tokens"].null_count() else "tokens"  # as row_lengths takes them
        notes += write_controls(run, whole, drawn, lengths, taken, unit)
    return record(run, "select", rows, _decide(rows, eligible, taken, vectors, config), notes)


def _columns(run: Run, config: SelectConfig) -> list[str]:
    """Return the columns of the rows that a selection needs: of the texts only where it looks at them, or at their lengths."""
    measured = not load_rows(run, before="select", columns=["num_tokens"])["num_tokens"].null_count()
    needed = [*KEY, "num_tokens", "source", *([] if measured and not config.needs_vectors else ["response", "prompt"])]
    needed += ["messages"] if config.needs_vectors else []
    needed += columns_for(run, [*config.by, *(["num_tokens"] if config.budget_tokens is not None else [])])
    return list(dict.fromkeys(needed))


def _ranking(
    rows: pl.DataFrame,
    eligible: Indices,
    vectors: Vectors | None,
    columns: pl.DataFrame,
    lengths: Sequence[float],
    size: int,
    config: SelectConfig,
) -> Iterator[Pick]:
    """Yield the eligible rows as the method ranks them, `size` of them at least."""
    own = columns[eligible] if columns.width else columns
    best = best_first(own).tolist() if columns.width else list(range(len(eligible)))
    draws = config.method == "random" or (config.method in ("stratified", "cluster-balanced") and not config.by)
    within = random_order(rows[eligible], config.seed) if draws else best  # the order within a stratum or cluster, too
    quality = share_of_rows(own) if config.by and config.method in WEIGHED else None
    near = vectors if vectors is None or len(eligible) == len(rows) else vectors[eligible]
    ranking: Iterator[Pick]
    if config.method == "random":
        ranking = ((row, None, None) for row in within)
    elif config.method == "top":
        values = own["0"].to_list()
        ranking = ((row, values[row], None) for row in best)
    elif config.method == "longest":
        ranking = ((row, lengths[row], None) for row in np.argsort(-np.asarray(lengths), kind="stable").tolist())
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
    neighbors = fit_neighbors(config, len(vectors), vectors.shape[1], size)
    if config.method == "k-center":
        first = best[0] if config.by else nearest_to_mean(vectors)
        if pick_device() == "cpu":
            return k_center(vectors, first)
        from . import accelerated

        return accelerated.k_center(vectors, first, pick_device())
    if config.method in ("facility-location", "qdit"):
        weight = config.quality_weight if config.method == "qdit" else 0.0
        quality = quality if config.method == "qdit" else None
        if config.fast:
            return fast_location(vectors, quality, weight)
        if config.epsilon is None:
            return facility_location(vectors, quality, weight, neighbors=neighbors)
        from .accelerated import stochastic_facility_location

        return stochastic_facility_location(vectors, size, quality, weight, epsilon=config.epsilon, seed=config.seed, device=pick_device())
    if config.method == "dpp":
        return dpp(vectors, quality, config.quality_weight, size)
    if config.method == "cluster-balanced":
        return balanced_order(cluster(vectors, num_clusters(len(vectors), config.clusters), config.seed).tolist(), within)
    if config.method == "deita":
        return deita_filter(vectors, best, config.max_cosine)
    assert quality is not None  # mmr; the config asks for a score
    return mmr(vectors, quality, config.quality_weight)


def share_of_rows(columns: pl.DataFrame) -> Cosines:
    """Return for each row the share of the other rows that are worse by the scores, equals counting half: 0 worst, 1 best.

    A rank has no unit, so that a weight against cosines means the same for any score.
    """
    order = best_first(columns)
    differs = columns[order].select(pl.any_horizontal(pl.all().ne_missing(pl.all().shift()))).to_series().to_numpy().copy()
    differs[0] = True
    begins = np.flatnonzero(differs)  # of the rows that are equal, in order
    sizes = np.diff(begins, append=len(order))
    worse = len(order) - begins - sizes + (sizes - 1) / 2
    shares = np.empty(len(order))
    shares[order] = np.repeat(worse, sizes) / max(len(order) - 1, 1)
    return shares


def row_lengths(rows: pl.DataFrame) -> list[float]:
    """Return the length of each answer: in tokens where every row has their number, else in characters; without an answer, its prompt's."""
    if not rows["num_tokens"].null_count():
        return rows["num_tokens"].cast(pl.Float64).to_list()
    return rows.select(pl.coalesce("response", "prompt").str.len_chars().cast(pl.Float64)).to_series().to_list()


def _strata(rows: pl.DataFrame, vectors: Vectors | None, lengths: Sequence[float], config: SelectConfig) -> list[tuple[str | int, ...]]:
    """Return the stratum of each row: its file, the bucket of its length (each twice as long as the one before), its cluster."""
    parts: dict[str, list[str] | list[int]] = {
        "source": rows["source"].fill_null("").str.replace(r":\d+$", "").to_list(),
        "length": length_buckets(lengths),
    }
    if vectors is not None:
        parts["cluster"] = cluster(vectors, num_clusters(len(rows), config.clusters), config.seed).tolist()
    return list(zip(*(parts[name] for name in config.strata), strict=True))


def _eligible(run: Run, rows: pl.DataFrame, columns: pl.DataFrame, config: SelectConfig) -> Indices:
    """Return the rows that the method may take."""
    if config.method not in ONLY_SCORED or not columns.width:
        return np.arange(len(rows))
    eligible = columns["0"].is_not_null().arg_true().cast(pl.Int64).to_numpy()
    if not len(eligible):
        raise UserError(
            f"{run.path}: none of {len(rows):,} rows has a score {config.by[0].removeprefix('-')!r}, which {config.method} chooses by; "
            f"`sftkit curate score {run.path} --with {config.by[0].removeprefix('-')}` says why, or choose by another"
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
    if config.fast and num_taken < FEW * num_eligible:
        notes.append(
            f"fewer than {FEW:.0%} of the rows are taken, where fast judges most by a sample: leave it out (exact), or compare k-center"
        )
    return notes


def _told_correlation(name: str, scores: pl.Series, lengths: Sequence[float]) -> str:
    correlation, count = rank_correlation(-scores if name.startswith("-") else scores, lengths)
    if correlation is None:
        return f"the rank correlation of {name.removeprefix('-')} and length is not defined: one of them is the same for all rows"
    return f"rank correlation (Spearman) of {name.removeprefix('-')} and length: {correlation:+.2f} over {count:,} rows"


def _fitting(order: list[int], size: int, tokens: Sequence[float] | None, budget_tokens: int | None) -> list[int]:
    """Return the beginning of `order` that a budget of rows, or of tokens, allows; a row at least."""
    if tokens is None or budget_tokens is None:
        return order[:size]
    spent = np.cumsum([tokens[row] for row in order])
    return order[: max(int(np.searchsorted(spent, budget_tokens, side="right")), 1)]


def _decide(rows: pl.DataFrame, eligible: Indices, taken: list[int], vectors: Vectors | None, config: SelectConfig) -> pl.DataFrame:
    is_taken, is_scored = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    is_taken[taken], is_scored[eligible] = True, True
    left = np.flatnonzero(is_scored & ~is_taken)
    witness, cosine = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), np.nan)
    if vectors is not None and len(left):
        found: tuple[Indices, Cosines]
        if pick_device() == "cpu":
            found = nearest(vectors, left.tolist(), taken)
        else:
            from . import accelerated

            found = accelerated.nearest(vectors, left.tolist(), taken, pick_device())
        witness[left], cosine[left] = found
    table = rows.select(KEY).with_columns(
        name=row_name(),
        taken=pl.Series(is_taken),
        scored=pl.Series(is_scored),
        cosine=pl.Series(cosine).fill_nan(None),
        witness=pl.Series(witness),
    )
    alike = (pl.col("cosine") >= config.max_cosine).fill_null(value=False) & (config.method == "deita")
    rule = pl.when("taken").then(None).when(~pl.col("scored")).then(pl.lit("unscored"))
    return decision_table(
        table,
        "select",
        rule.when(alike).then(pl.lit("too_similar")).otherwise(pl.lit("not_selected")),
        score=pl.col("cosine"),
        threshold=pl.when(alike).then(config.max_cosine),
        witness_id=pl.col("name").gather(pl.when(pl.col("witness") >= 0).then("witness")),
    )


def _tokens(run: Run, rows: pl.DataFrame) -> list[float]:
    tokens = score_values(run, rows, "num_tokens")
    if tokens.null_count():
        raise UserError(
            f"{run.path}: {tokens.null_count():,} of {len(rows):,} rows have no token count, which budget_tokens needs: "
            f"`sftkit curate score {run.path} --with num_tokens:model=MODEL` counts them"
        )
    if (tokens < 0).any():
        below = (tokens < 0).sum()
        raise UserError(f"{run.path}: {below:,} of {len(rows):,} rows have a token count below 0, which budget_tokens cannot add")
    return tokens.to_list()


def _write_ranking(run: Run, rows: pl.DataFrame, picks: list[Pick]) -> None:
    names = rows.select(*KEY, name=row_name())
    table = pl.DataFrame(picks, schema={"place": pl.Int64, "gain": pl.Float64, "witness": pl.Int64}, orient="row")
    ranking = names[table["place"]].select(
        pl.Series("rank", range(len(picks)), pl.Int32), *KEY, table["gain"], names["name"].gather(table["witness"]).alias("witness_id")
    )
    with write_atomically(run.room("curate") / "selection.parquet") as temporary:
        ranking.write_parquet(temporary)
