"""Which rows are trained on and which hold the training to account: a decision for each, and a report over all before the first step."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import Decision, Example, Message, tools_of
from ..core.ledger import Ledger
from .config import PreferenceConfig, TrainConfig
from .data import DataReport, Outcome, Row, TrainingData, key_of, outcomes
from .mixture import Mixture
from .thoughts import IN_TEXT, Lost, Thoughts

log = logging.getLogger(__name__)

STAGE = "train_data"
END_COVERAGE = 0.999  # share of the rows whose answer's end must be trained on, or the model would not learn to stop
NO_MIXTURE = Mixture()
NAMED = 3  # rows that a warning names
CURES = {
    "no_assistant_turn": "nothing in them is learned: give rows with answers, or have a teacher write them (sftkit curate distill)",
    "empty_answer": "fill the answers in, or take the rows out",
    "calls_left_out": "the chat template writes no tool calls: give a model whose template does",
    "refused_by_template": "change the rows as the template wants them, or give a model with another template",
    "over_max_length": "raise max_length, or give overlong: split, which cuts a conversation between its turns",
    "nothing_left": "mask_thinking and mask_tool_calls leave nothing of their answers to train on: take that option, or the rows, out",
    "no_pair": "give rows with a prompt, a chosen and a rejected answer (sftkit curate export --format preference)",
    "same_answers": "nothing can be learned from a pair of like answers: take them out",
    "prompts_differ": "the chat template writes another prompt before the one answer than before the other: leave thoughts out",
    "no_end_of_turn": "check the chat template, or train on last answers only (train_on: last)",
}


def prepare(
    examples: Sequence[Example],
    chat: Chat,
    config: TrainConfig,
    *,
    context: int | None,
    vocabulary: int | None = None,
    ledger: Path | None = None,
    mixture: Mixture = NO_MIXTURE,
) -> TrainingData:
    """Render all rows, decide which are trained on, and record a decision for each in `ledger`, a file.

    Rules: `no_assistant_turn`, `empty_answer`, `refused_by_template`, `calls_left_out`, `over_max_length`, `no_end_of_turn`, `nothing_left`
    (to train on, after `mask_thinking` or `mask_tool_calls`), `over_limit`, `over_share` (what a `mixture` has too much of);
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
    places: list[int] = []  # of those that are kept
    num_split = 0
    found = iter(outcomes([each for place, each in enumerate(examples) if place not in mixture.beyond], chat, config, limit))
    for place, example in enumerate(examples):
        key = key_of(example)
        full = len(kept) >= (config.limit or 1 << 62)
        outcome = Outcome(rule="over_share") if place in mixture.beyond else Outcome(rule="over_limit") if full else next(found)
        if outcome.rows:
            rows += outcome.rows
            kept.append(example)
            places.append(place)
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
    asked = {hash(row.prompt()) for row in train} if validation else set()
    repeated = [row.source for row in validation if hash(row.prompt()) in asked]
    report = DataReport(
        rows=len(examples),
        train_rows=len(train),
        validation_rows=len(validation),
        rejected=dict(rejected.most_common()),
        tokens=sum(len(each) for row in train for each in row.sides()),
        trained_tokens=sum(int(each.trained.sum()) for row in train for each in row.sides()),
        longest=max(sum(map(len, row.sides())) for row in rows),
        max_length=None if limit == 1 << 62 else limit,
        end_of_turn=str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)),
        overlong=config.overlong,
        split=num_split,
        repeated=len(repeated),
        sources=_sources(kept),
        licences=dict(Counter(str(each.meta["license"]) for each in kept if each.meta.get("license")).most_common()),
        warnings=(
            *_warnings(left_out, cures, kept, repeated, chat),
            *_half_used(kept, config),
            *_unwritten_thoughts(kept, chat, config.train_on),
            *_nothing_masked([] if "nothing_left" in left_out else rows, config),
            *mixture.warnings(places),
        ),
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
    if isinstance(config, PreferenceConfig):
        cure = cure.partition(",")[0]  # pairs are not split
    return cure if limit != context else cure.replace("raise max_length", f"give a model with more context than {limit:,} tokens")


def _warnings(
    left_out: dict[str, list[str]], cures: dict[str, str], kept: Sequence[Example], again: Sequence[str], chat: Chat
) -> list[str]:
    told = [f"{_rows(places)} left out as {rule} ({_named(places)}): {cures[rule]}" for rule, places in left_out.items() if rule in cures]
    if again:
        told.append(
            f"{_rows(again)} to validate on ask what a training row asks ({_named(again)}), so eval_loss will be too good:"
            " take repeated prompts out first (sftkit curate dedup)"
        )
    offered = [] if chat.writes_tools else [each.source for each in kept if tools_of(each.meta)]
    if offered:
        told.append(
            f"{_rows(offered)} with functions that can be called (tools), which the template of {chat.name} does not write"
            f" ({_named(offered)}): it learns to call them without being told of them; give a model whose template does"
        )
    unread = [each.source for each in kept if each.meta.get("tools") not in (None, "", "null", "[]", []) and not tools_of(each.meta)]
    if unread:
        told.append(
            f"{_rows(unread)} whose column tools is no list of functions ({_named(unread)}), which is not written: each is"
            ' {"type": "function", "function": {"name": ..., "parameters": ...}}'
        )
    pattern = _special_tokens(chat)
    marked = [each.source for each in kept if any(pattern.search(str(message.get("content") or "")) for message in each.messages)]
    if marked:
        told.append(
            f"{_rows(marked)} with special tokens of the template in their text ({_named(marked)}), which the model reads as real ones:"
            " take them out of the text, or the rows out of the data"
        )
    return told


def _half_used(kept: Sequence[Example], config: TrainConfig) -> list[str]:
    """Say what of pairs is not looked at where single answers are learned."""
    pairs = [] if isinstance(config, PreferenceConfig) else [each.source for each in kept if "rejected" in each.meta]
    if not pairs:
        return []
    return [f"{_rows(pairs)} with a rejected answer, too, which is not learned from ({_named(pairs)}): sftkit train preference does that"]


def _nothing_masked(rows: Sequence[Row], config: TrainConfig) -> list[str]:
    """Say where leaving thoughts or calls out of what is trained on changes no row."""
    given = [f"mask_{part}" for part in config.leave_out]
    if not given or not rows or any(row.written is not row.trained for row in rows):
        return []
    return [f"{' and '.join(given)}: nothing is left out by it: no row has such a part that the template writes; see sftkit train preview"]


def _unwritten_thoughts(kept: Sequence[Example], chat: Chat, train_on: str) -> list[str]:
    """Say which rows have thoughts that the template leaves out: in every answer, or in those before the last question."""
    thoughts = Thoughts(chat, train_on)
    found: dict[Lost, list[str]] = {}
    for example in kept:
        for each in thoughts.lost(example):
            found.setdefault(each, []).append(example.source)
    told = []
    for lost, places in sorted(found.items(), key=lambda each: (each[0].earlier, each[0].kind)):
        if not lost.earlier:
            cure = "" if lost.kind == IN_TEXT else ", or put them before the answer's text, as <think>...</think>"
            told.append(
                f"{_rows(places)} with thoughts ({lost.kind}), which the template of {chat.name} does not write ({_named(places)}): they"
                f" are not learned; give a model whose template does{cure}"
            )
        elif Lost(lost.kind, earlier=False) not in found:
            told.append(
                f"{_rows(places)} with thoughts ({lost.kind}) in answers before the last, which the template of {chat.name} leaves out"
                f" there ({_named(places)}): these answers are learned without a thought; train on last answers only (train_on: last), and"
                " give each answer with a thought as the last of a row of its own"
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
