"""The ledger: what every stage did with every row, and the law that no row goes missing."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import polars as pl

from .errors import UserError
from .example import Decision, row_id
from .files import read_parquet, scan_parquet, write_atomically

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
DECIDED = {name: kind for name, kind in SCHEMA.items() if name != "step"}  # columns of decisions that are given as a table
KEY = ["example_id", "sample_index"]
ACTIONS = ("kept", "rejected", "failed")

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
        return read_parquet(self.path)

    def scan(self) -> pl.LazyFrame:
        """Return all decisions as a plan that reads only what is asked of it."""
        return scan_parquet(self.path) if self.path.exists() else pl.LazyFrame(schema=SCHEMA)

    def steps(self) -> dict[str, int]:
        """Return the place of each recorded stage, in order."""
        found = self.scan().select("stage", "step").unique().sort("step").collect()
        return dict(zip(found["stage"], found["step"], strict=True))

    def stages(self) -> list[str]:
        """Return the recorded stages, in order."""
        return list(self.steps())

    def record(self, stage: str, rows: pl.DataFrame | Sequence[RowKey], decisions: pl.DataFrame | Iterable[Decision]) -> list[str]:
        """Write one stage's decisions for its input `rows`; return the later stages this made void.

        Many decisions come as a table, columns as in DECIDED, for rows given by the columns KEY. A stage that is recorded again
        replaces itself, and the stages after it are removed: they decided on rows that may no longer be there. Raises
        ConservationError unless every input row has exactly one decision.
        """
        decided = table_of(decisions)
        check_conservation(stage, rows, decided)
        steps = self.steps()
        step = steps.get(stage, len(steps))
        before = self.scan().filter(pl.col("step") < step)
        after = decided.lazy().select(pl.lit(step, pl.Int32).alias("step"), *DECIDED)
        with write_atomically(self.path) as temporary:
            pl.concat([before, after]).sink_parquet(temporary, engine="streaming")
        return [name for name, number in steps.items() if number > step]

    def holds(self, stage: str, decisions: pl.DataFrame | Iterable[Decision]) -> bool:
        """Say whether exactly these decisions of a stage are recorded: recording them again would make later stages void for nothing."""
        before = self.scan().filter(pl.col("stage") == stage).select(list(DECIDED)).collect()
        return not before.is_empty() and before.equals(table_of(decisions))

    def summary(self) -> pl.DataFrame:
        """Return one row per stage and rule: step, stage, action, rule, rows."""
        counts = self.scan().group_by("step", "stage", "action", "rule").agg(pl.len().alias("rows"))
        return counts.sort("step", "action", "rule").collect(engine="streaming")

    def about(self, example_id: str) -> pl.DataFrame:
        """Return every decision about the examples whose id begins so (`ID/INDEX`: about that sample), in order; none if there are none."""
        wanted, _, index = example_id.partition("/")
        found = self.scan().filter(pl.col("example_id").str.starts_with(wanted)).collect(engine="streaming")
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


def table_of(decisions: pl.DataFrame | Iterable[Decision]) -> pl.DataFrame:
    """Return decisions as a table, columns as in DECIDED."""
    if isinstance(decisions, pl.DataFrame):
        return decisions.select([pl.col(name).cast(kind) for name, kind in DECIDED.items()])
    return pl.DataFrame(list(map(attrgetter(*DECIDED), decisions)), schema=DECIDED, orient="row")


def check_conservation(stage: str, rows: pl.DataFrame | Sequence[RowKey], decisions: pl.DataFrame | Iterable[Decision]) -> None:
    """Raise ConservationError unless input = kept + rejected + failed, row by row, and each removal has its rule."""
    decided = table_of(decisions)
    given = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(list(rows), schema={name: SCHEMA[name] for name in KEY}, orient="row")
    if not _is_each_once(given, decided):
        _name_faults(stage, given, decided)
    action, rule = pl.col("action"), pl.col("rule")
    for fault, told in (
        (pl.col("stage").ne_missing(stage), "{row}: a decision carries the stage {stage!r}"),
        (~action.is_in(ACTIONS).fill_null(value=False), "{row} was {action!r}, which is none of kept, rejected and failed"),
        ((action != "kept") & (rule.is_null() | (rule == "")), "{row} was {action} without a rule"),
    ):
        first = decided.lazy().filter(fault).head(1).collect()
        for decision in first.iter_rows(named=True):
            row = row_id(decision["example_id"], decision["sample_index"])
            raise ConservationError(f"{stage}: {told.format(row=row, stage=decision['stage'], action=decision['action'])}")


def _is_each_once(given: pl.DataFrame, decided: pl.DataFrame) -> bool:
    """Say, of rows in the order in which they were given, that they are the same and all different; False says nothing yet.

    Numbers made of their keys that are all different come of keys that are.
    """
    if not given.select(KEY).equals(decided.select(KEY)):
        return False
    numbers = given.lazy().select(pl.struct(KEY).hash().n_unique())
    return bool(numbers.collect().item() == len(given))


def _name_faults(stage: str, given: pl.DataFrame, decided: pl.DataFrame) -> None:
    both = pl.concat([given.select(*KEY, came=1, went=0), decided.select(*KEY, came=0, went=1)])
    counts = both.lazy().group_by(KEY, maintain_order=True).agg(pl.col("came").sum(), pl.col("went").sum())
    wrong = counts.filter((pl.col("came") != 1) | (pl.col("went") != 1)).collect()
    if len(wrong):
        came, went = pl.col("came"), pl.col("went")
        faults = {"repeated": pl.max_horizontal(came, went) > 1, "lost": came > went, "invented": went > came}
        examples = {name: [row_id(*key) for key in wrong.filter(fault).select(KEY).head(3).iter_rows()] for name, fault in faults.items()}
        raise ConservationError(f"{stage}: {len(given)} rows in, {len(decided)} decided: {examples}")
