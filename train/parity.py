"""Training sees the prompts that the model is asked with afterwards: the same token ids, held against each other row by row."""

import hashlib
from collections.abc import Sequence
from typing import Any

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import evenly_spaced
from .data import Row

CHECKED_ROWS = 32


def checked(rows: Sequence[Row]) -> Sequence[Row]:
    """Return up to 32 rows, drawn evenly: those that `check_parity` looks at."""
    return evenly_spaced(rows, CHECKED_ROWS)


def check_parity(rows: Sequence[Row], chat: Chat) -> dict[str, Any]:
    """Hold the ids before the last answer of up to 32 rows, drawn evenly, against those that evaluation and engines ask with.

    Return what sftkit.json keeps: how many rows, and a digest of their prompts. Raises UserError naming a row that differs.
    """
    looked_at = checked(rows)
    digest = hashlib.sha256()
    for row in looked_at:
        turn = max(place for place, message in enumerate(row.messages) if message["role"] == "assistant")
        if not turn:  # it begins with its answer
            continue
        trained = row.ids[: row.answer_start]
        asked = [chat.prompt(row.messages[:turn], thinking=thinking, tools=row.tools) for thinking in (False, True)]  # with a thought: on
        if trained not in asked:
            place = next((each for each, pair in enumerate(zip(trained, asked[0], strict=False)) if pair[0] != pair[1]), None)
            place = min(len(trained), len(asked[0])) if place is None else place
            raise UserError(
                f"{row.source}: is trained on after a prompt that ends {_end(chat, trained)}, and the model is asked with one that ends"
                f" {_end(chat, asked[0])} (they part at token {place}); its chat template writes rows and prompts differently: give rows"
                " as it wants them (with a thought, where its prompts begin one), or a model with another template"
            )
        digest.update(repr(trained).encode())
    return {"rows": len(looked_at), "digest": digest.hexdigest()[:16]}


def _end(chat: Chat, ids: Sequence[int]) -> str:
    return repr(str(chat.tokenizer.decode(list(ids[-12:]))))
