"""The final model: saved whole or not at all, with its template and stop ids, then loaded again and held against what was trained."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.files import write_json
from ..core.models import ModelRef, cast, model_identity
from . import reloaded
from .data import Row
from .likelihood import answer_loss
from .merge import MOST_KL, load_adapter, load_base, merge_adapter, save_model

log = logging.getLogger(__name__)

CHECKED_ROWS = 8
LOST = 0.05  # of what an adapter has learned: less than that may go in rounding
TOLERANCE = 0.02  # of the loss: the same numbers in memory, perhaps on a GPU, and from a file on a CPU are apart by far less


def save_final(
    model: Any, start: ModelRef, chat: Chat, rows: Sequence[Row], room: Path, *, dtype: torch.dtype, facts: dict[str, Any]
) -> None:
    """Save a trained model to `room/final` in the number format of the model it began as, an adapter to `room/adapter` too.

    The adapter is merged, into the unpacked base where that was trained in 4 bits. `facts` go to sftkit.json beside the model.
    What rounding to that format takes from the trained model's loss on a few of `rows` is said (of 4 bits: from its adapter's on the
    base as it is). Raises UserError when what was saved does not compute the same on these as what was to be saved.
    """
    checked = sorted(rows, key=len)[:CHECKED_ROWS]
    trained = answer_loss(model, checked)
    final, adapted = room / "final", hasattr(model, "merge_and_unload")
    if adapted:
        asked = rows if next(model.parameters()).is_cuda else checked  # without a GPU few and short: it takes seconds
        _save_adapter(model, start, room / "adapter")
        if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
            model, packed = load_adapter(load_base(start), room / "adapter"), trained
            trained = answer_loss(model, checked)
            log.info("on the base in 4 bits the loss on %d rows is %.4f, on the base as it is %.4f", len(checked), packed, trained)
        model, kl, learned = merge_adapter(model, [row.ids[: row.answer_start] or row.ids for row in asked], dtype)
        if kl > MOST_KL:
            small = kl < LOST * learned
            log.log(
                logging.INFO if small else logging.WARNING,
                "merged and rounded to %s, the model is off the adapter by a KL of %.2g nats a token, and that off its base by %.2g%s",
                str(dtype).removeprefix("torch."), kl, learned,
                "" if small else ", not much more: use the adapter in train/adapter, or merge it in float32: sftkit train"
                " merge RUN -o FOLDER --dtype float32",
            )  # fmt: skip
        facts = {**facts, "merged": {"kl": kl, "learned": learned}}
    model = cast(model, dtype)
    rounded = answer_loss(model, checked)  # in memory: what a file is held against, since rounding is no damage
    if abs(rounded - trained) > TOLERANCE * max(trained, 1.0):
        cure = ", use the adapter in train/adapter, or merge it in float32: sftkit train merge RUN -o FOLDER --dtype float32"
        log.warning(
            "rounded to %s, the model has a loss of %.4f on %d rows, where the trained one had %.4f: what was learned is as small as the"
            " last digit of its weights. Train longer or with a higher learning rate%s",
            str(dtype).removeprefix("torch."), rounded, len(checked), trained, cure if adapted else "",
        )  # fmt: skip
    save_model(model, chat, final, facts)
    check_saved(final, chat, checked, rounded)


def _save_adapter(model: Any, start: ModelRef, folder: Path) -> None:
    if start.path is not None and start.path.is_file():  # transformers knows a .gguf file by its folder, in which others may be
        for each in model.peft_config.values():
            each.base_model_name_or_path = str(start.path)
    model.save_pretrained(folder, save_embedding_layers=False)  # which are not trained; PEFT would look for the base's config
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form with nothing filled in; the card is beside the final model
    write_json(folder / "sftkit.json", {"base": start.name, "identity": model_identity(start)})


def check_saved(folder: Path, chat: Chat, rows: Sequence[Row], before: float) -> None:
    """Have a fresh process load a saved model; raise UserError unless it renders, stops and computes as the one in memory did."""
    checkpoints = folder.with_name("checkpoints")
    kept = f"the saved model is in {folder}, the checkpoints are in {checkpoints}: the same command goes on from the last"
    try:
        saved = reloaded.reload_apart(folder, rows)
    except UserError as error:
        raise UserError(f"{error}; {kept}") from None
    if saved.fingerprint != chat.fingerprint():
        raise UserError(
            f"{folder}: the saved tokenizer renders or stops otherwise than the one that was trained with (stop ids {saved.stop_ids},"
            f" trained with {list(chat.stop_ids)}); the chat template was not saved whole; {kept}"
        )
    if not abs(saved.loss - before) <= TOLERANCE * max(before, 1.0):
        raise UserError(
            f"{folder}: the saved model has a loss of {saved.loss:.4f} on {len(rows)} rows, where it had {before:.4f} in memory: it was not"
            f" saved whole; {kept}"
        )
    log.info(
        "saved: %s; loaded again by a fresh process, its loss on %d rows is %.4f (before: %.4f)", folder, len(rows), saved.loss, before
    )
