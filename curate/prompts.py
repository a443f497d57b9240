"""The prompts of a distillation: which are asked and which are not, by name, and that a run keeps to its own."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import polars as pl

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import Decision, Example, Message, Tool, content_id, sent, tools_of
from ..core.files import read_parquet, write_atomically
from ..core.formats import iterate_examples, split_prompt
from ..core.ledger import KEY
from ..core.run import Run
from ..core.text import counted
from .config import DistillConfig
from .rows import message_text

log = logging.getLogger(__name__)

STAGE = "prompts"


@dataclass(frozen=True, slots=True)
class Prompt:
    """An example as it is asked: its messages with the system message, and their token ids unless a server renders."""

    example: Example
    messages: list[Message]
    reference: str | None  # the answer that the file has for it
    ids: tuple[int, ...] = ()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Return the functions that can be called."""
        return tools_of(self.example.meta)

    @property
    def sent(self) -> list[Message]:
        """Return what decides the answers where a server renders."""
        return sent(self.messages, self.tools)


def read_prompts(source: str | Path, limit: int | None = None) -> list[Example]:
    """Return the rows of a file of prompts, the first so many where there is a limit.

    Raises UserError where a row cannot be read, and tells of how many that holds: it costs none of the teacher's time, and a prompt
    that is left out is missed by nobody later. To leave such rows out is a step of its own, `import`, whose ledger has them.
    """
    faults: list[UserError] = []
    examples = list(islice(iterate_examples(source, faulty=lambda place, error: faults.append(error)), limit))
    if faults:
        more = f" ({counted(len(faults) - 1, 'other row')} cannot be read either)" if faults[1:] else ""
        without = f"`sftkit curate import {source} -o RUN --max-failed 0.1` makes a run without such rows"
        raise UserError(f"{faults[0]}{more}{f'; mend it, or {without}, to be given in its place' if examples else ''}")
    return examples


def check_growth(run: Run, examples: Sequence[Example], source: str | Path, *, limited: bool) -> None:
    """Raise UserError unless the prompts are those the run began with, or more of them; with a limit, or fewer."""
    before = run.ledger.read().filter(pl.col("stage") == STAGE)["example_id"].to_list()
    now = {each.id for each in examples}
    gone = [each for each in before if each not in now]
    if gone and not (limited and now <= set(before)):
        first = read_parquet(run.path / "curate" / "prompts.parquet").filter(pl.col("example_id") == gone[0])
        text = " ".join(message_text(json.loads(first["messages"][0])[-1]).split()) if first.height else ""
        raise UserError(
            f"{run.path}: this folder holds other prompts: {len(gone):,} of its {len(before):,} are not in {source}, the first of them"
            f" {gone[0]} ({text[:60]!r}); give another folder, or the prompts it began with (more may be added)"
        )
    if before and (more := len(now.difference(before))):
        log.info("%s: %s prompts more than last time", run.path, f"{more:,}")


def forget_steps(run: Run, why: str) -> None:
    """Make void what was decided after the prompts: it stands on rows that are written otherwise now."""
    own = run.ledger.read().filter(pl.col("stage") == STAGE)
    void = [each for each in run.ledger.record(STAGE, own.select(KEY), own.drop("step")) if each != "distill"]
    if void:
        log.info("%s: %s; void and to be run again: %s", run.path, why, ", ".join(void))


def choose_prompts(run: Run, examples: Sequence[Example], chat: Chat | None, context: int | None, config: DistillConfig) -> list[Prompt]:
    """Decide which prompts are asked, record it, and return them in the order of the file.

    Rules: `no_user_turn`, `blank_prompt` (it ends with the user, who says nothing), `refused_by_template`, `prompt_too_long` (with
    max_new_tokens it exceeds the context), and `duplicate_prompt`, whose witness is the first of those that are asked the same; one
    that was asked before stays.
    Raises UserError if none is left.
    """
    kept_before = set(run.ledger.read().filter((pl.col("stage") == STAGE) & (pl.col("action") == "kept"))["example_id"])
    prompts = [_prompt(each, config.system) for each in examples]
    offered = sum(bool(each.tools) for each in prompts)
    if offered and chat and not chat.writes_tools:
        why = f"{chat.name}'s template does not write them"
        log.warning("%s of %s prompts say which functions can be called (tools): %s", f"{offered:,}", f"{len(examples):,}", why)
    first: dict[object, str] = {}
    decisions: dict[int, Decision] = {}
    for place in sorted(range(len(prompts)), key=lambda place: prompts[place].example.id not in kept_before):
        prompts[place], decisions[place] = _decide(prompts[place], chat, context, config, first)
    decided = [decisions[place] for place in range(len(prompts))]
    path = run.room("curate") / "prompts.parquet"
    if not (path.exists() and run.ledger.holds(STAGE, decided)):
        with write_atomically(path) as temporary:
            _frame(prompts).write_parquet(temporary)
        void = run.ledger.record(STAGE, [(each.example.id, None) for each in prompts], decided)
        if void:
            log.info("%s: other prompts are asked than last time, so these steps are void; run them again: %s", run.path, ", ".join(void))
    rules = Counter(each.rule for each in decided if each.action != "kept")
    told = ", ".join(f"{count:,} {rule}" for rule, count in rules.most_common())
    if rules.total() == len(prompts):
        cure, new = "see `sftkit curate why ID` for the ids in its ledger", config.max_new_tokens
        lengths = [int(each.score) - new for each in decided if each.rule == "prompt_too_long" and each.score is not None]
        if lengths:
            cure = f"the shortest of {min(lengths):,} tokens and {new:,} new ones (max_new_tokens) do not fit the context of {context:,}"
        raise UserError(f"{run.path}: no prompt is left to be asked: {told}; {cure}")
    if rules:
        log.info("%s of %s prompts are not asked: %s", f"{rules.total():,}", f"{len(prompts):,}", told)
    return [prompt for prompt, decision in zip(prompts, decided, strict=True) if decision.action == "kept"]


def unasked(messages: Sequence[Message]) -> str:
    """Return the rule by which nothing is asked: there is no user's turn, or it is the last one and has no text; else an empty string."""
    if not any(each["role"] == "user" for each in messages):
        return "no_user_turn"
    return "blank_prompt" if messages[-1]["role"] == "user" and not message_text(messages[-1]).strip() else ""


def _prompt(example: Example, system: str | None) -> Prompt:
    if not any(each["role"] == "user" for each in example.messages):
        return Prompt(example, example.messages, None)
    messages, reference = split_prompt(example)
    if system is not None and not any(each["role"] == "system" for each in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(example, messages, reference)


def _decide(
    prompt: Prompt, chat: Chat | None, context: int | None, config: DistillConfig, first: dict[object, str]
) -> tuple[Prompt, Decision]:
    def rejected(rule: str, score: float | None = None, threshold: float | None = None, witness: str | None = None) -> Decision:
        return Decision(prompt.example.id, None, STAGE, "rejected", rule, score, threshold, witness)

    if rule := unasked(prompt.messages):
        return prompt, rejected(rule)
    if chat is not None:
        try:
            ids = tuple(chat.prompt(prompt.messages, thinking=config.thinking, tools=prompt.tools))
        except UserError as error:
            return prompt, rejected(f"refused_by_template: {' '.join(str(error).split())}")
        if context is not None and len(ids) + config.max_new_tokens > context:
            return prompt, rejected("prompt_too_long", len(ids) + config.max_new_tokens, context)
        prompt = replace(prompt, ids=ids)
    asked = prompt.ids or content_id(prompt.sent)
    witness = first.setdefault(asked, prompt.example.id)
    if witness != prompt.example.id:
        return prompt, rejected("duplicate_prompt", witness=witness)
    return prompt, Decision(prompt.example.id, None, STAGE, "kept")


def _frame(prompts: Sequence[Prompt]) -> pl.DataFrame:
    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, default=str)

    columns = {
        "example_id": [each.example.id for each in prompts],
        "messages": [text(each.messages) for each in prompts],
        "reference": [each.reference for each in prompts],
        "source": [each.example.source for each in prompts],
        "meta": [text(each.example.meta) for each in prompts],
    }
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
