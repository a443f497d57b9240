"""Set rows aside for evaluation: whole prompts, chosen by their content, so that no run trains on what it is tested on."""

import hashlib

import polars as pl

from ..core.errors import UserError
from ..core.example import Decision
from ..core.run import Run
from .rows import export_rows, load_rows, record


def hold_out(run: Run, count: int, *, seed: int = 0) -> pl.DataFrame:
    """Move `count` prompts, with all their samples, to `curate/heldout.jsonl`; return the rows that stay.

    The order of the hash of (seed, example id) decides, so a prompt's place does not depend on the other rows.
    Raises UserError when fewer than `count` + 1 prompts are there.
    """
    rows = load_rows(run)
    ids = rows["example_id"].unique().to_list()
    if len(ids) <= count:
        raise UserError(f"{run.path}: {len(ids)} prompts are left, too few to hold out {count}; hold out fewer, or bring more prompts")
    held = set(sorted(ids, key=lambda each: hashlib.sha256(f"{seed}/{each}".encode()).digest())[:count])
    keys = list(zip(rows["example_id"].to_list(), rows["sample_index"].to_list(), strict=True))
    decisions = [
        Decision(example_id, index, "heldout", *(("rejected", "heldout") if example_id in held else ("kept",)))
        for example_id, index in keys
    ]
    is_held = pl.col("example_id").is_in(list(held))
    export_rows(rows.filter(is_held), run.room("curate") / "heldout.jsonl")
    record(run, "heldout", rows, decisions)
    return rows.filter(~is_held)
