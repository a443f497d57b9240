"""The ledger: what every stage did with every row, and the law that no row goes missing."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from .errors import UserError
from .example import Decision, row_id
from .files import write_atomically

SCHEMA = {
    "step": pl.Int32,  # order of the stages in this run, from 0
    "stage": pl.String,
    "example_id": pl.String,
    "sample_index": pl.Int32,
    "action": pl.String,
    "rule": pl.String,
    "score": pl.Float64,
    "threshold": pl.Float64,
    "witness_id": pl.String,
}

RowKey = tuple[str, int | None]  # (example_id, sample_index)


class ConservationError(AssertionError):
    """A stage lost, invented or repeated a row: a bug of the stage, never the user's mistake."""


class Ledger:
    """The decisions of a run, one Parquet file. Stages stand in the order in which they were recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pl.DataFrame:
        """Return all decisions, columns as in SCHEMA; empty when nothing was recorded yet."""
        if not self.path.exists():
            return pl.DataFrame(schema=SCHEMA)
        return pl.read_parquet(self.path)

    def stages(self) -> list[str]:
        """Return the recorded stages, in order."""
        return self.read().select("step", "stage").unique().sort("step")["stage"].to_list()

    def record(self, stage: str, rows: Sequence[RowKey], decisions: Iterable[Decision]) -> list[str]:
        """Write one stage's decisions for its input `rows`; return the later stages this made void.

        A stage that is recorded again replaces itself, and the stages after it are removed: they decided on rows
        that may no longer be there. Raises ConservationError unless every input row has exactly one decision.
        """
        decided = list(decisions)
        check_conservation(stage, rows, decided)
        before = self.read()
        order = before.select("step", "stage").unique().sort("step")
        steps = dict(zip(order["stage"], order["step"], strict=True))
        step = steps.get(stage, len(steps))
        void = [name for name, number in steps.items() if number > step]
        columns = [{"step": step, **asdict(decision)} for decision in decided]
        after = pl.DataFrame(columns, schema=SCHEMA) if columns else pl.DataFrame(schema=SCHEMA)
        with write_atomically(self.path) as temporary:
            pl.concat([before.filter(pl.col("step") < step), after]).write_parquet(temporary)
        return void

    def holds(self, stage: str, decisions: Sequence[Decision]) -> bool:
        """Say whether exactly these decisions of a stage are recorded: recording them again would make later stages void for nothing."""
        before = self.read().filter(pl.col("stage") == stage).drop("step")
        return not before.is_empty() and before.rows() == [tuple(getattr(each, name) for name in before.columns) for each in decisions]

    def summary(self) -> pl.DataFrame:
        """Return one row per stage and rule: step, stage, action, rule, rows."""
        return self.read().group_by("step", "stage", "action", "rule").agg(pl.len().alias("rows")).sort("step", "action", "rule")

    def about(self, example_id: str) -> pl.DataFrame:
        """Return every decision about the examples whose id begins so (`ID/INDEX`: about that sample), in order; none if there are none."""
        wanted, _, index = example_id.partition("/")
        found = self.read().filter(pl.col("example_id").str.starts_with(wanted))
        if index:
            found = found.filter(pl.col("sample_index").is_null() | (pl.col("sample_index").cast(pl.String) == index))
        exact = found.filter(pl.col("example_id") == wanted)
        return (exact if exact.height else found).sort("step", "sample_index")

    def why(self, example_id: str) -> pl.DataFrame:
        """Return every decision about one example (an id or the beginning of one), in order. Raises UserError for none, or several."""
        found = self.about(example_id)
        ids = found["example_id"].unique().sort()
        if len(ids) > 1:
            raise UserError(f"{example_id} is the beginning of {len(ids)} ids: give more of it, as {ids[0]}")
        if found.is_empty():
            raise UserError(f"{self.path}: no decision about {example_id!r}; ids stand in curate/dataset.jsonl and in ledger.parquet")
        return found


def check_conservation(stage: str, rows: Sequence[RowKey], decisions: Sequence[Decision]) -> None:
    """Raise ConservationError unless input = kept + rejected + failed, row by row, and each removal has its rule."""
    expected, decided = Counter(rows), Counter((d.example_id, d.sample_index) for d in decisions)
    repeated = [row_id(*key) for key, count in (expected | decided).items() if count > 1]
    lost, invented = expected - decided, decided - expected
    if repeated or lost or invented:
        examples = {
            "repeated": repeated[:3],
            "lost": [row_id(*k) for k in list(lost)[:3]],
            "invented": [row_id(*k) for k in list(invented)[:3]],
        }
        raise ConservationError(f"{stage}: {len(rows)} rows in, {len(decisions)} decided: {examples}")
    for decision in decisions:
        if decision.stage != stage:
            raise ConservationError(f"{stage}: a decision carries the stage {decision.stage!r}")
        if decision.action != "kept" and not decision.rule:
            raise ConservationError(f"{stage}: {row_id(decision.example_id, decision.sample_index)} was {decision.action} without a rule")
