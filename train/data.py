"""Rows as they are trained on, token ids and the mask of the assistant's tokens, or the rule by which a row is none."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.chat import Chat, Rendered
from ..core.config import part
from ..core.errors import UserError
from ..core.example import Example, Message, Tool, tools_of
from ..core.ledger import RowKey
from ..core.parts import calls_left_out
from .config import PreferenceConfig, TrainConfig
from .rendering import Pieces, in_chunks, render_many

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Row:
    """One row, rendered. `source` is where it stands, as file:row; `tokens` and `trained` are its ids and mask as arrays."""

    __slots__ = ("key", "messages", "rejected", "score", "source", "tokens", "tools", "trained", "weight", "written")

    def __init__(
        self, key: RowKey, ids: Sequence[int] | Ids, mask: Sequence[bool] | Mask, source: str = "", messages: Sequence[Message] = (),
        written: Sequence[bool] | Mask | None = None,
    ) -> None:  # fmt: skip
        self.key, self.source, self.messages = key, source, messages
        self.tools: Sequence[Tool] = ()  # the functions that can be called in it
        self.rejected: Row | None = None  # of a pair, the row with the worse answer to the same prompt
        self.weight, self.score = 1.0, 0.0  # in the loss, and by which rows come in order
        self.tokens: Ids = np.asarray(ids, dtype=np.int32)
        self.trained: Mask = np.asarray(mask, dtype=bool)
        # all of the assistant's tokens: with what is not trained on by choice (mask_thinking, mask_tool_calls)
        self.written: Mask = self.trained if written is None else np.asarray(written, dtype=bool)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Row)
            and self.key == other.key
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.trained, other.trained)
        )

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> list[int]:
        """Return the token ids as a list."""
        return self.tokens.tolist()

    @property
    def mask(self) -> list[bool]:
        """Return which tokens are trained on as a list."""
        return self.trained.tolist()

    @property
    def labels(self) -> list[int]:
        """Return the ids of the trained tokens, -100 elsewhere."""
        return np.where(self.trained, self.tokens, -100).tolist()

    @property
    def answer_start(self) -> int:
        """Return where the last answer begins: the ids before it are what the model goes on from."""
        end = int(np.flatnonzero(self.written)[-1])
        before = np.flatnonzero(~self.written[:end])
        return int(before[-1]) + 1 if len(before) else 0

    def answer(self) -> Ids:
        """Return the ids of the last answer, up to its end of turn."""
        return self.tokens[self.answer_start : int(np.flatnonzero(self.written)[-1]) + 1]

    def sides(self) -> "list[Row]":
        """Return the row, and of a pair the one with the worse answer too."""
        return [self, self.rejected] if self.rejected else [self]

    def prompt(self) -> bytes:
        """Return the ids before the last answer, to be compared."""
        return self.tokens[: self.answer_start].tobytes()


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What will be trained on, over the whole set, before the first step."""

    rows: int
    train_rows: int
    validation_rows: int
    rejected: dict[str, int]
    tokens: int  # of the training rows
    trained_tokens: int
    longest: int  # tokens of a row, of a pair's two together
    max_length: int | None
    end_of_turn: str
    overlong: str = "drop"  # what was done with longer rows
    split: int = 0  # rows that were cut between their turns
    repeated: int = 0  # validation rows that ask what a training row asks
    sources: dict[str, int] = field(default_factory=dict)  # rows from each file, trained on or validated on
    licences: dict[str, int] = field(default_factory=dict)  # rows by their column `license`, where they have one
    warnings: tuple[str, ...] = ()  # each names rows and the cure

    @property
    def trained_share(self) -> float:
        """Return the share of the tokens that are trained on."""
        return self.trained_tokens / self.tokens

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for plan.json."""
        return {**asdict(self), "trained_share": round(self.trained_share, 4)}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The rows to train on and to validate on, and the report about them."""

    train: list[Row]
    validation: list[Row]
    report: DataReport


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an example: its rows, or the rule that left it out, with its score and what the template said."""

    rows: Sequence[Row] = ()
    rule: str = ""
    score: float | None = None
    said: str = ""


def key_of(example: Example) -> RowKey:
    """Return the row's identity: that of the sample it was exported from (`ID/INDEX` in its id), or its own."""
    exported = example.meta.get("id")
    if isinstance(exported, str) and exported.count("/") == 1:
        prompt, _, index = exported.partition("/")
        if index.isdigit() and len(prompt.split("~")[0]) == 16:
            return prompt, int(index)
    return example.id, None


def outcomes(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int) -> list[Outcome]:
    """Render examples in order, until as many are kept as are wanted."""
    pieces = Pieces(chat)
    render = _render_pairs if isinstance(config, PreferenceConfig) else _render

    def work(first: int, last: int) -> list[Outcome]:
        return render(examples[first:last], chat, config, limit, pieces)

    def enough(found: list[Outcome]) -> bool:
        if config.overlong == "raise" and found[-1].rule == "over_max_length":
            return True
        return config.limit is not None and sum(bool(each.rows) for each in found) >= config.limit

    found = in_chunks(len(examples), work, enough)
    for example, outcome in zip(examples, found, strict=False):
        for row in outcome.rows:
            row.messages, row.tools = row.messages or example.messages, tools_of(example.meta)  # whole rows come without
            row.weight = _number(example, config.weight_by) if config.weight_by else 1.0
            if config.curriculum:
                name = config.curriculum.removeprefix("-")
                row.score = _number(example, name) * (1 if name == config.curriculum else -1)
            if row.weight < 0:
                raise UserError(f"{example.source}: {config.weight_by} is {row.weight:g}; a row's weight is 0 or more")
    return found


def _number(example: Example, column: str) -> float:
    """Return a number of a row's other columns, which in a CSV file are texts. Raises UserError where it is none."""
    number = _as_number(example.meta.get(column))
    if number is not None:
        return number
    known = ", ".join(sorted(name for name, each in example.meta.items() if _as_number(each) is not None)) or "none"
    found = example.meta.get(column)
    raise UserError(f"{example.source}: expected a number in the column {column!r}, found {found!r}; columns with numbers: {known}")


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _render(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int, pieces: Pieces) -> list[Outcome]:
    found = [_unfit(each, config) for each in examples]
    asked = [place for place, each in enumerate(found) if each is None]
    chosen = [examples[place] for place in asked]
    tools = [tools_of(each.meta) for each in chosen]
    rendered = render_many([each.messages for each in chosen], chat, pieces, config.train_on, tools, config.leave_out)
    for place, each in zip(asked, rendered, strict=True):
        found[place] = _outcome(examples[place], each, chat, config, limit)
    return [each for each in found if each is not None]


def _render_pairs(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int, pieces: Pieces) -> list[Outcome]:
    """Render the better and the worse answer to each prompt; a pair is left out for what is wrong with either."""
    last = replace(part(config, TrainConfig), train_on="last")
    worse = [_worse(each) for each in examples]
    sides = [each for pair in zip(examples, worse, strict=True) if pair[1] for each in pair if each]
    rendered = iter(_render(sides, chat, last, limit, pieces))
    return [_pair(next(rendered), next(rendered)) if each else Outcome(rule="no_pair") for each in worse]


def _worse(example: Example) -> Example | None:
    """Return the example with its worse answer, meta["rejected"]; None without one."""
    rejected = example.meta.get("rejected")
    if not isinstance(rejected, list) or len(rejected) != 1 or example.messages[-1]["role"] != "assistant":
        return None
    return replace(example, messages=[*example.messages[:-1], rejected[0]])


def _pair(better: Outcome, worse: Outcome) -> Outcome:
    if not better.rows or not worse.rows:
        return worse if better.rows else better
    one, other = better.rows[0], worse.rows[0]
    if one.prompt() != other.prompt():
        return Outcome(rule="prompts_differ")
    if np.array_equal(one.answer(), other.answer()):
        return Outcome(rule="same_answers")
    one.rejected = other
    return better


def _unfit(example: Example, config: TrainConfig) -> Outcome | None:
    """Return why an example is not rendered at all, or None."""
    wanted = _wanted(example, config)
    if not wanted:
        return Outcome(rule="no_assistant_turn")
    if any(not (each.get("content") or "").strip() and not each.get("tool_calls") for each in wanted):
        return Outcome(rule="empty_answer")
    return None


def _wanted(example: Example, config: TrainConfig) -> list[Message]:
    answers = [each for each in example.messages if each["role"] == "assistant"]
    return answers if config.train_on == "all" else answers[-1:]


def _outcome(example: Example, rendered: Rendered | UserError, chat: Chat, config: TrainConfig, limit: int) -> Outcome:
    if isinstance(rendered, UserError):
        return Outcome(rule="refused_by_template", said=str(rendered))
    key = key_of(example)
    row = Row(key, rendered.ids, rendered.mask, example.source, written=rendered.written)
    if calls_left_out(_wanted(example, config), row.written):
        return Outcome(rule="calls_left_out")
    rows = [row]
    if len(row) > limit:
        try:
            rows = _cut(example, key, chat, config, limit) if config.overlong == "split" else []
        except UserError as error:
            return Outcome(rule="refused_by_template", said=str(error))
    if not rows:
        return Outcome(rule="over_max_length", score=float(len(row)))
    for each in rows:
        ends = each.tokens[np.flatnonzero(each.written & ~np.append(each.written[1:], False))]
        messages = each.messages or example.messages
        count = sum(message["role"] == "assistant" for message in messages) if config.train_on == "all" else 1
        if len(ends) < count or any(token not in chat.stop_ids for token in ends.tolist()):
            return Outcome(rule="no_end_of_turn")
    if config.leave_out:
        rows = [each for each in rows if not np.isin(each.tokens[each.trained], chat.stop_ids).all()]  # of a row that is split, parts
    return Outcome(rows=rows) if rows else Outcome(rule="nothing_left")


def _row(messages: Sequence[Message], example: Example, key: RowKey, chat: Chat, config: TrainConfig) -> Row:
    rendered = chat.render(messages, tools=tools_of(example.meta), train_on=config.train_on, leave_out=config.leave_out)
    return Row(key, rendered.ids, rendered.mask, example.source, messages, rendered.written)


def _cut(example: Example, key: RowKey, chat: Chat, config: TrainConfig, limit: int) -> list[Row]:
    """Cut a conversation before questions, so that each part fits; none where one question and its answer alone do not.

    Every part begins with the system message. Where the last answer alone is trained on, it keeps as many turns before it as fit.
    """
    head = 0
    while example.messages[head]["role"] == "system":
        head += 1
    system, turns = list(example.messages[:head]), example.messages[head:]
    exchanges: list[list[Message]] = []
    for place, message in enumerate(turns):
        if not exchanges or (message["role"] == "user" and turns[place - 1]["role"] != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
    while not any(message["role"] == "assistant" for message in exchanges[-1]):  # a last question without an answer
        exchanges.pop()
    from_end = config.train_on == "last"
    parts: list[Row] = []
    waiting = exchanges[::-1] if from_end else exchanges
    while waiting:
        fitting, used = None, 0
        for count in range(1, len(waiting) + 1):
            taken = waiting[:count][::-1] if from_end else waiting[:count]
            row = _row([*system, *(message for exchange in taken for message in exchange)], example, key, chat, config)
            if len(row) > limit:
                break
            fitting, used = row, count
        if fitting is None:
            return []
        parts.append(fitting)
        waiting = [] if from_end else waiting[used:]
    return parts


def fingerprint(rows: Sequence[Row]) -> str:
    """Return a hash of the ids and masks of rows, in order: 16 hex digits."""
    digest = hashlib.sha256()
    for row in (each for pair in rows for each in pair.sides()):
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.tokens.tobytes())
        digest.update(row.trained.tobytes())
        if (row.weight, row.score) != (1.0, 0.0):
            digest.update(repr((row.weight, row.score)).encode())
    return digest.hexdigest()[:16]
