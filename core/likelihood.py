"""How probable a model finds the answers of rows: rendered as in training, each computed once for a model's weights."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from .engines.base import ScoreRequest
from .errors import UserError
from .example import Example, Message, content_id
from .files import write_atomically
from .formats import split_prompt
from .named_models import NamedModel
from .progress import Progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 10.0
STORED: dict[str, Any] = {"key": pl.String, "logprobs": pl.List(pl.Float32)}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out row. `error` says why no model can be scored on it."""

    example: Example
    prompt_id: str  # rows of the same prompt are not independent
    num_bytes: int  # of its answers, in UTF-8
    error: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """A row as one model reads it. `mask` is True at the tokens of the answers, `ends` where one of these ends a turn."""

    key: str = ""
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    ends: tuple[bool, ...] = ()  # one for each token that the mask is True at
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What one model gives the answers of one row, in nats; or why not."""

    key: str | None = None
    num_tokens: int | None = None  # of the answers, with their ends of turn
    sum_logprob: float | None = None
    num_ends: int | None = None  # of these tokens, those that end a turn
    end_logprob: float | None = None
    error: str | None = None


class LogprobStore:
    """Log-probabilities of the tokens of answers by key, in one Parquet file that is saved every few seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = time.monotonic()
        self._new = 0
        self._known: dict[str, NDArray[np.float32]] = {}
        if path.exists():
            for key, values in pl.read_parquet(path).iter_rows():
                self._known[key] = np.asarray(values, dtype=np.float32)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> NDArray[np.float32]:
        return self._known[key]

    def put(self, key: str, values: Sequence[float]) -> None:
        """Take what was computed; it is on disk some seconds later."""
        self._known[key] = np.asarray(values, dtype=np.float32)
        self._new += 1
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write everything to disk, if anything is new."""
        if self._new:
            columns = {"key": list(self._known), "logprobs": [each.tolist() for each in self._known.values()]}
            with write_atomically(self._path) as temporary:
                pl.DataFrame(columns, schema=STORED).write_parquet(temporary)
        self._new, self._saved = 0, time.monotonic()


def read_row(example: Example) -> HeldOut:
    """Look at a row without a model. Rules: `no_assistant_turn`, `empty_answer`."""
    answers = [_text(each) for each in example.messages if each["role"] == "assistant"]
    error = None if answers else "no_assistant_turn"
    if any(not each.strip() for each in answers):
        error = "empty_answer"
    return HeldOut(example, content_id(split_prompt(example)[0]), sum(len(each.encode()) for each in answers), error)


def _text(answer: Message) -> str:
    """Return what the bytes of an answer are counted of: its content, and its tool calls as compact JSON."""
    calls = answer.get("tool_calls")
    written = json.dumps(calls, ensure_ascii=False, separators=(",", ":"), default=str) if calls else ""
    return (answer.get("content") or "") + written


def likelihoods(model: NamedModel, rows: Sequence[HeldOut], store: LogprobStore) -> tuple[list[Likelihood], int]:
    """Return what a model gives each row, and how many of them were computed now: those that were not stored."""
    readings = [_read(model, row) for row in rows]
    missing = {each.key: each for each in readings if not each.error and each.key not in store}
    errors = _compute(model, missing, store) if missing else {}
    return [_sum(each, store, errors) for each in readings], len(missing) - len(errors)


def _read(model: NamedModel, row: HeldOut) -> Reading:
    """Render a row for a model. Rules: `refused_by_template`, `turn_left_out`, `no_end_of_turn`, `too_long`."""
    if row.error:
        return Reading(error=row.error)
    chat = model.chat
    assert chat is not None  # only servers render for themselves, and they tell no probabilities
    try:
        rendered = chat.render(row.example.messages)
    except UserError as error:
        log.warning("%s: %s", row.example.source, error)
        return Reading(error="refused_by_template")
    last = [here and not following for here, following in zip(rendered.mask, [*rendered.mask[1:], False], strict=True)]
    ends = [here and token in chat.stop_ids for here, token in zip(last, rendered.ids, strict=True)]
    if sum(last) < sum(each["role"] == "assistant" for each in row.example.messages):
        return Reading(error="turn_left_out")
    if sum(ends) < sum(last):
        return Reading(error="no_end_of_turn")
    if model.context is not None and len(rendered.ids) > model.context:
        return Reading(error="too_long")
    # the number format is part of the key: rounding is no part of an answer, but it is of a probability
    decisive = [1, model.identity, model.engine.engine, model.engine.dtype, rendered.ids, [int(each) for each in rendered.mask]]
    key = hashlib.sha256(json.dumps(decisive, separators=(",", ":")).encode()).hexdigest()
    of_answers = tuple(end for end, masked in zip(ends, rendered.mask, strict=True) if masked)
    return Reading(key, tuple(rendered.ids), tuple(rendered.mask), of_answers)


def _compute(model: NamedModel, missing: Mapping[str, Reading], store: LogprobStore) -> dict[str, str]:
    """Compute and store the log-probabilities of readings; return the errors of those that have none, by key."""
    errors: dict[str, str] = {}

    def requests() -> Iterator[ScoreRequest]:
        for key, each in missing.items():
            yield ScoreRequest(key=key, ids=each.ids, start=each.mask.index(True))

    try:
        with model.running() as engine, Progress(f"score with {model.name}", total=len(missing), unit="rows") as progress:
            for scored in engine.logprobs(requests()):
                mask = missing[scored.key].mask
                if scored.error:
                    errors[scored.key] = scored.error
                else:
                    from_start = mask[mask.index(True) :]
                    store.put(scored.key, [value for value, masked in zip(scored.logprobs, from_start, strict=True) if masked])
                progress.advance(tokens=len(mask))
    finally:
        store.save()
    return errors


def _sum(reading: Reading, store: LogprobStore, errors: Mapping[str, str]) -> Likelihood:
    if reading.error or reading.key not in store:
        return Likelihood(error=reading.error or errors.get(reading.key, "the engine gave no probabilities"))
    values, ends = store[reading.key].astype(np.float64), np.asarray(reading.ends)
    return Likelihood(reading.key, len(values), float(values.sum()), int(ends.sum()), float(values[ends].sum()))
