"""How probable a model finds the answers of rows: rendered as in training, each computed once for a model's weights."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .engines.base import ScoreRequest
from .errors import UserError
from .example import Example, Message, Tool, content_id, tools_of
from .formats import split_prompt
from .named_models import NamedModel
from .parts import calls_left_out
from .progress import Progress
from .values import ValueStore, value_key

log = logging.getLogger(__name__)

PIECE = 1000  # characters of a text that are scored in one go


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out row. `error` says why no model can be scored on it."""

    example: Example
    prompt_id: str  # rows of the same prompt are not independent
    turn_bytes: tuple[int, ...]  # of each of its answers, in UTF-8
    error: str | None
    text: str | None = None  # scored as it stands, without a template, instead of the conversation's answers

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its answers."""
        return sum(self.turn_bytes)


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
    turn_tokens: tuple[int, ...] | None = None  # of each answer
    turn_logprobs: tuple[float, ...] | None = None
    error: str | None = None


def read_row(example: Example) -> HeldOut:
    """Look at a row without a model. Rules: `no_assistant_turn`, `empty_answer`."""
    answers = [_text(each) for each in example.messages if each["role"] == "assistant"]
    error = None if answers else "no_assistant_turn"
    if any(not each.strip() for each in answers):
        error = "empty_answer"
    return HeldOut(example, content_id(split_prompt(example)[0]), tuple(len(each.encode()) for each in answers), error)


def read_texts(example: Example) -> list[HeldOut]:
    """Return what a row's messages say as texts to be scored as they stand, in pieces that any model's context holds.

    Rule: `empty_text`.
    """
    text = "\n\n".join(_text(each) for each in example.messages).strip()
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)] or [""]
    name = content_id(example.messages)
    return [HeldOut(example, name, (len(each.encode()),), None if each.strip() else "empty_text", each) for each in pieces]


def _text(answer: Message) -> str:
    """Return what the bytes of an answer are counted of: its content, and its tool calls as compact JSON."""
    calls = answer.get("tool_calls")
    written = json.dumps(calls, ensure_ascii=False, separators=(",", ":"), default=str) if calls else ""
    return (answer.get("content") or "") + written


def likelihoods(model: NamedModel, rows: Sequence[HeldOut], store: ValueStore) -> tuple[list[Likelihood], int]:
    """Return what a model gives each row, and how many of them were computed now: those that were not stored."""
    readings = [Reading(error=row.error) if row.error else _read(model, row) for row in rows]
    errors, computed = compute(model, readings, store)
    return [_sum(each, len(row.turn_bytes), store, errors) for row, each in zip(rows, readings, strict=True)], computed


def _read(model: NamedModel, row: HeldOut) -> Reading:
    if row.text is None:
        return read_conversation(model, row.example.messages, where=row.example.source, tools=tools_of(row.example.meta))
    return read_text(model, row.text)


def read_text(model: NamedModel, text: str) -> Reading:
    """Return a text as a model reads it: behind the token that begins one, or else ends one, so that its first token counts, too.

    Rule: `too_long`, `no_token_to_begin_with`.
    """
    assert model.chat is not None
    tokenizer = model.chat.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        return Reading(error="no_token_to_begin_with")
    ids = (begin, *tokenizer(text, add_special_tokens=False)["input_ids"])
    if model.context is not None and len(ids) > model.context:
        return Reading(error="too_long")
    mask = (False, *[True] * (len(ids) - 1))
    key = value_key("logprobs", model.identity, model.engine.engine, model.engine.dtype, ids, [int(each) for each in mask])
    return Reading(key, ids, mask, (False,) * (len(ids) - 1))


def read_conversation(
    model: NamedModel, messages: Sequence[Message], *, where: str, train_on: str = "all", tools: Sequence[Tool] = ()
) -> Reading:
    """Render a conversation for a model, its answers masked; with `train_on` "last" only the final one.

    Rules: `refused_by_template`, `turn_left_out`, `calls_left_out`, `no_end_of_turn`, `too_long`.
    """
    chat = model.chat
    assert chat is not None  # only servers render for themselves, and they tell no probabilities
    try:
        rendered = chat.render(messages, tools=tools, train_on=train_on)
    except UserError as error:
        log.warning("%s: %s", where, error)
        return Reading(error="refused_by_template")
    last = [here and not following for here, following in zip(rendered.mask, [*rendered.mask[1:], False], strict=True)]
    ends = [here and token in chat.stop_ids for here, token in zip(last, rendered.ids, strict=True)]
    answers = [each for each in messages if each["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers
    if sum(last) < len(answers):
        return Reading(error="turn_left_out")
    if calls_left_out(answers, rendered.mask):
        return Reading(error="calls_left_out")
    if sum(ends) < sum(last):
        return Reading(error="no_end_of_turn")
    if model.context is not None and len(rendered.ids) > model.context:
        return Reading(error="too_long")
    # the number format is part of the key: rounding is no part of an answer, but it is of a probability
    decisive = [model.identity, model.engine.engine, model.engine.dtype, rendered.ids, [int(each) for each in rendered.mask]]
    of_answers = tuple(end for end, masked in zip(ends, rendered.mask, strict=True) if masked)
    return Reading(value_key("logprobs", *decisive), tuple(rendered.ids), tuple(rendered.mask), of_answers)


def compute(model: NamedModel, readings: Iterable[Reading], store: ValueStore) -> tuple[dict[str, str], int]:
    """Compute and store the log-probabilities of readings that are not stored, each as soon as it is there.

    Returns the errors of those that have none, by key, and how many were computed. The model is loaded only if there are any.
    """
    asked = {each.key: each for each in readings if not each.error}
    missing = {key: each for key, each in asked.items() if key not in store}
    errors: dict[str, str] = {}
    if not missing:
        return errors, 0

    def requests() -> Iterator[ScoreRequest]:
        for key, each in sorted(missing.items(), key=lambda item: -len(item[1].ids)):  # engines look only so far ahead
            yield ScoreRequest(key=key, ids=each.ids, start=each.mask.index(True))

    with model.running() as engine, Progress(f"score with {model.name}", total=len(missing), unit="rows") as progress:
        for scored in engine.logprobs(requests()):
            mask = missing[scored.key].mask
            if scored.error:
                errors[scored.key] = scored.error
            else:
                from_start = mask[mask.index(True) :]
                store.put(scored.key, [value for value, masked in zip(scored.logprobs, from_start, strict=True) if masked])
            progress.advance(tokens=len(mask))
    return errors, len(missing) - len(errors)


def _sum(reading: Reading, turns: int, store: ValueStore, errors: Mapping[str, str]) -> Likelihood:
    if reading.error or reading.key not in store:
        return Likelihood(error=reading.error or errors.get(reading.key, "the engine gave no probabilities"))
    values, ends = store[reading.key].astype(np.float64), np.asarray(reading.ends)
    # the turn of each token: how many ended before it; an answer whose template ends it several times is one all the same
    turn = np.minimum(np.cumsum(ends) - ends, turns - 1)
    return Likelihood(
        key=reading.key,
        num_tokens=len(values),
        sum_logprob=float(values.sum()),
        num_ends=int(ends.sum()),
        end_logprob=float(values[ends].sum()),
        turn_tokens=tuple(np.bincount(turn, minlength=turns).tolist()),
        turn_logprobs=tuple(np.bincount(turn, weights=values, minlength=turns).tolist()),
    )
