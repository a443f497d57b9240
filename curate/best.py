"""Choose among the samples of each prompt: by scores, by majority of their answers, or at random as a control."""

import polars as pl

from ..core.config import to_mapping
from ..core.ledger import KEY
from ..core.run import Run
from .controls import clear_controls, write_controls_of
from .decide_config import BestConfig, Gate, parse_gate
from .decided import Outcome, decision_table, record
from .rows import input_rows, row_name
from .score import read_score
from .scored import best_first, columns_for, reason_of_none, score_values, sort_columns


def best(run: Run, config: BestConfig) -> Outcome:
    """Keep the best samples of each prompt, as the stage "best"; an imported row without sample index is a prompt of its own.

    Not eligible, in this order: cut answers (rule truncated), rows without an answer (no_response), a gate not passed (gate:NAME) or
    without a value (unscored). Of a prompt whose share of samples that are eligible lies outside the band none is kept (min_pass_rate,
    max_pass_rate); those that `distill` left out count among them. With `majority`, the eligible samples vote with the
    answer they give (no_answer: none); those with another answer lose (not_majority: score is the share of their answer, threshold that of
    the winning one). A tie between answers goes to the one whose best row is better. Better is: higher by the scores in order, no value
    last; then shorter; then the lower index. Where the best is not `min_margin` above the median of those left (Llama 3's rejection
    sampling), none is kept (low_margin). Losers name the winner as their witness: not_best, or unscored:NAME where they have no value of
    the first score and the winner has one. A note counts what has no value, and says why.
    """
    gates = [parse_gate(text) for text in config.gate]
    scores = columns_for(run, [*config.by, *(gate.name for gate in gates)])
    rows = input_rows(run, "best", list(dict.fromkeys([*KEY, "finish_reason", "num_tokens", "response", *scores])))
    columns = sort_columns(run, rows, config.by, config.seed)
    values = [score_values(run, rows, gate.name) for gate in gates]
    answers = read_score(run, rows, config.answers)["detail"] if config.majority else None
    run.configure("best", to_mapping(config), free=("*",))

    lengths = rows["response"].str.len_chars().fill_null(0)
    table = rows.select(*KEY, "finish_reason", "num_tokens", no_response=pl.col("response").is_null())
    table = table.with_columns(
        row_name().alias("name"), (pl.lit(None, pl.String) if answers is None else answers).alias("answer"), lengths.alias("length")
    )
    if columns.width:  # the first score as it is stored, higher or lower being better
        own = columns["0"]
        table = table.with_columns((-own if config.by[0].startswith("-") else own).alias("own"), own.alias("better"))
    else:
        table = table.with_columns(own=pl.lit(None, pl.Float64), better=pl.lit(None, pl.Float64))
    order = best_first(columns, ties=[lengths, rows["sample_index"].fill_null(-1)])
    table = _with_ineligible(table, gates, values)[order].with_columns(place=pl.Series(order))
    table = _in_band(table, config, _cut(run))
    if config.majority:
        table = _voted(table, config.min_share)
    unscored = _without_score(run, rows, config, columns, table)
    table = _chosen(table, config).sort("place")

    without = table.group_by("example_id").agg((pl.col("rule").is_null()).any().alias("kept"))["kept"].not_().sum()
    num_prompts = rows["example_id"].n_unique()
    notes = [*([f"{without:,} of {num_prompts:,} prompts keep no sample"] if without else []), *unscored]
    if rows["sample_index"].null_count() == len(rows):
        notes.append("these rows are not samples of one prompt each: every row stood alone")
    told = {name: pl.col(name) for name in ("score", "threshold", "witness_id")}
    decisions = decision_table(table, "best", pl.col("rule"), **told)
    clear_controls(run, "best_")
    if config.controls:
        pool = (table["finish_reason"].fill_null("") != "length") & ~table["no_response"]
        notes += write_controls_of(run, "best", decisions, lengths, config.seed, pool, within_prompts=True)
    return record(run, "best", rows, decisions, notes)


def _with_ineligible(table: pl.DataFrame, gates: list[Gate], values: list[pl.Series]) -> pl.DataFrame:
    """Add rule, score, threshold and witness_id of the rows that are not eligible; null for those that are."""
    table = table.with_columns(value.alias(f"gate {place}") for place, value in enumerate(values))
    none = pl.lit(None, pl.Float64)
    cases = [
        (pl.col("finish_reason") == "length", pl.lit("truncated"), pl.col("num_tokens").cast(pl.Float64), none),
        (pl.col("no_response"), pl.lit("no_response"), none, none),
    ]
    for place, gate in enumerate(gates):
        value, threshold = pl.col(f"gate {place}"), pl.lit(gate.threshold)
        passes = gate.passes(value)
        cases += [(value.is_null(), pl.lit("unscored"), value, threshold), (~passes, pl.lit(f"gate:{gate.name}"), value, threshold)]
    first: dict[str, pl.Expr] = {"rule": pl.lit(None, pl.String), "score": none, "threshold": none}
    for case, *found in reversed(cases):
        first = {name: pl.when(case).then(what).otherwise(first[name]) for name, what in zip(first, found, strict=True)}
    return table.with_columns(**first, witness_id=pl.lit(None, pl.String))


def _reject(case: pl.Expr, rule: str, score: pl.Expr, threshold: pl.Expr, witness: pl.Expr | None = None) -> list[pl.Expr]:
    """Return the columns of a table in which the rows of a case, of those that are still eligible, are rejected."""
    case = pl.col("rule").is_null() & case
    found = {
        "rule": pl.lit(rule),
        "score": score,
        "threshold": threshold,
        "witness_id": pl.lit(None, pl.String) if witness is None else witness,
    }
    return [pl.when(case).then(what).otherwise(pl.col(name)).alias(name) for name, what in found.items()]


def _cut(run: Run) -> pl.DataFrame:
    """Return how many samples of each prompt `distill` left out since they were cut or empty."""
    found = run.ledger.scan().filter((pl.col("stage") == "distill") & (pl.col("action") == "rejected"))
    return found.group_by("example_id").agg(pl.len().alias("cut")).collect()


def _in_band(table: pl.DataFrame, config: BestConfig, cut: pl.DataFrame) -> pl.DataFrame:
    table = table.join(cut, on="example_id", how="left", maintain_order="left")
    rate = (pl.col("rule").is_null().sum() / (pl.len() + pl.col("cut").first().fill_null(0))).over("example_id")
    for rule, bound, outside in (
        ("min_pass_rate", config.min_pass_rate, pl.Expr.lt),
        ("max_pass_rate", config.max_pass_rate, pl.Expr.gt),
    ):
        if bound is not None:
            table = table.with_columns(rate.alias("rate"))
            table = table.with_columns(_reject(outside(pl.col("rate"), bound), rule, pl.col("rate"), pl.lit(bound)))
    return table


def _voted(table: pl.DataFrame, min_share: float) -> pl.DataFrame:
    """Reject what is not the answer of the majority; the rows come best first."""
    nothing = pl.lit(None, pl.Float64)
    table = table.with_columns(_reject(pl.col("answer").fill_null("") == "", "no_answer", nothing, nothing)).with_row_index("rank")
    votes = (
        table.filter(pl.col("rule").is_null())
        .group_by("example_id", "answer")
        .agg(pl.len().alias("votes"), pl.col("rank").min(), pl.col("name").sort_by("rank").first().alias("first"))
        .with_columns((pl.col("votes") / pl.col("votes").sum().over("example_id")).alias("share"))
        .sort(["votes", "rank"], descending=[True, False])  # of equals the one whose best row is better
        .with_columns(pl.col(name).first().over("example_id").alias(f"winner {name}") for name in ("answer", "share", "first"))
        .drop("rank", "votes", "first")
    )
    table = table.join(votes, on=["example_id", "answer"], how="left", maintain_order="left").sort("rank")
    share = pl.col("winner share")
    table = table.with_columns(_reject(share < min_share, "low_agreement", share, pl.lit(min_share)))
    lost = pl.col("answer") != pl.col("winner answer")
    return table.with_columns(_reject(lost, "not_majority", pl.col("share"), share, pl.col("winner first")))


def _without_score(run: Run, rows: pl.DataFrame, config: BestConfig, columns: pl.DataFrame, table: pl.DataFrame) -> list[str]:
    """Return a note for each score to choose by that some eligible rows of the table do not have: how many, and the reason of most."""
    eligible = table.filter(pl.col("rule").is_null())["place"].to_list()
    notes = []
    for by, values in zip(config.by, columns, strict=True):
        name, lacking = by.removeprefix("-"), values[eligible].is_null()
        if not 0 < lacking.sum() < len(eligible):  # where none has it, `sort_columns` has said so
            continue
        why = reason_of_none(run, rows[eligible].filter(lacking), name)
        notes.append(f"{lacking.sum():,} of {len(eligible):,} eligible rows have no score {name!r} and come last by it{why and f': {why}'}")
    return notes


def _chosen(table: pl.DataFrame, config: BestConfig) -> pl.DataFrame:
    """Reject all but the best eligible rows of each prompt; the rows come best first."""
    eligible = pl.col("rule").is_null()
    if config.min_margin is not None:
        better = pl.col("better").filter(eligible)
        margin = (better.max() - better.median()).over("example_id")
        table = table.with_columns(margin.alias("margin"))
        low = pl.col("margin").fill_null(0.0) < config.min_margin
        table = table.with_columns(_reject(low, "low_margin", pl.col("margin"), pl.lit(config.min_margin)))
    if config.keep_all:
        return table
    rank = eligible.cast(pl.Int64).cum_sum().over("example_id")
    first = [pl.col(name).filter(eligible).first().over("example_id").alias(f"best {name}") for name in ("own", "name")]
    table = table.with_columns(rank.alias("rank of prompt"), *first)
    lost, told = pl.col("rank of prompt") > config.keep, (pl.col("own"), pl.col("best own"), pl.col("best name"))
    if config.by:
        lacks = pl.col("own").is_null() & pl.col("best own").is_not_null()
        table = table.with_columns(_reject(lost & lacks, f"unscored:{config.by[0].removeprefix('-')}", *told))
    return table.with_columns(_reject(lost, "not_best", *told))
