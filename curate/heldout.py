"""Set rows aside for evaluation: whole prompts, chosen by their content, so that no run trains on what it is tested on."""

import hashlib

import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.example import Decision
from ..core.run import Run
from .config import HeldoutConfig
from .rows import Outcome, export_rows, input_rows, keys, record


def hold_out(run: Run, config: HeldoutConfig) -> Outcome:
    """Move prompts, with all their answers, to `curate/heldout.jsonl`, as the stage "heldout" (rule heldout).

    The order of the hash of (seed, example id) decides, so a prompt's place does not depend on the other rows; copies of a prompt
    (`ID~2`) go with it. Raises UserError when nothing would be left.
    """
    rows = input_rows(run, "heldout")
    names = keys(rows)
    prompts = {example_id.partition("~")[0] for example_id, _ in names}
    if len(prompts) <= config.prompts:
        raise UserError(
            f"{run.path}: {len(prompts):,} prompts are left, too few to hold out {config.prompts:,}; hold out fewer, or bring more prompts"
        )
    run.configure("heldout", to_mapping(config), free=("*",))
    held = set(sorted(prompts, key=lambda each: hashlib.sha256(f"{config.seed}/{each}".encode()).digest())[: config.prompts])
    is_held = [example_id.partition("~")[0] in held for example_id, _ in names]
    export_rows(rows.filter(pl.Series(is_held)), run.room("curate") / "heldout.jsonl")
    decisions = [
        Decision(*name, "heldout", *(("rejected", "heldout") if aside else ("kept",))) for name, aside in zip(names, is_held, strict=True)
    ]
    return record(run, "heldout", rows, decisions)
