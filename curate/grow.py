"""Grow a set of prompts with a teacher: ask, read, sift, remember each one's parents. Durable as a distillation is, and resumed so."""

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import part, to_mapping
from ..core.engines.base import Sampling
from ..core.errors import TooManyFailures, UserError
from ..core.example import Decision, Example, content_id
from ..core.files import write_atomically
from ..core.ngrams import words
from ..core.run import Run
from ..core.store import SampleStore
from ..core.text import counted
from .config import DistillConfig, GrowConfig
from .converse import ROUNDS, converse
from .distill import Distillation, Teacher, Wanted, has_begun, wanted_sample
from .distill_result import BUDGET
from .growth import ASKS_A_ROUND, Ask, Text, fault, open_method, read_answer, read_passages
from .prompts import Prompt, read_prompts, unasked
from .rouge import RougePool
from .rows import message_text

log = logging.getLogger(__name__)

STAGE = "grow"
FREE = ("seeds", "count", "budget_tokens", "max_failed", "engine")
TOO_LONG = "prompt_too_long"  # the rule of a request that does not fit the context with an answer: it is not made
DRY_ROUNDS = 2  # without a new prompt, after which there is no more to come


@dataclass(frozen=True, kw_only=True)
class GrowResult:
    """What growing prompts came to."""

    path: Path  # of the prompts, one a line
    prompts: int
    wanted: int
    asked: int  # requests to the teacher, those of earlier calls included
    tokens: int
    rejected: dict[str, int]  # by rule
    failed: dict[str, int]
    rounds: int
    over_budget: bool  # something was not asked for, because a budget is used up

    def summary(self) -> str:
        """Write it for people."""
        had = f"{counted(self.prompts, 'prompt')} from {counted(self.asked, 'answer')}, {counted(self.tokens, 'token')}"
        lines = [f"{self.path}: {had}, {counted(self.rounds, 'round')}"]
        if self.prompts < self.wanted:
            why = (
                "a budget is used up; a larger one goes on from here"
                if self.over_budget
                else f"no more new ones came in {counted(self.rounds, 'round')}"
            )
            lines.append(f"of the {self.wanted:,} that were wanted: {why}")
        if self.rejected:
            lines.append("left out: " + ", ".join(f"{count:,} {rule}" for rule, count in self.rejected.items()))
        if self.failed:
            lines.append("failed: " + ", ".join(f"{count:,} {error}" for error, count in self.failed.items()))
        return "\n".join(lines)


@dataclass(slots=True)
class _Growth:
    """What has grown so far."""

    config: GrowConfig
    pool: RougePool
    grown: list[Text]
    rows: list[dict[str, Any]]
    decisions: list[Decision]
    seen: set[str]

    @property
    def num_asks(self) -> int:
        """Return how many requests to make at once: as many as bring what is still wanted if all is kept, and a few at least."""
        each = self.config.per_ask if self.config.method == "documents" else 1
        return max(ASKS_A_ROUND, math.ceil((self.config.count - len(self.rows)) / each))

    def sift(self, ask: Ask, key: str, text: str, cut: bool, round_number: int) -> list[Text]:
        """Decide on every prompt of one answer, in order; return those that are kept."""
        found = read_answer(self.config, text)
        source, kept = key[:16], []

        def reject(place: int, rule: str, score: float | None = None, threshold: float | None = None, witness: str | None = None) -> None:
            self.decisions.append(Decision(source, place, STAGE, "rejected", rule, score, threshold, witness))

        if not found:
            reject(0, "truncated" if cut else "nothing_to_read")
        for place, prompt in enumerate(found):
            broken = fault(self.config, prompt, len(words(prompt)))
            alike = None
            name = content_id([{"role": "user", "content": prompt}])
            if cut and place == len(found) - 1:
                reject(place, "truncated")
            elif broken:
                reject(place, *broken)
            elif name in self.seen or (alike := self.pool.like(prompt)):
                reject(
                    place, "duplicate", *((1.0, self.pool.threshold, name) if alike is None else (alike[1], self.pool.threshold, alike[0]))
                )
            elif len(self.rows) >= self.config.count:
                reject(place, "more_than_wanted")
            else:
                self.decisions.append(Decision(source, place, STAGE, "kept", witness_id=next(iter(ask.parents), None)))
                self.seen.add(name)
                self.pool.add(name, prompt)
                meta = {"parents": list(ask.parents), "method": self.config.method, "round": round_number, "answer": f"{source}/{place}"}
                meta |= {"operation": ask.what} if ask.what else {}
                messages = [{"role": "user", "content": prompt}]
                self.rows.append({"id": name, "messages": messages, "source": f"{self.config.teacher}:{self.config.method}", "meta": meta})
                kept.append(Text(name, prompt))
        self.grown += kept
        return kept


def grow(source: str | Path | None, out: Path, config: GrowConfig) -> GrowResult:
    """Ask a teacher for `count` new prompts and write them, with their parents, to curate/prompts.jsonl of the run folder.

    `source` are the seed prompts, the files whose passages are asked about, or nothing for magpie. Every answer is stored, so
    that the same call goes on, and one with a larger count too. The stage `grow` of the ledger has every prompt that was read in
    an answer, by ANSWER/PLACE; the witness of a kept one is its (first) parent. Raises what `distill` raises.
    """
    if config.method == "converse":
        return _converse(source, out, config)
    seeds = _seeds(source, config)
    with closing(Teacher.find(_asking(config))) as teacher, Run.create(out) as run:
        method = open_method(config, teacher.chat)
        marks = {"teacher_identity": teacher.identity, "seeds_id": content_id([{"seeds": [[each.id, each.text] for each in seeds]}])}
        _configure(run, {"seeds": None if source is None else str(source), **to_mapping(config), **marks})
        growth = _Growth(config, RougePool(config.threshold), [], [], [], set())
        for each in seeds if config.method != "documents" else ():
            growth.pool.add(each.id, each.text)
            growth.seen.add(each.id)
        with SampleStore(run.room("curate") / "samples.sqlite") as store:
            work = Distillation(run, teacher, store, [])
            rounds, tokens, failed, over_budget = _rounds(work, method, seeds, growth)
        asked = len({each.example_id for each in growth.decisions if each.rule != TOO_LONG})
        return _finish(run, config, growth.rows, growth.decisions, asked, rounds, tokens, failed, over_budget=over_budget)


def _converse(source: str | Path | None, out: Path, config: GrowConfig) -> GrowResult:
    if source is None:
        raise UserError("converse: needs seed prompts")
    seeds = list({each.id: each for each in read_prompts(source, config.limit)}.values())
    if all(unasked(each.messages) for each in seeds):
        raise UserError(f"{source}: holds no prompt of a user to go on from")
    with closing(Teacher.find(_asking(config))) as teacher, Run.create(out) as run:
        marks = {"teacher_identity": teacher.identity, "seeds_id": content_id([{"seeds": [each.id for each in seeds]}])}
        _configure(run, {"seeds": str(source), **to_mapping(config), **marks})
        with SampleStore(run.room("curate") / "samples.sqlite") as store:
            rows, decisions, asked, tokens, failed = converse(Distillation(run, teacher, store, []), STAGE, seeds, config)
        over_budget = any(each.rule == BUDGET for each in decisions)
        return _finish(run, config, rows, decisions, asked, config.rounds or ROUNDS, tokens, failed, over_budget=over_budget)


def _configure(run: Run, settings: dict[str, Any]) -> None:
    run.configure("grow", settings, free=FREE if has_begun(run, "grow", other="prompts") else ("*",))


def _finish(
    run: Run,
    config: GrowConfig,
    rows: list[dict[str, Any]],
    decisions: list[Decision],
    asked: int,
    rounds: int,
    tokens: int,
    failed: Counter[str],
    *,
    over_budget: bool,
) -> GrowResult:
    """Record what was decided and write the prompts. Raises TooManyFailures afterwards."""
    run.ledger.record(STAGE, [(each.example_id, each.sample_index) for each in decisions], decisions)
    path = run.room("curate") / "prompts.jsonl"
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if failed.total() > config.max_failed * max(asked, 1):
        most = failed.most_common(1)[0][0]
        raise TooManyFailures(f"{run.path}: {failed.total():,} of {asked:,} requests failed, most often with: {most}; what came is kept")
    return GrowResult(
        path=path,
        prompts=len(rows),
        wanted=config.count,
        asked=asked,
        tokens=tokens,
        rejected=dict(Counter(each.rule for each in decisions if each.action == "rejected").most_common()),
        failed=dict(failed.most_common()),
        rounds=rounds,
        over_budget=over_budget,
    )


def _rounds(work: Distillation, method: Any, seeds: Sequence[Text], growth: _Growth) -> tuple[int, int, Counter[str], bool]:
    """Ask round after round, and no more in one than may still be wanted.

    Return how many, the tokens of all answers, the errors of the requests that failed, and whether a budget ended it.
    """
    config, failed = growth.config, Counter[str]()
    last: Sequence[Text] = seeds
    number = tokens = dry = 0
    for number in range(config.rounds or 10_000):
        asks = list(method(number, seeds, growth.grown, last))
        if not asks:
            return number, tokens, failed, False
        # an ask is known by what decides its answer: asked twice in a round (a seed that is there twice) it is one
        waiting = deque({wanted.key: (ask, wanted) for ask in asks for wanted in [_wanted(work.teacher, ask)]}.values())
        parents = {each.id: each for each in last}
        kept: list[Text] = []
        before, open_ones = len(growth.rows), 0
        while waiting and len(growth.rows) < config.count and not open_ones:
            part = [waiting.popleft() for _ in range(min(len(waiting), growth.num_asks))]
            work.wanted = [wanted for _, wanted in part if not _excess(work.teacher, wanted)]
            work.generate(work.missing(), label=f"round {number + 1}")
            answers = {row["key"]: row for row in work.samples().iter_rows(named=True)}
            errors = dict(work.store.failures().select("key", "error").iter_rows())
            for ask, wanted in part:
                key, children = wanted.key, list[Text]()
                if length := _excess(work.teacher, wanted):
                    growth.decisions.append(Decision(key[:16], 0, STAGE, "rejected", TOO_LONG, length, work.teacher.context))
                    continue
                if key in answers:
                    row = answers[key]
                    tokens += row["num_tokens"]
                    children = growth.sift(ask, key, row["text"], row["finish_reason"] == "length", number)
                elif key in errors:
                    growth.decisions.append(Decision(key[:16], 0, STAGE, "failed", f"error: {errors[key]}"))
                    failed[errors[key]] += 1
                else:
                    open_ones += 1
                if config.method == "evol" and not children:
                    children = [parents[ask.parents[0]]]  # tried again in another way
                kept += children
        last = kept
        new = len(growth.rows)
        log.info("round %d: %s of %s", number + 1, f"{new:,}", counted(config.count, "prompt"))
        dry = 0 if new > before else dry + 1
        if new >= config.count or open_ones or dry == DRY_ROUNDS:
            return number + 1, tokens, failed, open_ones > 0
    return number + 1, tokens, failed, False


def _excess(teacher: Teacher, wanted: Wanted) -> int | None:
    """Return the tokens of a request with its longest answer where they do not fit the context."""
    length = len(wanted.prompt.ids) + wanted.sampling.max_new_tokens
    return length if wanted.prompt.ids and teacher.context is not None and length > teacher.context else None


def _wanted(teacher: Teacher, ask: Ask) -> Wanted:
    messages = ask.messages
    if messages and teacher.config.system is not None:
        messages = [{"role": "system", "content": teacher.config.system}, *messages]
    ids = ask.ids or (tuple(teacher.chat.prompt(messages, thinking=teacher.config.thinking)) if teacher.chat else ())
    example = Example(content_id(messages or [{"ids": list(ids)}]), messages)
    return wanted_sample(teacher, Prompt(example, messages, None, ids), ask.index, teacher.config.sampling)


def _asking(config: GrowConfig) -> DistillConfig:
    return DistillConfig(
        **to_mapping(part(config, Sampling)),
        teacher=config.teacher,
        revision=config.revision,
        system=config.system if config.method != "magpie" else None,
        thinking=config.thinking,
        budget_tokens=config.budget_tokens,
        max_failed=config.max_failed,
        engine=config.engine,
    )


def _seeds(source: str | Path | None, config: GrowConfig) -> list[Text]:
    """Return seed prompts or passages. Raises UserError where the method needs what is not given, or the other way round."""
    if config.method == "magpie":
        if source is not None:
            raise UserError("magpie: writes prompts from nothing; leave the seeds out")
        return []
    if source is None:
        what = "files whose passages are asked about" if config.method == "documents" else "seed prompts"
        raise UserError(f"{config.method}: needs {what}")
    if config.method == "documents":
        return read_passages(Path(source), config.chunk_words)
    seeds, total = [], 0
    for example in read_prompts(source, config.limit):
        total += 1
        user = next((each for each in example.messages if each["role"] == "user"), None)
        if user is not None and (text := message_text(user).strip()):
            seeds.append(Text(content_id([{"role": "user", "content": text}]), text))
    if len(seeds) < total:
        log.warning("%s of %s seeds have no words of a user and are left out", f"{total - len(seeds):,}", f"{total:,}")
    seeds = list({each.id: each for each in seeds}.values())
    if not seeds:
        raise UserError(f"{source}: holds no prompt of a user to grow from")
    return seeds
