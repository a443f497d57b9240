"""Rows as they are trained on: token ids, the mask of the assistant's tokens, and an account of every row left out."""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.chat import Chat, Rendered
from ..core.config import part
from ..core.errors import UserError
from ..core.example import Decision, Example, Message
from ..core.ledger import Ledger, RowKey
from .config import PreferenceConfig, TrainConfig
from .rendering import Pieces, in_chunks, render_many

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

log = logging.getLogger(__name__)

STAGE = "train_data"
END_COVERAGE = 0.999  # share of the rows whose answer's end must be trained on, or the model would not learn to stop
NAMED = 3  # rows that a warning names
CURES = {
    "no_assistant_turn": "nothing in them is learned: give rows with answers, or have a teacher write them (sftkit curate distill)",
    "empty_answer": "fill the answers in, or take the rows out",
    "calls_left_out": "the chat template writes no tool calls: give a model whose template does",
    "refused_by_template": "change the rows as the template wants them, or give a model with another template",
    "over_max_length": "raise max_length, or give overlong: split, which cuts a conversation between its turns",
    "no_pair": "give rows with a prompt, a chosen and a rejected answer (sftkit curate export --format preference)",
    "same_answers": "nothing can be learned from a pair of like answers: take them out",
    "prompts_differ": "the chat template writes another prompt before the one answer than before the other: leave thoughts out",
    "no_end_of_turn": "check the chat template, or train on last answers only (train_on: last)",
}


class Row:
    """One row, rendered. `source` is where it stands, as file:row; `tokens` and `trained` are its ids and mask as arrays."""

    __slots__ = ("key", "messages", "rejected", "score", "source", "tokens", "trained", "weight")

    def __init__(
        self, key: RowKey, ids: Sequence[int] | Ids, mask: Sequence[bool] | Mask, source: str = "", messages: Sequence[Message] = ()
    ) -> None:
        self.key, self.source, self.messages = key, source, messages
        self.rejected: Row | None = None  # of a pair, the row with the worse answer to the same prompt
        self.weight, self.score = 1.0, 0.0  # in the loss, and by which rows come in order
        self.tokens: Ids = np.asarray(ids, dtype=np.int32)
        self.trained: Mask = np.asarray(mask, dtype=bool)

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
        end = int(np.flatnonzero(self.trained)[-1])
        before = np.flatnonzero(~self.trained[:end])
        return int(before[-1]) + 1 if len(before) else 0

    def answer(self) -> Ids:
        """Return the ids of the last answer, up to its end of turn."""
        return self.tokens[self.answer_start : int(np.flatnonzero(self.trained)[-1]) + 1]

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
    longest: int
    max_length: int | None
    end_of_turn: str
    split: int = 0  # rows that were cut between their turns
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
class _Outcome:
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


def prepare(
    examples: Sequence[Example],
    chat: Chat,
    config: TrainConfig,
    *,
    context: int | None,
    vocabulary: int | None = None,
    ledger: Path | None = None,
    beyond: frozenset[int] = frozenset(),
) -> TrainingData:
    """Render all rows, decide which are trained on, and record a decision for each in `ledger`, a file.

    Rules: `no_assistant_turn`, `empty_answer`, `refused_by_template`, `calls_left_out`, `over_max_length`, `no_end_of_turn`, `over_limit`,
    `over_share` (the places in `beyond`: what a mixture has too much of);
    of pairs also `no_pair`, `same_answers`, `prompts_differ`.
    Raises UserError when nothing is left, too few answers end with a token that ends them, or a token is beyond the `vocabulary`.
    What is no error and yet seldom meant stands in the report's warnings, and is said aloud.
    """
    limit = min(each for each in (config.max_length, context, 1 << 62) if each is not None)
    cures = {**CURES, "over_max_length": _longer(config, limit, context)}
    rows: list[Row] = []
    decisions: list[Decision] = []
    left_out: dict[str, list[str]] = {}
    kept: list[Example] = []
    num_split = 0
    outcomes = iter(_outcomes([each for place, each in enumerate(examples) if place not in beyond], chat, config, limit))
    for place, example in enumerate(examples):
        key = key_of(example)
        full = len(kept) >= (config.limit or 1 << 62)
        outcome = _Outcome(rule="over_share") if place in beyond else _Outcome(rule="over_limit") if full else next(outcomes)
        if outcome.rows:
            rows += outcome.rows
            kept.append(example)
            num_split += len(outcome.rows) > 1
            decisions.append(Decision(*key, STAGE, "kept"))
            continue
        if outcome.rule == "over_max_length" and config.overlong == "raise":
            raise UserError(
                f"{example.source}: {outcome.score:g} tokens, longer than the {limit} allowed; raise max_length, or give overlong: drop"
                " or split"
            )
        threshold = float(limit) if outcome.rule == "over_max_length" else None
        decisions.append(Decision(*key, STAGE, "rejected", outcome.rule, outcome.score, threshold))
        left_out.setdefault(outcome.rule, []).append(f"{example.source} ({outcome.said})" if outcome.said else example.source)
    if ledger:
        Ledger(ledger).record(STAGE, [key_of(each) for each in examples], decisions)
    rejected = Counter({rule: len(places) for rule, places in left_out.items()})
    told = ", ".join(f"{rule} {count:,}" for rule, count in rejected.most_common())
    if not rows:
        worst = rejected.most_common(1)[0][0] if rejected else ""
        mend = f" ({_named(left_out[worst])}): {cures[worst]}" if worst in cures else ""
        raise UserError(f"none of the {len(examples):,} rows can be trained on: {told}{mend}")
    if rejected["no_end_of_turn"] > (1 - END_COVERAGE) * (len(rows) + rejected["no_end_of_turn"]):
        raise UserError(
            f"{rejected['no_end_of_turn']:,} answers do not end with {chat.name}'s end-of-turn token"
            f" ({_named(left_out['no_end_of_turn'])}); {CURES['no_end_of_turn']}"
        )
    if config.weight_by and not any(row.weight for row in rows):
        raise UserError(f"weight_by: all rows have the weight 0 in {config.weight_by!r}; nothing would be learned")
    if vocabulary is not None:
        _check_vocabulary(rows, chat, vocabulary)
    train, validation = split(rows, config.validation, config.seed)
    report = DataReport(
        rows=len(examples),
        train_rows=len(train),
        validation_rows=len(validation),
        rejected=dict(rejected.most_common()),
        tokens=sum(len(each) for row in train for each in row.sides()),
        trained_tokens=sum(int(each.trained.sum()) for row in train for each in row.sides()),
        longest=max(len(each) for row in rows for each in row.sides()),
        max_length=None if limit == 1 << 62 else limit,
        end_of_turn=str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)),
        split=num_split,
        sources=_sources(kept),
        licences=dict(Counter(str(each.meta["license"]) for each in kept if each.meta.get("license")).most_common()),
        warnings=tuple(_warnings(left_out, cures, kept, train, validation, chat)),
    )
    say(report)
    return TrainingData(train, validation, report)


def _sources(kept: Sequence[Example]) -> dict[str, int]:
    """Return how many rows each file gave, the most first; files by their names, where two have one by their paths."""
    counts = Counter(each.source.rpartition(":")[0] or each.source for each in kept)
    names = Counter(Path(each).name for each in counts)
    return {Path(each).name if names[Path(each).name] == 1 else each: count for each, count in counts.most_common()}


def say(report: DataReport) -> None:
    """Tell what will be trained on, and what is to be minded."""
    told = ", ".join(f"{rule} {count:,}" for rule, count in report.rejected.items())
    log.info(
        "data: %s rows to train on, %s to validate on%s; %s tokens, %.1f %% of them trained on, each answer up to its %s",
        f"{report.train_rows:,}", f"{report.validation_rows:,}", f" (left out: {told})" if told else "",
        f"{report.tokens:,}", 100 * report.trained_share, report.end_of_turn,
    )  # fmt: skip
    for warning in report.warnings:
        log.warning("data: %s", warning)


def _longer(config: TrainConfig, limit: int, context: int | None) -> str:
    """Say what helps against rows over the limit."""
    if config.overlong == "split":
        alone = "one question and its answer alone are longer: shorten them"
        return f"{alone}, or give a model with more context than {limit:,}" if limit == context else f"{alone}, or raise max_length"
    cure = CURES["over_max_length"]
    return cure if limit != context else cure.replace("raise max_length", f"give a model with more context than {limit:,} tokens")


def _warnings(
    left_out: dict[str, list[str]], cures: dict[str, str], kept: Sequence[Example], train: Sequence[Row], validation: Sequence[Row],
    chat: Chat,
) -> list[str]:  # fmt: skip
    told = [f"{_rows(places)} left out as {rule} ({_named(places)}): {cures[rule]}" for rule, places in left_out.items() if rule in cures]
    asked = {hash(row.prompt()) for row in train} if validation else set()
    again = [row.source for row in validation if hash(row.prompt()) in asked]
    if again:
        told.append(
            f"{_rows(again)} to validate on ask what a training row asks ({_named(again)}), so eval_loss will be too good:"
            " take repeated prompts out first (sftkit curate dedup)"
        )
    pattern = _special_tokens(chat)
    marked = [each.source for each in kept if any(pattern.search(str(message.get("content") or "")) for message in each.messages)]
    if marked:
        told.append(
            f"{_rows(marked)} with special tokens of the template in their text ({_named(marked)}), which the model reads as real ones:"
            " take them out of the text, or the rows out of the data"
        )
    return told


def _rows(places: Sequence[str]) -> str:
    return f"{len(places):,} row{'s' * (len(places) != 1)}"


def _named(places: Sequence[str]) -> str:
    more = f" and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
    return ", ".join(places[:NAMED]) + more


def _special_tokens(chat: Chat) -> re.Pattern[str]:
    """Return a pattern of the special tokens that a rendered conversation has, and of those that end or begin one."""
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = {*chat.render(turns).ids, *chat.prompt(turns[:1]), *chat.stop_ids, chat.pad_id}
    added = chat.tokenizer.added_tokens_decoder
    tokens = {str(added[each].content) for each in ids if each in added and added[each].special}
    tokens |= {token for token in (chat.tokenizer.bos_token, chat.tokenizer.eos_token) if token}
    return re.compile("|".join(re.escape(each) for each in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _check_vocabulary(rows: Sequence[Row], chat: Chat, size: int) -> None:
    for row in (each for pair in rows for each in pair.sides()):
        if (token := int(row.tokens.max())) >= size:
            raise UserError(
                f"{row.source}: its token {chat.tokenizer.convert_ids_to_tokens(token)!r} is number {token:,}, and {chat.name} has room for"
                f" {size:,}; tokenizer and weights do not belong together: copy the model's own tokenizer files beside it"
            )


def _shortest_span(row: Row) -> int:
    """Return how many tokens the shortest trained stretch of a row has."""
    edges = np.flatnonzero(np.diff(row.trained, prepend=False, append=False))
    return int((edges[1::2] - edges[::2]).min()) if len(edges) else 0


def _outcomes(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int) -> list[_Outcome]:
    """Render examples in order, until as many are kept as are wanted."""
    pieces = Pieces(chat)
    render = _render_pairs if isinstance(config, PreferenceConfig) else _render

    def work(first: int, last: int) -> list[_Outcome]:
        return render(examples[first:last], chat, config, limit, pieces)

    def enough(found: list[_Outcome]) -> bool:
        if config.overlong == "raise" and found[-1].rule == "over_max_length":
            return True
        return config.limit is not None and sum(bool(each.rows) for each in found) >= config.limit

    found = in_chunks(len(examples), work, enough)
    for example, outcome in zip(examples, found, strict=False):
        for row in outcome.rows:
            row.messages = row.messages or example.messages  # whole rows come without
            row.weight = _number(example, config.weight_by) if config.weight_by else 1.0
            if config.curriculum:
                name = config.curriculum.removeprefix("-")
                row.score = _number(example, name) * (1 if name == config.curriculum else -1)
            if row.weight < 0:
                raise UserError(f"{example.source}: {config.weight_by} is {row.weight:g}; a row's weight is 0 or more")
    return found


def _number(example: Example, column: str) -> float:
    """Return a number of a row's other columns. Raises UserError where it is none."""
    value = example.meta.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    known = ", ".join(sorted(name for name, each in example.meta.items() if isinstance(each, (int, float)))) or "none"
    raise UserError(f"{example.source}: expected a number in the column {column!r}, found {value!r}; columns with numbers: {known}")


def _render(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int, pieces: Pieces) -> list[_Outcome]:
    found = [_unfit(each, config) for each in examples]
    asked = [place for place, each in enumerate(found) if each is None]
    rendered = render_many([examples[place].messages for place in asked], chat, pieces, config.train_on)
    for place, each in zip(asked, rendered, strict=True):
        found[place] = _outcome(examples[place], each, chat, config, limit)
    return [each for each in found if each is not None]


def _render_pairs(examples: Sequence[Example], chat: Chat, config: TrainConfig, limit: int, pieces: Pieces) -> list[_Outcome]:
    """Render the better and the worse answer to each prompt; a pair is left out for what is wrong with either."""
    last = replace(part(config, TrainConfig), train_on="last")
    worse = [_worse(each) for each in examples]
    sides = [each for pair in zip(examples, worse, strict=True) if pair[1] for each in pair if each]
    rendered = iter(_render(sides, chat, last, limit, pieces))
    return [_pair(next(rendered), next(rendered)) if each else _Outcome(rule="no_pair") for each in worse]


def _worse(example: Example) -> Example | None:
    """Return the example with its worse answer, meta["rejected"]; None without one."""
    rejected = example.meta.get("rejected")
    if not isinstance(rejected, list) or len(rejected) != 1 or example.messages[-1]["role"] != "assistant":
        return None
    return replace(example, messages=[*example.messages[:-1], rejected[0]])


def _pair(better: _Outcome, worse: _Outcome) -> _Outcome:
    if not better.rows or not worse.rows:
        return worse if better.rows else better
    one, other = better.rows[0], worse.rows[0]
    if one.prompt() != other.prompt():
        return _Outcome(rule="prompts_differ")
    if np.array_equal(one.answer(), other.answer()):
        return _Outcome(rule="same_answers")
    one.rejected = other
    return better


def _unfit(example: Example, config: TrainConfig) -> _Outcome | None:
    """Return why an example is not rendered at all, or None."""
    wanted = _wanted(example, config)
    if not wanted:
        return _Outcome(rule="no_assistant_turn")
    if any(not (each.get("content") or "").strip() and not each.get("tool_calls") for each in wanted):
        return _Outcome(rule="empty_answer")
    return None


def _wanted(example: Example, config: TrainConfig) -> list[Message]:
    answers = [each for each in example.messages if each["role"] == "assistant"]
    return answers if config.train_on == "all" else answers[-1:]


def _outcome(example: Example, rendered: Rendered | UserError, chat: Chat, config: TrainConfig, limit: int) -> _Outcome:
    if isinstance(rendered, UserError):
        return _Outcome(rule="refused_by_template", said=str(rendered))
    key = key_of(example)
    row = Row(key, rendered.ids, rendered.mask, example.source)
    calls = [each for each in _wanted(example, config) if each.get("tool_calls") and not (each.get("content") or "").strip()]
    if calls and _shortest_span(row) < 2:
        return _Outcome(rule="calls_left_out")  # nothing of a turn but its end
    rows = [row]
    if len(row) > limit:
        try:
            rows = _cut(example, key, chat, config, limit) if config.overlong == "split" else []
        except UserError as error:
            return _Outcome(rule="refused_by_template", said=str(error))
    if not rows:
        return _Outcome(rule="over_max_length", score=float(len(row)))
    for each in rows:
        ends = each.tokens[np.flatnonzero(each.trained & ~np.append(each.trained[1:], False))]
        messages = each.messages or example.messages
        count = sum(message["role"] == "assistant" for message in messages) if config.train_on == "all" else 1
        if len(ends) < count or any(token not in chat.stop_ids for token in ends.tolist()):
            return _Outcome(rule="no_end_of_turn")
    return _Outcome(rows=rows)


def _row(messages: Sequence[Message], example: Example, key: RowKey, chat: Chat, config: TrainConfig) -> Row:
    rendered = chat.render(messages, train_on=config.train_on)
    return Row(key, rendered.ids, rendered.mask, example.source, messages)


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


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Set a share of the rows aside, by the hash of their prompt's id: all samples of a prompt and all copies go together."""
    count = round(len(rows) * share) if len(rows) >= 10 else 0
    if share and not count and len(rows) >= 10:
        count = 1
    if not count:
        return list(rows), []

    def place(row: Row) -> bytes:
        return hashlib.sha256(f"{seed}/{row.key[0].partition('~')[0]}".encode()).digest()

    border = sorted(place(row) for row in rows)[count - 1]
    train = [row for row in rows if place(row) > border]
    if not train:  # one prompt alone
        return list(rows), []
    return train, [row for row in rows if place(row) <= border]


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
