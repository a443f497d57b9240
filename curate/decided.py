"""What a stage decided: in the ledger, and the rows that are left as the run's data set, with its card."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from ..core.example import Decision
from ..core.ledger import KEY, RowKey, table_of
from ..core.run import Run
from .card import write_card
from .controls import clear_controls
from .plots import write_plots
from .rows import DATASET, EXPORTED, load_rows, scan_rows, write_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage did: rows in, the rows kept (their columns KEY), and how many each rule removed."""

    stage: str
    num_input: int
    kept: pl.DataFrame
    removed: dict[str, int]  # by rule, most first
    notes: tuple[str, ...] = ()  # what else a person should know


def record(
    run: Run, stage: str, rows: pl.DataFrame | Sequence[RowKey], decisions: pl.DataFrame | Iterable[Decision], notes: Sequence[str] = ()
) -> Outcome:
    """Enter a stage's decisions on its input `rows` in the ledger and make the kept rows the run's data set.

    Says which later stages became void; decisions that stand there already make none void. The card is written last.
    Raises ConservationError unless every input row has exactly one decision.
    """
    decided, is_kept = table_of(decisions), pl.col("action") == "kept"
    kept = decided.filter(is_kept).select(KEY)
    if not run.ledger.holds(stage, decided):
        for name in DATASET:  # of the decisions before: killed from here on, the run has none rather than a wrong one
            (run.room("curate") / name).unlink(missing_ok=True)
        steps = run.ledger.steps()
        _clear_files_of(run, [name for name, step in steps.items() if step > steps.get(stage, len(steps))])
        void = run.ledger.record(stage, rows, decided)
        if void:
            log.info(
                "%s: %s stood on the former rows and %s void now: run again", stage, ", ".join(void), "is" if len(void) == 1 else "are"
            )
    if run.ledger.stages()[-1] == stage:
        write_dataset(scan_rows(run, after=stage, columns=EXPORTED), run.room("curate"))
        _write_card(run, kept)
    counts = decided.filter(~is_kept).group_by("rule", maintain_order=True).len().sort("len", descending=True, maintain_order=True)
    removed: dict[str, int] = dict(counts.iter_rows())
    if kept.is_empty() and len(decided):
        rule, count = next(iter(removed.items()))
        log.warning("%s kept none of %s rows; the rule %r alone removed %s", stage, f"{len(decided):,}", rule, f"{count:,}")
    return Outcome(stage, len(decided), kept, removed, tuple(notes))


def take_back(run: Run, stage: str) -> list[str]:
    """Take back the decisions of a stage and of those after it; return their names. What the stage before kept is the data set again."""
    stages = run.ledger.stages()
    place = stages.index(stage)
    base = run.ledger.scan().filter(pl.col("stage") == stages[place - 1]).drop("step").collect()
    for name in DATASET:
        (run.room("curate") / name).unlink(missing_ok=True)
    _clear_files_of(run, stages[place:])
    run.ledger.record(stages[place - 1], base, base)
    record(run, stages[place - 1], base, base)
    return stages[place:]


FILES = {"heldout": "heldout.jsonl", "select": "selection.parquet", "decontaminate": "contamination.parquet"}


def _clear_files_of(run: Run, void: Sequence[str]) -> None:
    """Remove what stages wrote that are void: controls drawn beside rows no longer chosen, held-out rows that are in the data set again."""
    for stage in void:
        clear_controls(run, "" if stage == "select" else f"{stage}_")
        if stage in FILES:
            (run.room("curate") / FILES[stage]).unlink(missing_ok=True)


def _write_card(run: Run, kept: pl.DataFrame) -> None:
    flags = kept.with_columns(kept=pl.lit(value=True))
    rows = load_rows(run, all=True, columns=[*KEY, "source", "num_tokens"])
    rows = rows.join(flags, on=KEY, how="left", nulls_equal=True, maintain_order="left").with_columns(pl.col("kept").fill_null(value=False))
    write_card(run, rows.filter("kept"), write_plots(run, rows))


def decision_table(rows: pl.DataFrame, stage: str, rule: pl.Expr, **told: pl.Expr) -> pl.DataFrame:
    """Return one decision per row: rejected by `rule`, kept where that is null; `told` are score, threshold and witness_id."""
    return table_of(
        rows.select(
            *KEY,
            stage=pl.lit(stage),
            action=pl.when(rule.is_null()).then(pl.lit("kept")).otherwise(pl.lit("rejected")),
            rule=rule.fill_null(""),
            **{name: told.get(name, pl.lit(None)) for name in ("score", "threshold", "witness_id")},
        )
    )
