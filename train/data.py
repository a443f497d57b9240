"""Rows as they are trained on: token ids, the mask of the assistant's tokens, and an account of every row left out."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import Decision, Example
from ..core.ledger import Ledger, RowKey
from .config import TrainConfig

log = logging.getLogger(__name__)

STAGE = "train_data"
END_COVERAGE = 0.999  # share of the rows whose answer's end must be trained on, or the model would not learn to stop


@dataclass(frozen=True, slots=True)
class Row:
    """One row, rendered. `labels` are the ids where they are trained on, else -100."""

    key: RowKey
    ids: list[int]
    mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """Return the ids of the trained tokens, -100 elsewhere."""
        return [token if trained else -100 for token, trained in zip(self.ids, self.mask, strict=True)]


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


def key_of(example: Example) -> RowKey:
    """Return the row's identity: that of the sample it was exported from (`ID/INDEX` in its id), or its own."""
    exported = example.meta.get("id")
    if isinstance(exported, str) and exported.count("/") == 1:
        prompt, _, index = exported.partition("/")
        if index.isdigit() and len(prompt.split("~")[0]) == 16:
            return prompt, int(index)
    return example.id, None


def prepare(
    examples: Sequence[Example], chat: Chat, config: TrainConfig, *, context: int | None, ledger: Path | None = None
) -> TrainingData:
    """Render all rows, decide which are trained on, and record a decision for each in `ledger`, a file.

    Rules: `no_assistant_turn`, `empty_answer`, `refused_by_template`, `over_max_length`, `no_end_of_turn`, `over_limit`.
    Raises UserError when nothing is left, or too few answers end with a token that ends them.
    """
    limit = min(each for each in (config.max_length, context, 1 << 62) if each is not None)
    rows: list[Row] = []
    decisions: list[Decision] = []
    for example in examples:
        key = key_of(example)
        row, rule, score = (
            _render(example, key, chat, config, limit) if len(rows) < (config.limit or 1 << 62) else (None, "over_limit", None)
        )
        if row is None:
            threshold = float(limit) if rule == "over_max_length" else None
            decisions.append(Decision(*key, STAGE, "rejected", rule, score, threshold))
            if rule == "over_max_length" and config.overlong == "raise":
                raise UserError(
                    f"{example.source}: {score:g} tokens, longer than the {limit} allowed; raise max_length, or give overlong: drop"
                )
        else:
            rows.append(row)
            decisions.append(Decision(*key, STAGE, "kept"))
    if ledger:
        Ledger(ledger).record(STAGE, [key_of(each) for each in examples], decisions)
    rejected = Counter(each.rule for each in decisions if each.action == "rejected")
    told = ", ".join(f"{rule} {count:,}" for rule, count in rejected.most_common())
    if not rows:
        raise UserError(f"none of the {len(examples):,} rows can be trained on: {told}")
    if rejected["no_end_of_turn"] > (1 - END_COVERAGE) * (len(rows) + rejected["no_end_of_turn"]):
        raise UserError(
            f"{rejected['no_end_of_turn']:,} answers do not end with {chat.name}'s end-of-turn token; check the chat template,"
            " or train on last answers only (train_on: last)"
        )
    train, validation = split(rows, config.validation, config.seed)
    report = DataReport(
        rows=len(examples),
        train_rows=len(train),
        validation_rows=len(validation),
        rejected=dict(rejected.most_common()),
        tokens=sum(len(row.ids) for row in train),
        trained_tokens=sum(sum(row.mask) for row in train),
        longest=max(len(row.ids) for row in rows),
        max_length=None if limit == 1 << 62 else limit,
        end_of_turn=str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)),
    )
    log.info(
        "data: %s rows to train on, %s to validate on%s; %s tokens, %.1f %% of them trained on, each answer up to its %s",
        f"{report.train_rows:,}", f"{report.validation_rows:,}", f" (left out: {told})" if told else "",
        f"{report.tokens:,}", 100 * report.trained_share, report.end_of_turn,
    )  # fmt: skip
    return TrainingData(train, validation, report)


def _render(example: Example, key: RowKey, chat: Chat, config: TrainConfig, limit: int) -> tuple[Row | None, str, float | None]:
    answers = [each for each in example.messages if each["role"] == "assistant"]
    if not answers:
        return None, "no_assistant_turn", None
    wanted = answers if config.train_on == "all" else answers[-1:]
    if any(not (each.get("content") or "").strip() and not each.get("tool_calls") for each in wanted):
        return None, "empty_answer", None
    try:
        rendered = chat.render(example.messages, train_on=config.train_on)
    except UserError as error:
        log.warning("%s: %s", example.source, error)
        return None, "refused_by_template", None
    if len(rendered.ids) > limit:
        return None, "over_max_length", float(len(rendered.ids))
    ends = [here and not following for here, following in zip(rendered.mask, [*rendered.mask[1:], False], strict=True)]
    last = [token for token, end in zip(rendered.ids, ends, strict=True) if end]
    if len(last) < len(wanted) or any(token not in chat.stop_ids for token in last):
        return None, "no_end_of_turn", None
    return Row(key, rendered.ids, rendered.mask), "", None


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
    for row in rows:
        digest.update(repr((row.ids, row.mask)).encode())
    return digest.hexdigest()[:16]
