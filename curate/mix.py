"""Mix several sources in proportions, or by a temperature, into one data set; a row is repeated only where that is asked for."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError, unknown_name
from ..core.files import read_parquet, write_atomically
from ..core.formats import read_examples
from ..core.run import Run
from ..core.sources import hash_files
from .config import ImportConfig
from .decide_config import MixConfig
from .decided import Outcome, decision_table, record
from .intake import columns_of, digest_of
from .rows import KEY, STORED, input_rows, load_rows, row_name
from .scored import columns_for, random_numbers, score_values

log = logging.getLogger(__name__)

FROM_FILE = r":\d+$"  # a row's source is FILE:ROW


REPEAT = r"~r(\d+)$"  # how the id of a repeat ends
DECISIVE = ("example_id", "sample_index", "messages", "reference", "meta")  # of a run's rows: they may have been moved, and counted since
REDRAWN = ("shares", "temperature", "budget", "seed")  # they only say which of the gathered rows are taken, unless some are repeated


def mix(sources: Sequence[str], out: Path | None, config: MixConfig) -> Outcome:
    """Mix runs and data files into the run `out`, as the stages "import" (all their rows, and repeats) and "mix" (what is taken).

    One source is parted by the files that its rows come from; without `out` it is a run, and decides on its own rows. Shares are
    those of the config, or sizes to the power 1/temperature (Raffel et al. 2020, T5). Rows are taken in the order of a number
    drawn from the seed and their id; what is left over is rejected as over_share. A row that is taken again has a row of its own,
    ID~rN, which the ledger says is a repeat of the first. Other shares, budget or seed take anew from the rows that are there.
    Raises UserError for a source too small for its share, and in a folder of other sources, or of sources that have changed since.
    """
    if out is None:
        if len(sources) != 1:
            raise UserError("mix: give -o RUN, the folder that the rows of several sources are taken into")
        Run.open(Path(sources[0]))
        with Run.create(Path(sources[0])) as run:
            return _decide(run, config, None, to_mapping(config))
    with Run.create(out) as run:
        if (run.path / "curate" / "prompts.parquet").exists():
            raise UserError(f"{out}: holds the answers of a teacher already; give another folder for the mixture")
        path = run.path / "curate" / "rows.parquet"
        if "sources" not in run.config().get("mix", {}) and run.ledger.stages():  # prompts that have grown, too
            raise UserError(f"{out}: holds other rows already; give another folder for the mixture")
        is_new = not path.exists() or "import" not in run.ledger.stages()
        rows = _repeated(_gathered(sources), config) if is_new else None  # what is refused here leaves the folder free
        found = {} if is_new else run.config().get("mix", {})
        content = [_content(each) for each in sources] if is_new else found.get("content")
        settings = {"sources": [str(each) for each in sources], "content": content, **to_mapping(config)}
        before = {} if config.repeat > 1 else found
        gathered = {**settings, **{name: before[name] for name in REDRAWN if name in before}}
        run.configure("mix", gathered, free=("*",) if is_new else ())
        if not is_new and any(then and now and then != now for then, now in zip(content or (), map(_content, sources), strict=False)):
            raise UserError(f"{out}: holds the rows of its sources as they were then, and they have others now; give another folder")
        if rows is not None:
            with write_atomically(path) as temporary:
                rows.drop("tokens", "first").write_parquet(temporary)
            named = rows.select(*KEY, "first")
            kept = decision_table(named, "import", pl.lit(None, pl.String), witness_id=pl.col("first"))
            record(
                run,
                "import",
                named,
                kept.with_columns(rule=pl.when(pl.col("witness_id").is_not_null()).then(pl.lit("repeat")).otherwise("rule")),
            )
        return _decide(run, config, path, settings)


def _decide(run: Run, config: MixConfig, path: Path | None, settings: Mapping[str, Any]) -> Outcome:
    rows = input_rows(run, "mix", [*KEY, "source", *(columns_for(run, ["num_tokens"]) if config.budget_tokens else [])])
    if path is None:
        if config.repeat > 1:
            raise UserError("mix: rows are repeated only into a new run; give -o RUN")
        rows = rows.with_columns(part=_file_of(rows))
    else:
        parts = read_parquet(path, [*KEY, "part"])
        rows = rows.join(parts, on=KEY, how="left", nulls_equal=True, maintain_order="left")
    tokens = score_values(run, rows, "num_tokens") if config.budget_tokens else None
    is_repeat = rows["example_id"].str.contains(REPEAT)
    sizes = _sizes(rows.filter(~is_repeat), None if tokens is None else tokens.filter(~is_repeat))
    wanted = quotas(sizes, config)
    run.configure("mix", settings, free=("*",))
    taken = pl.Series(_taken(rows, tokens, wanted, config.seed))
    shares = ", ".join(
        f"{part} {kept:,} of {size:,} rows"
        for part, kept, size in rows.with_columns(taken=taken)
        .group_by("part", maintain_order=True)
        .agg(pl.col("taken").sum(), pl.len())
        .iter_rows()
    )
    rule = pl.when(taken).then(None).otherwise(pl.lit("over_share"))
    notes = [shares]
    repeats = int((is_repeat & taken).sum())
    if repeats:
        notes.append(f"{repeats:,} of the rows taken repeat another one, as --repeat {config.repeat} allows")
    return record(run, "mix", rows, decision_table(rows, "mix", rule), notes)


def quotas(sizes: Mapping[str, float], config: MixConfig) -> dict[str, float]:
    """Return how many rows (or tokens) each part gives: its share of the budget, in rows by largest remainder.

    Without a budget it is the largest mixture that the repeats allow. Raises UserError, naming what would do, where a part is
    too small.
    """
    shares = shares_of(sizes, config)
    budget: float | None = config.budget_tokens if config.budget_tokens is not None else config.budget
    whole = budget is None or config.budget_tokens is None
    most = min(config.repeat * sizes[part] / share for part, share in shares.items() if share)
    if budget is None:
        budget = math.floor(most + 1e-9)
    exact = {part: budget * share for part, share in shares.items()}
    if whole:
        found = {part: math.floor(value + 1e-9) for part, value in exact.items()}
        rest = sorted(exact, key=lambda part: (found[part] - exact[part], list(exact).index(part)))
        for part in rest[: round(budget - sum(found.values()))]:
            found[part] += 1
        exact = dict(found)
    for part, wanted in exact.items():
        if wanted > config.repeat * sizes[part] + 1e-9:
            unit = "rows" if whole else "tokens"
            needed = math.ceil(wanted / sizes[part])
            raise UserError(
                f"mix: {part} has {sizes[part]:,.0f} {unit}, its share of {budget:,.0f} is {wanted:,.0f}; give a budget of "
                f"{math.floor(most):,} or less, another share, or --repeat {needed} to take its rows {needed} times"
            )
    return exact


def shares_of(sizes: Mapping[str, float], config: MixConfig) -> dict[str, float]:
    """Return the share of each part, 1 together. Raises UserError for a part that is not there or has none."""
    if not config.shares:
        largest = max(sizes.values())  # scaled by it, no power is too large for a number
        weights = {part: (size / largest) ** (1 / config.temperature) for part, size in sizes.items()}
    else:
        for part in config.shares:
            if part not in sizes:
                raise unknown_name("source", part, sizes, "mix")
        missing = [part for part in sizes if part not in config.shares]
        if missing:
            raise UserError(f"mix: no share for {', '.join(missing)}; give each source one, 0 leaves it out")
        weights = {part: config.shares[part] for part in sizes}
    total = sum(weights.values())
    return {part: weight / total for part, weight in weights.items()}


def _taken(rows: pl.DataFrame, tokens: pl.Series | None, wanted: Mapping[str, float], seed: int) -> np.ndarray:
    """Say of each row whether it is taken: of each part the beginning of a random order that its quota holds, repeats last."""
    table = (
        rows.select("part", "example_id", "sample_index")
        .with_row_index("row")
        .with_columns(
            cost=pl.lit(1.0) if tokens is None else tokens,
            time=pl.col("example_id").str.extract(REPEAT).cast(pl.Int64).fill_null(1),
            number=pl.Series(random_numbers(rows, seed)),
        )
    )
    ordered = table.sort("time", "number", "row").with_columns(spent=pl.col("cost").cum_sum().over("part"))
    fits = ordered.with_columns(fits=pl.col("spent") <= pl.col("part").replace_strict(dict(wanted), return_dtype=pl.Float64) + 1e-9)
    return fits.sort("row")["fits"].to_numpy()


def _sizes(rows: pl.DataFrame, tokens: pl.Series | None) -> dict[str, float]:
    if tokens is not None and tokens.null_count():
        raise UserError(
            f"mix: {tokens.null_count():,} of {len(rows):,} rows have no token count, which budget_tokens needs; give --budget ROWS, "
            "or mix runs that were scored by num_tokens:model=MODEL"
        )
    if tokens is not None and (tokens < 0).any():
        raise UserError(f"mix: {(tokens < 0).sum():,} of {len(rows):,} rows have a token count below 0, which budget_tokens cannot add")
    cost = pl.lit(1.0) if tokens is None else tokens
    table = rows.select("part").with_columns(cost.alias("cost")).group_by("part", maintain_order=True).agg(pl.col("cost").sum())
    return dict(table.iter_rows())


def _file_of(rows: pl.DataFrame) -> pl.Series:
    return rows["source"].fill_null("").str.replace(FROM_FILE, "")


def _gathered(sources: Sequence[str]) -> pl.DataFrame:
    """Return the rows of all sources, columns as in STORED, with the part that each belongs to and its tokens; ids are unique."""
    names = [re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\.gz)?$", "", Path(each).name) or each for each in sources]
    names = [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"mix: {next(name for name in names if names.count(name) > 1)} is given twice; a source is repeated by --repeat")
    tables: list[pl.DataFrame] = []
    seen: set[str] = set()
    for number, (name, source) in enumerate(zip(names, sources, strict=True), start=1):
        table = _rows_of(source)
        again = _renamed(table["example_id"].unique(maintain_order=True).to_list(), seen, f"~m{number}")
        table = table.with_columns(pl.col("example_id").replace(again), part=_file_of(table) if len(sources) == 1 else pl.lit(name))
        seen.update(table["example_id"])
        tables.append(table)
    return pl.concat(tables)


def _content(source: str) -> str | None:
    """Return a hash of what a source holds; None for what does not lie here, or not any more."""
    path = Path(source).expanduser()
    if not (Path(source) / "config.yaml").exists():
        return hash_files(path) if path.exists() else None
    return digest_of(load_rows(Run.open(Path(source)), columns=DECISIVE))


def _renamed(names: Sequence[str], seen: set[str], mark: str) -> dict[str, str]:
    """Return another id for each of a source's ids that was seen before, or that of a repeat: it is a row like any other here."""
    others = {}
    used = seen.union(names)
    for name in names:
        if name in seen or re.search(REPEAT, name):
            others[name] = name + mark
            while others[name] in used:
                others[name] += mark
            used.add(others[name])
    return others


def _rows_of(source: str) -> pl.DataFrame:
    if (Path(source) / "config.yaml").exists():
        run = Run.open(Path(source))
        rows = load_rows(run, columns=list(dict.fromkeys([*STORED, *columns_for(run, ["num_tokens"])])))
        if rows.is_empty():
            raise UserError(f"{source}: no row of this run is left to mix")
        return rows.select(*STORED).with_columns(tokens=score_values(run, rows, "num_tokens"))
    rows = pl.DataFrame(columns_of(read_examples(source), ImportConfig()), schema=STORED)
    return rows.with_columns(tokens=pl.col("num_tokens").cast(pl.Float64))


def _repeated(rows: pl.DataFrame, config: MixConfig) -> pl.DataFrame:
    """Return the rows with a further one, ID~rN, for each time that a row is taken again; `first` is the row that it repeats."""
    rows = rows.with_columns(first=pl.lit(None, pl.String))
    tokens = rows["tokens"] if config.budget_tokens is not None else None
    if tokens is not None:
        rows = rows.with_columns(num_tokens=pl.col("num_tokens").fill_null(pl.col("tokens").cast(pl.Int64)))
    sizes = _sizes(rows, tokens)
    wanted = quotas(sizes, config)
    copies = [
        rows.filter((pl.col("part") == part) & (pl.lit(time) <= math.ceil(quota / sizes[part]))).with_columns(
            first=row_name(), example_id=pl.col("example_id") + f"~r{time}"
        )
        for part, quota in wanted.items()
        for time in range(2, config.repeat + 1)
    ]
    return pl.concat([rows, *copies])
