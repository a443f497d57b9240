"""Distil: ask a teacher for k answers to each prompt, every finished answer durable at once, whatever interrupts."""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from ..core.chat import Chat, load_chat
from ..core.config import to_mapping
from ..core.engines.base import NOT_FINITE, Completion, Engine, EngineConfig, Request, Sampling
from ..core.engines.loading import choose, settle
from ..core.engines.registry import open_engine
from ..core.engines.replicas import replica_count
from ..core.engines.tuning import tuned
from ..core.errors import TooManyFailures, UserError
from ..core.example import Decision, Sample, evenly_spaced
from ..core.hardware import GpuBusy, visible_gpus
from ..core.models import context_length, load_settings, model_identity, quantisation, resolve_model
from ..core.progress import Progress, duration
from ..core.reasoning import CLOSE, OPEN, split_reasoning
from ..core.run import Run
from ..core.store import SampleStore, decisive_settings, sample_key, sample_seed
from .config import DistillConfig, format_pattern
from .decided import record
from .distill_result import BUDGET, DistillResult
from .probe import FEWEST, Probe, num_matched, warn_unlike
from .prompts import Prompt, check_growth, choose_prompts, forget_steps, read_prompts
from .rows import message_text

log = logging.getLogger(__name__)

FREE = (  # settings that do not decide what a sample is
    *("prompts", "k", "limit", "logprobs", "retry_truncated", "budget_tokens", "budget_hours", "budget_cost", "max_failed", "engine"),
    *("want_format", "stop_below", "reasoning", "price_input", "price_output", "price_hour"),
)
PROBE = 50  # prompts
SECONDS_TO_FINISH, SHARE_TO_FINISH = 60.0, 0.05  # of a budget of time: what is under way then has the longer of these
TRUNCATED = "truncated"  # the rule of answers that were cut: no later step takes them
EMPTY = "empty_answer"  # the rule of answers that ended without a word: no later step takes them either


@dataclass(slots=True)
class Teacher:
    """A teacher of whom everything is known but the weights are not loaded, until `engine` is asked for."""

    config: DistillConfig
    identity: str
    chat: Chat | None  # None where a server renders
    context: int | None
    tells_logprobs: bool  # every answer comes with its log-probability: that is asked for, or costs nothing
    _settled: EngineConfig  # which engine, and once it is open, all that it was opened with
    _engine: Engine | None = None

    @classmethod
    def find(cls, config: DistillConfig, *, prompts: int | None = None) -> "Teacher":
        """Look the teacher up; `prompts`, where few, settle what runs it. Raises UserError for none, or a server that is not reached."""
        settled = replace(config.engine, engine=choose(config.engine))
        # not by what few prompts settle: the answers of a folder that grows are chosen by it together
        tells = config.logprobs or settled.engine == "transformers"
        if settled.engine == "openai":
            engine = open_engine(config.teacher, settled, revision=config.revision)
            return cls(config, engine.identity, engine.chat, engine.context_length, tells, settled, engine)
        model = resolve_model(config.teacher, revision=config.revision)
        settings = load_settings(model)
        if prompts is not None and config.json_schema is None:
            quantised = quantisation(model, settings) is not None
            tokens = config.max_new_tokens * (3 if config.retry_truncated else 1)  # a cut answer is made again, of twice as many
            settled = settle(config.engine, prompts * config.k, tokens, quantised=quantised)
        contexts = [context_length(settings), config.engine.max_model_len]
        context = min((each for each in contexts if each), default=None)
        return cls(config, model_identity(model), load_chat(model), context, tells, settled)

    @property
    def engine(self) -> Engine:
        """Open the engine, once."""
        if self._engine is None:
            engine = tuned(self._settled, self.identity)
            if engine.replicas is None and engine.executor == "local" and engine.engine == "vllm":
                engine = replace(engine, replicas=1)  # a night of work is not to end with one engine
            start = time.monotonic()
            self._engine, self._settled = open_engine(self.config.teacher, engine, revision=self.config.revision), engine
            log.info("%s: ready after %s", self.config.teacher, duration(time.monotonic() - start))  # apart from the rate of tokens
            if self._engine.identity != self.identity:
                raise UserError(f"{self.config.teacher}: its weights changed while it was being loaded; run the same command again")
        return self._engine

    def gpus(self) -> list[str]:
        """Return the names of the GPUs of this machine that its engine was opened on; none where it was not, or a server's."""
        engine = self._settled
        if self._engine is None or engine.engine == "openai" or engine.executor != "local" or engine.device == "cpu":
            return []
        _, _, first = (engine.device or "").partition(":")
        return visible_gpus()[int(first or 0) :][: replica_count(engine) * engine.tensor_parallel_size]

    def close(self) -> None:
        """Give the engine's memory back."""
        if self._engine is not None:
            self._engine.close()

    def settings(self) -> dict[str, Any]:
        """Return what all samples of this teacher and these settings share; `cache explain` compares it."""
        template = self.chat.fingerprint() if self.chat else None
        asked = {"system": self.config.system, "thinking": self.config.thinking, "template": template}
        return {**decisive_settings(self.identity, self.config.sampling), **asked}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sample that the run is to have."""

    key: str
    prompt: Prompt
    index: int
    sampling: Sampling
    seed: int  # of its own stream of random numbers

    @property
    def row(self) -> tuple[str, int]:
        """Return its identity in the ledger."""
        return self.prompt.example.id, self.index


def distill(source: str | Path, run: Path, config: DistillConfig) -> DistillResult:
    """Generate k samples for each prompt of `source` into the run folder; what is there already is not generated again.

    Records the stages `prompts` and `distill`. Raises UserError for a folder of other prompts or settings, and
    TooManyFailures, after everything that finished is stored and recorded.
    """
    with distillation(source, run, config) as work:
        if config.stop_below is not None:
            work.probe().stop()
        new_samples, new_tokens, seconds = work.generate(work.missing())
        if config.retry_truncated:
            again = work.generate(work.retries(), label="ask cut ones again")
            new_samples, new_tokens, seconds = new_samples + again[0], new_tokens + again[1], seconds + again[2]
        return work.finish(new_samples, new_tokens, seconds)


@contextmanager
def distillation(source: str | Path, path: Path, config: DistillConfig) -> Iterator["Distillation"]:
    """Open a run folder for distilling: prompts read, decided and recorded, keys made, nothing generated.

    Raises UserError for a budget of cost that does not hold one answer, beside what `distill` raises it for.
    """
    examples = read_prompts(source, config.limit)
    with closing(Teacher.find(config, prompts=len(examples))) as teacher, Run.create(path) as run:
        if config.thinking and teacher.chat is None:
            raise UserError(f"thinking: a server renders for itself; turn thinking on where {config.teacher} is served")
        began = has_begun(run, "distill", other="grow")
        if began:
            check_growth(run, examples, source, limited=config.limit is not None)
        if "reasoning" in _configure(run, source, teacher, began=began) and began:
            forget_steps(run, "thoughts are to stand elsewhere than last time (reasoning)")
        prompts = choose_prompts(run, examples, teacher.chat, teacher.context, config)
        wanted = [
            wanted_sample(teacher, prompt, index, config.sampling)
            for prompt in prompts
            for index in range(config.k)  # a prompt's samples stand together, so that engines can share its prefix
        ]
        if wanted and config.budget_cost is not None:
            least = config.cost(config.max_new_tokens, prompt_tokens(wanted[0].prompt))
            if config.budget_cost < least:  # the first alone would be too much, and nothing would be asked
                raise UserError(f"budget_cost: expected {least:g} or more (one answer can cost that), found {config.budget_cost:g}")
        with SampleStore(run.room("curate") / "samples.sqlite", made=began) as store:
            yield Distillation(run, teacher, store, wanted)


@dataclass(slots=True)
class Distillation:
    """A distillation under way: what is wanted, what is stored, and the teacher who makes the rest."""

    run: Run
    teacher: Teacher
    store: SampleStore
    wanted: list[Wanted]
    _gpus: GpuBusy | None = None  # while it generates
    _spent: int = 0  # tokens of answers in this run so far, in all calls
    _read: int = 0  # tokens of their prompts
    _before: float = 0.0  # seconds of generating in this call, up to the last time it began
    _asked: dict[str, Wanted] = field(default_factory=dict)  # sent and not answered yet
    _deadline: float | None = None  # by time.monotonic, after which nothing more is asked
    _end: float = math.inf  # by time.monotonic, after which what is under way is given up
    _began: float = 0.0  # by time.monotonic, less the pauses
    _enough: bool = False  # nothing more is asked
    _checked: set[str] = field(default_factory=set)  # keys, PROBE at most, whose log-probabilities show whether they are numbers
    _broken: int = 0  # of their answers: had none that was finite
    _told: bool = False  # what the first answers show
    _opened: dict[tuple[int, ...], bool] = field(default_factory=dict)  # by the last tokens of a prompt: whether a thought is open there

    def missing(self) -> list[Wanted]:
        """Return the wanted samples that are not stored, in order."""
        stored = self.store.keys()
        return [each for each in self.wanted if each.key not in stored]

    def first_of_each(self, missing: Sequence[Wanted], most: int) -> list[Wanted]:
        """Return the first missing sample of up to so many prompts, evenly spaced."""
        return evenly_spaced(list({each.row[0]: each for each in reversed(missing)}.values())[::-1], most)

    def probe(self) -> Probe:
        """Look at the answers to 50 prompts, evenly spaced; those that are missing are asked now."""
        asked = self.first_of_each(self.wanted, PROBE)
        stored = self.store.keys()
        self.generate([each for each in asked if each.key not in stored], label="probe")
        found = self.look_at(asked)
        if not found.answers:
            raise UserError(
                f"{self.run.path}: none of the {len(asked)} prompts of the probe got an answer; `sftkit curate show` has the errors"
            )
        return found

    def look_at(self, asked: Sequence[Wanted]) -> Probe:
        """Look at the stored answers to these: of those that were asked twice, at the first one, which was cut."""
        found = Probe(self.teacher.config)
        rows = {row["key"]: row for row in self.store.frame().select("key", "text", "finish_reason").iter_rows(named=True)}
        for each in asked:
            if each.key in rows:
                found.add(message_text(each.prompt.messages[-1]), rows[each.key]["text"], rows[each.key]["finish_reason"])
        return found

    def retries(self) -> list[Wanted]:
        """Return what to ask again: a sample for each that was cut, with twice the tokens, where it fits the context and is not stored."""
        cut, again = self._cut(self.samples())
        if len(again) < cut:
            log.info("%s cut answers do not fit the context with twice the tokens", f"{cut - len(again):,}")
        return again

    def _cut(self, samples: pl.DataFrame) -> tuple[int, list[Wanted]]:
        """Return how many of these were cut and not asked again yet, and what asks again for those that fit."""
        cut, context = set(samples.filter(pl.col("finish_reason") == "length")["key"]), self.teacher.context
        again = [self._longer(each) for each in self.wanted if each.key in cut]
        return len(again), [each for each in again if context is None or len(each.prompt.ids) + each.sampling.max_new_tokens <= context]

    def _longer(self, wanted: Wanted) -> Wanted:
        twice = replace(wanted.sampling, max_new_tokens=2 * wanted.sampling.max_new_tokens)
        return wanted_sample(self.teacher, wanted.prompt, wanted.index, twice)

    def samples(self) -> pl.DataFrame:
        """Return the wanted samples that are stored, one for each, columns as in the store's frame; asked twice, the second."""
        stored = self.store.frame()
        have = set(stored["key"])
        longer = {each.key: self._longer(each).key for each in self.wanted if each.key in have} if len(self.store.settings()) > 1 else {}
        keys = [longer[each.key] if longer.get(each.key) in have else each.key for each in self.wanted]
        return stored.join(pl.Series("key", keys, pl.String).to_frame(), on="key", how="semi", maintain_order="left")

    def generate(
        self, missing: Sequence[Wanted], label: str = "distill", enough: Callable[[Completion, int], bool] | None = None
    ) -> tuple[int, int, float]:
        """Generate samples and store each as it finishes; return how many, their tokens, and the seconds it took.

        The engine is opened only if something is missing. Stops asking when the token budget could be overrun, or when `enough`,
        which is told of each answer and of how many are under way, says so; what is under way is waited for.
        """
        if not missing:
            return 0, 0, 0.0
        self._enough = False
        config, engine = self.teacher.config, self.teacher.engine
        settings = {**self.teacher.settings(), "max_new_tokens": missing[0].sampling.max_new_tokens}
        sampling_key = self.store.remember(config.teacher, settings)
        self._spent, self._read = self.store.tokens()
        waiting = deque(missing)
        first = self._to_check(missing)
        watching = label == "distill" and config.stop_below is None
        checking, seen = {each.key for each in first}, Probe(config)
        self._checked |= checking
        total = len(self.wanted) if label == "distill" else len(missing)
        start = time.monotonic()
        hours = config.hours(self._spent, self._read) if self._deadline is None else None
        if hours is not None:
            self._deadline = start + 3600 * hours
            self._end = self._deadline + max(SECONDS_TO_FINISH, SHARE_TO_FINISH * 3600 * hours)
        self._began = start - self._before
        if self._gpus is None:
            self._gpus = GpuBusy(self.teacher.gpus())
        with self._gpus, Progress(label, total=total, unit="samples", done=total - len(missing)) as progress:
            began = progress.done

            def durable(samples: int, tokens: int) -> None:
                progress.advance(samples, tokens=tokens)

            with self.store.writer(durable) as writer:
                before = None
                while waiting and len(waiting) != before:  # a round that asked for nothing: the budget is used up
                    before = len(waiting)
                    # an error's traceback holds the stream, and at the interpreter's exit it is too late to end its thread
                    with closing(engine.generate(self._ask(waiting))) as stream:  # type: ignore[type-var]
                        for completion in stream:
                            wanted = self._asked.pop(completion.key)
                            if enough is not None:
                                self._enough = enough(completion, len(self._asked)) or self._enough
                            self._spent += completion.num_tokens
                            self._read += completion.prompt_tokens or prompt_tokens(wanted.prompt)
                            if completion.finish_reason == "error":
                                told = " ".join((completion.error or "the engine gave no reason").split())
                                writer.put_failure(wanted.key, *wanted.row, told)
                            else:
                                sample = self._sample(wanted, completion, sampling_key)
                                writer.put(wanted.key, sample)
                            if completion.key in checking:
                                checking.discard(completion.key)
                                if completion.finish_reason == "error":
                                    self._broken += (completion.error or "").startswith(NOT_FINITE)
                                elif watching:
                                    seen.add(message_text(wanted.prompt.messages[-1]), sample.text, sample.finish_reason)
                                if not checking:
                                    self._look_at_first(seen)
                            if self._overdue():
                                log.warning("%s answers under way are given up: the time is over", f"{len(self._asked):,}")
                                self._asked.clear()
                                break
                    for key, wanted in self._asked.items():
                        writer.put_failure(key, *wanted.row, "the engine gave no answer")
                    self._asked.clear()
        self._before = time.monotonic() - self._began
        return progress.done - began, progress.tokens, time.monotonic() - start

    def _overdue(self) -> bool:
        """Say whether what is under way has had long enough to finish after the last moment to ask."""
        return bool(self._asked) and time.monotonic() > self._end

    def _to_check(self, missing: Sequence[Wanted]) -> list[Wanted]:
        """Return the first sample of each of the first prompts, 50 in all calls, but for those that failed by their numbers before.

        Asked again, these few say nothing of the model, which may have answered all others.
        """
        errors = self.store.failures()
        broken = set(errors.filter(pl.col("error").str.starts_with(NOT_FINITE))["key"])
        first = self.first_of_each([each for each in missing if each.key not in broken], len(missing))
        return first[: PROBE - len(self._checked)]

    def _look_at_first(self, seen: Probe) -> None:
        """Tell what the first answers show. Raises UserError where most have no finite probability: the rest would be no better.

        More than max_failed, that is: who bears any failure (teachers compared) goes on.
        """
        borne = max(0.5, self.teacher.config.max_failed) * len(self._checked)
        if self._broken >= FEWEST and self._broken > borne:
            raise UserError(
                f"{self.teacher.config.teacher}: {NOT_FINITE} for tokens of {self._broken} of the first {len(self._checked)} answers: its"
                " weights are damaged, or its numbers too large for the format it runs in (dtype). What finished is kept"
            )
        if seen.answers >= FEWEST:
            self._told = True
            seen.warn()

    def _ask(self, waiting: deque[Wanted]) -> Iterator[Request]:
        config = self.teacher.config
        while waiting and not self._enough:
            reserved = (len(self._asked) + 1) * waiting[0].sampling.max_new_tokens  # as if every answer under way took all it may
            if self._deadline is not None and time.monotonic() > self._deadline:
                return
            if config.budget_tokens is not None and self._spent + reserved > config.budget_tokens:
                return
            if config.budget_cost is not None:
                read = self._read + sum(prompt_tokens(each.prompt) for each in self._asked.values()) + prompt_tokens(waiting[0].prompt)
                if config.cost(self._spent + reserved, read, time.monotonic() - self._began) > config.budget_cost:
                    return
            wanted = waiting.popleft()
            self._asked[wanted.key] = wanted
            yield Request(
                key=wanted.key,
                prompt_ids=wanted.prompt.ids,
                messages=wanted.prompt.messages,
                sampling=wanted.sampling,
                seed=wanted.seed,
                logprob=config.logprobs or wanted.key in self._checked,
                tools=wanted.prompt.tools,
            )

    def _sample(self, wanted: Wanted, completion: Completion, sampling_key: str) -> Sample:
        assert completion.finish_reason != "error"
        reasoning, text = completion.reasoning, completion.text
        if reasoning is None:
            chat, end = self.teacher.chat, wanted.prompt.ids[-8:]
            if chat and end not in self._opened:  # nearly all prompts end in the same way
                self._opened[end] = chat.decode(end).rstrip().endswith(OPEN)
            # where a server renders, the prompt's end is not known: a closing tag without an opening one tells
            opened = self._opened[end] if chat else CLOSE in text and OPEN not in text
            reasoning, text = split_reasoning(text, opened=opened)
        return Sample(
            example_id=wanted.prompt.example.id,
            index=wanted.index,
            text=text,
            finish_reason=completion.finish_reason,
            num_tokens=completion.num_tokens,
            # not of those alone that were checked: the samples of a prompt are chosen by it
            logprob=completion.logprob if self.teacher.tells_logprobs else None,
            model=self.teacher.config.teacher,
            sampling_key=sampling_key,
            reasoning=reasoning,
            prompt_tokens=len(wanted.prompt.ids) or completion.prompt_tokens,
        )

    def finish(self, new_samples: int, new_tokens: int, seconds: float) -> DistillResult:
        """Record the stage `distill` and make samples that ended with words the run's data set. Raises TooManyFailures afterwards."""
        config = self.teacher.config
        stored, failures = self.samples(), self.store.failures()
        seen = stored.select("example_id", "sample_index", "finish_reason", "num_tokens", blank=pl.col("text").str.strip_chars() == "")
        have = {row[:2]: row[2:] for row in seen.iter_rows()}
        errors = dict(zip(failures["key"], failures["error"], strict=True))
        decisions = []
        for each in self.wanted:
            reason, tokens, blank = have.get(each.row, (None, None, False))
            if reason == "length":
                decisions.append(Decision(*each.row, "distill", "rejected", TRUNCATED, tokens))
            elif blank:
                decisions.append(Decision(*each.row, "distill", "rejected", EMPTY, tokens))
            elif reason is not None:
                decisions.append(Decision(*each.row, "distill", "kept"))
            else:
                rule = f"error: {errors[each.key]}" if each.key in errors else BUDGET
                decisions.append(Decision(*each.row, "distill", "failed", rule))
        if not self.run.ledger.holds("distill", decisions) or self.run.ledger.stages()[-1] == "distill":
            record(self.run, "distill", [each.row for each in self.wanted], decisions)
        rules = Counter(each.rule for each in decisions if each.action == "failed")
        over_budget = rules.pop(BUDGET, 0)
        rejected = self.run.ledger.summary().filter((pl.col("stage") == "prompts") & (pl.col("action") != "kept"))
        result = DistillResult(
            run=self.run.path,
            prompts=len({each.row[0] for each in self.wanted}),
            rejected=dict(zip(rejected["rule"], rejected["rows"], strict=True)),
            samples=stored.height,
            cut=stored.filter(pl.col("finish_reason") == "length").height,
            empty=sum(each.rule == EMPTY for each in decisions),
            again=Counter(errors.get(each.key, BUDGET) for each in self._cut(stored)[1]) if config.retry_truncated else None,
            matched=num_matched(format_pattern(config.want_format), stored["text"]),
            tokens=int(stored["num_tokens"].sum()),
            failed={rule.removeprefix("error: "): count for rule, count in rules.most_common()},
            over_budget=over_budget,
            cost=config.cost(*self.store.tokens(), seconds) if config.priced else None,
            new_samples=new_samples,
            new_tokens=new_tokens,
            seconds=seconds,
            gpu_busy=self._gpus.share if self._gpus else None,
        )
        if not self._told:  # of the first answers, which were too few for it
            some = stored[evenly_spaced(range(stored.height), PROBE)]
            warn_unlike(config, some.select("text", "finish_reason").iter_rows())
        untold = stored["logprob"].null_count()
        if config.logprobs and untold:
            log.warning(
                "%s of %s samples have no log-probability: they were stored without, and are not made again, or the server tells none;"
                " `score --with logprob:model=TEACHER` computes it",
                f"{untold:,}",
                f"{stored.height:,}",
            )
        failed, tried = rules.total(), rules.total() + result.samples
        if failed > config.max_failed * tried:
            raise TooManyFailures(
                f"{self.run.path}: {failed:,} of {tried:,} samples failed, more than the share of {config.max_failed:g} that max_failed"
                f" allows, most often with: {next(iter(result.failed))}; the other {result.samples:,} are kept, and the same command"
                " tries the failed ones again"
            )
        return result


def prompt_tokens(prompt: Prompt) -> int:
    """Return the tokens of a prompt; where a server renders, a third of its characters, which is more than most texts have."""
    return len(prompt.ids) or sum(len(message_text(each)) for each in prompt.messages) // 3 + 1


def wanted_sample(teacher: Teacher, prompt: Prompt, index: int, sampling: Sampling) -> Wanted:
    """Return a sample to be had, with its key and its seed."""
    decisive: dict[str, Any] = {"prompt": prompt.ids or prompt.sent, "model_identity": teacher.identity, "index": index}
    # the longest length decides what is stored, not how it begins: asked again for more tokens, the same answer goes on
    stream = sample_key(sampling=replace(sampling, max_new_tokens=0), **decisive)
    return Wanted(sample_key(sampling=sampling, **decisive), prompt, index, sampling, sample_seed(stream))


def has_begun(run: Run, section: str, *, other: str) -> bool:
    """Say whether a run holds anything that was made with its settings: a command that failed at its start binds nobody to them.

    Raises UserError where that was made by another command than the one with this section of its config, as by the one that records
    the stage `other`: rows of two would hide each other from the steps after them.
    """
    stages, store = run.ledger.stages(), run.path / "curate" / "samples.sqlite"
    began = bool(set(stages) - {"prompts"})
    if not began and store.exists():
        with SampleStore(store) as found:
            began = found.count() > 0
    if began and (section not in run.config() or other in stages):
        held = f" (it has recorded {', '.join(stages)})" if stages else ""
        raise UserError(f"{run.path}: this folder holds what another command has made{held}; give another folder")
    return began


def _configure(run: Run, source: str | Path, teacher: Teacher, *, began: bool) -> list[str]:
    settings = teacher.settings()
    marks = {"teacher_identity": teacher.identity, "template": settings["template"]}
    before = run.config().get("distill", {})
    same = before.get("teacher_identity") == teacher.identity  # then it does not matter by which path it was found
    free = (*FREE, "teacher", "revision") if same else FREE
    return run.configure("distill", {"prompts": str(source), **to_mapping(teacher.config), **marks}, free=free if began else ("*",))
