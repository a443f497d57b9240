"""Set rows aside for evaluation: whole prompts, chosen by their content, so that no run trains on what it is tested on."""

import hashlib

import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.run import Run
from .decide_config import HeldoutConfig
from .decided import Outcome, decision_table, record
from .rows import EXPORTED, export_rows, input_rows


def hold_out(run: Run, config: HeldoutConfig) -> Outcome:
    """Move prompts, with all their answers, to `curate/heldout.jsonl`, as the stage "heldout" (rule heldout).

    The order of the hash of (seed, example id) decides, so a prompt's place does not depend on rows of other prompts. Rows with the
    same prompt, letter by letter, go together under the smallest of their ids: answers that were imported each by itself, and copies
    (`ID~2`). Raises UserError when nothing would be left.
    """
    rows = input_rows(run, "heldout", (*EXPORTED, "prompt"))
    own = pl.col("example_id").str.extract("^([^~]*)")
    asked = pl.when(pl.col("prompt") == "").then(own).otherwise(own.min().over("prompt"))
    rows = rows.with_columns(asked=asked).drop("prompt")
    prompts = rows["asked"].unique().to_list()
    if len(prompts) <= config.prompts:
        raise UserError(
            f"{run.path}: {len(prompts):,} prompts are left, too few to hold out {config.prompts:,}; hold out fewer, or bring more prompts"
        )
    run.configure("heldout", to_mapping(config), free=("*",))
    held = sorted(prompts, key=lambda each: hashlib.sha256(f"{config.seed}/{each}".encode()).digest())[: config.prompts]
    aside = pl.col("asked").is_in(held)
    export_rows(rows.filter(aside), run.room("curate") / "heldout.jsonl")
    return record(run, "heldout", rows, decision_table(rows, "heldout", pl.when(aside).then(pl.lit("heldout"))))
