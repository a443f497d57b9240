"""Conversations that go on: the teacher answers, then writes what the user says next, and so on; each ends with the user's turn."""

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.example import Decision, Example, Message, content_id
from .config import GrowConfig
from .distill import Distillation, wanted_sample
from .distill_result import BUDGET
from .growth import ASKS_A_ROUND
from .prompts import Prompt, unasked
from .rows import message_text

SPEAKER = re.compile(r"^\s*\**(?:the\s+)?(?:user|human)\**\s*[:：]\**\s*", re.IGNORECASE)
ROUNDS = 1  # user turns that are added when the config does not say

NEXT = (  # what the next turn does, by turn and by chance; the words are our own
    "asks about something in the last answer that is not clear yet",
    "changes or adds a condition of what was asked",
    "asks for the next step, or for what follows from the answer",
    "doubts a point of the answer and says why",
    "asks for the same in another form or for another case",
)


@dataclass(slots=True)
class _Talk:
    """A conversation under way, known by the seed it began with."""

    seed: Example
    messages: list[Message]
    rule: str = ""  # why it ended early
    failed: bool = False


def converse(
    work: Distillation, stage: str, seeds: Sequence[Example], config: GrowConfig
) -> tuple[list[dict[str, Any]], list[Decision], int, int, Counter[str]]:
    """Return the rows of conversations that end with a user's turn, a decision on each seed, the requests, their tokens, and the errors.

    A conversation is left out without a user (`no_user_turn`, `blank_prompt`), and as soon as a turn is cut (`truncated`), has no
    words (`empty`), does not fit the context with an answer (`prompt_too_long`) or gets no answer (failed). The user's turns are asked
    for in words, with the whole conversation: that works with a server too. A seed's own answers stay; it is answered where it ends
    with the user.
    """
    talks = [_Talk(each, list(each.messages), unasked(each.messages)) for each in seeds]
    waiting, kept, asked, tokens = deque(each for each in talks if not each.rule), 0, 0, 0
    while waiting and kept < config.count and not any(each.rule == BUDGET for each in talks):
        part = [waiting.popleft() for _ in range(min(len(waiting), max(ASKS_A_ROUND, config.count - kept)))]
        requests, used = _go_on(work, part, config.rounds or ROUNDS)
        asked, tokens, kept = asked + requests, tokens + used, kept + sum(not each.rule for each in part)
    for each in waiting:  # were not begun
        each.rule = "more_than_wanted" if kept >= config.count else BUDGET
        each.failed = each.rule == BUDGET
    rows: list[dict[str, Any]] = []
    decisions, errors = [], Counter[str]()
    for talk in talks:
        if talk.failed:
            errors[talk.rule.removeprefix("error: ")] += talk.rule != BUDGET
            decisions.append(Decision(talk.seed.id, None, stage, "failed", talk.rule))
        elif talk.rule:
            decisions.append(Decision(talk.seed.id, None, stage, "rejected", talk.rule))
        elif len(rows) >= config.count:
            decisions.append(Decision(talk.seed.id, None, stage, "rejected", "more_than_wanted"))
        else:
            decisions.append(Decision(talk.seed.id, None, stage, "kept"))
            meta = {**talk.seed.meta, "parents": [talk.seed.id], "method": "converse"}
            source = f"{config.teacher}:converse"
            rows.append({"id": content_id(talk.messages), "messages": talk.messages, "source": source, "meta": meta})
    return rows, decisions, asked, tokens, +errors


def _go_on(work: Distillation, talks: Sequence[_Talk], rounds: int) -> tuple[int, int]:
    """Let conversations go on, turn by turn; return of all the requests and the tokens."""
    asked = tokens = 0
    for number in range(rounds):
        for role in ("assistant", "user"):
            going = [each for each in talks if not each.rule and each.messages[-1]["role"] != role]
            asks = {index: _ask(each, role, number) for index, each in enumerate(going)}
            texts, requests, used = _answers(work, going, asks, f"turn {number + 1}, {role}", number if role == "user" else 0)
            asked, tokens = asked + requests, tokens + used
            for index, each in enumerate(going):
                rule, text = texts[index]
                if role == "user":
                    text = SPEAKER.sub("", text).strip()
                if not rule and not text.strip():
                    rule = "empty"
                each.rule, each.failed = rule, rule.startswith("error: ") or rule == BUDGET
                if not rule:
                    each.messages.append({"role": role, "content": text})
    return asked, tokens


def _ask(talk: _Talk, role: str, number: int) -> list[Message]:
    """Return what the teacher is asked for the next turn of a conversation."""
    if role == "assistant":
        return talk.messages
    lines = "\n\n".join(f"{each['role'].capitalize()}: {message_text(each)}" for each in talk.messages if each["role"] != "system")
    what = NEXT[int(content_id([{"seed": talk.seed.id, "turn": number}])[:8], 16) % len(NEXT)]
    text = (
        f"Here is a conversation between a user and an assistant:\n\n{lines}\n\nWrite the user's next message, in which the user {what}."
        " Write it as that user would: the message alone, in the language of the conversation, without a label or a comment."
    )
    return [{"role": "user", "content": text}]


def _answers(
    work: Distillation, talks: Sequence[_Talk], asks: dict[int, list[Message]], label: str, index: int
) -> tuple[dict[int, tuple[str, str]], int, int]:
    """Return (rule, text) for each ask, the rule empty for a sound answer, and of all the requests and the tokens."""
    teacher = work.teacher
    wanted, found = {}, {}
    for place, messages in asks.items():
        if teacher.config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": teacher.config.system}, *messages]
        ids = tuple(teacher.chat.prompt(messages, thinking=teacher.config.thinking)) if teacher.chat else ()
        if ids and teacher.context is not None and len(ids) + teacher.config.max_new_tokens > teacher.context:
            found[place] = "prompt_too_long", ""
            continue
        prompt = Prompt(replace(talks[place].seed, messages=messages), messages, None, ids)
        wanted[place] = wanted_sample(teacher, prompt, index, teacher.config.sampling)
    work.wanted = list({each.key: each for each in wanted.values()}.values())
    work.generate(work.missing(), label=label)
    answers = {row["key"]: row for row in work.samples().iter_rows(named=True)}
    errors = dict(work.store.failures().select("key", "error").iter_rows())
    for place, each in wanted.items():
        if each.key in answers:
            row = answers[each.key]
            found[place] = ("truncated" if row["finish_reason"] == "length" else "", row["text"])
        else:
            found[place] = (f"error: {errors[each.key]}" if each.key in errors else BUDGET, "")
    return found, sum(each.key in answers or each.key in errors for each in work.wanted), sum(row["num_tokens"] for row in answers.values())
