"""What a distillation will take, from a probe of a few prompts and a look at its pace. All those answers are stored: nothing is wasted."""

import math
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ..core.engines.base import Completion, EngineConfig, Request
from ..core.engines.loading import choose
from ..core.engines.servers import key_of_servers
from ..core.engines.tuning import Trial, tune
from ..core.errors import UserError
from ..core.example import tools_of
from ..core.formats import split_prompt
from ..core.progress import duration
from ..core.text import counted
from .config import DistillConfig
from .distill import PROBE, Distillation, Teacher, Wanted, distillation, prompt_tokens
from .pace import WITHIN, Pace
from .probe import Probe, tell
from .prompts import read_prompts

MOST_TO_TUNE = 2000  # prompts
MOST_PROBED = 250  # prompts
FEWEST_FOR_PACE = 1000  # missing samples; for fewer the probe's own rate will do
SHARE_FOR_PACE = 2  # at most one in so many of them


@dataclass(slots=True)
class Flow:
    """The rate of a server that has as many requests under way as it may, from a few answers, while fewer and fewer were.

    That is the tokens of a request's second times the requests at once, if the server answers each as fast among more of them.
    """

    slots: int  # requests that may be under way at once
    last: float = 0.0  # the time of the last answer; before, of the beginning
    seconds: float = 0.0  # of all requests together
    tokens: int = 0

    def __call__(self, completion: Completion, under_way: int) -> bool:
        """Take an answer; never is it enough."""
        now = time.monotonic()
        self.seconds += min(self.slots, under_way + 1) * (now - self.last)
        self.last = now
        self.tokens += completion.num_tokens
        return False

    @property
    def rate(self) -> float | None:
        """Return tokens per second; None without an answer."""
        return self.slots * self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is there, what the probe showed, and what the rest will take. None where nothing was measured."""

    run: Path
    wanted: int  # samples: k for each prompt that is asked
    stored: int  # of them, before the probe
    probed: int
    measured: int  # stored samples that the means are taken over, the probe's included
    probe: Probe  # what those samples look like
    prompt_tokens: int | None  # of the samples that are still missing, a prompt counted for each; None where a server renders
    new_tokens: float | None  # to be generated for the samples that are still missing
    standard_error: float | None  # of new_tokens; one prompt's samples count as one observation
    retries: int  # cut answers that will be asked again (retry_truncated), about; in none of the other numbers
    retry_tokens: int  # that these take at most
    retry_cost: float | None  # of these at most, as `cost`
    cost: float | None  # of what is still missing, by the prices that are set; None without a price
    tokens_per_second: float | None
    full: bool  # the rate is that of a full engine, and not of the probe, which runs fewer answers at once than the whole will
    slots: int | None  # requests at once for which a server's rate is reckoned from the probe; None where it was not
    seconds_to_start: float | None  # that the engine took here; None where it was not needed
    seconds: float | None  # that the rest would take, without the engine's start
    seconds_between: tuple[float, float] | None  # the least and the most of them; None where that is not known

    @property
    def remaining(self) -> int:
        """Return how many samples are missing after the probe."""
        return self.wanted - self.stored - self.probed

    @property
    def vague(self) -> bool:
        """Say whether the time may be off by more than WITHIN."""
        if not self.seconds or self.seconds_between is None:
            return False
        least, most = self.seconds_between
        return least < (1 - WITHIN) * self.seconds or most > (1 + WITHIN) * self.seconds

    def summary(self) -> str:
        """Write it for people."""
        lines = [f"{self.run}: {counted(self.wanted, 'sample')} wanted, {self.stored:,} were there, {self.probed:,} probed now and kept"]
        lines.append(f"to come: {counted(self.remaining, 'sample')}")
        if self.remaining and self.new_tokens is not None:
            within = f" ± {self.standard_error:,.0f} (standard error)" if self.standard_error is not None else ""
            lines.append(f"tokens to generate: about {self.new_tokens:,.0f}{within}")
        if self.remaining and self.prompt_tokens is not None:
            lines.append(f"tokens of prompts: {self.prompt_tokens:,}")
        if self.remaining and self.seconds is not None:
            rate = f"at the {self.tokens_per_second:,.0f} tokens/s "
            if self.full:
                rate += "that it ran at for a while"
            elif self.slots:
                rate += f"of {self.slots:,} requests at once, if each is answered as fast as the probe's were"
            else:
                rate += "that the probe ran at; a whole batch runs faster than its few answers"
            start = "" if self.seconds_to_start is None else f", after {duration(self.seconds_to_start)} to start"
            between = "" if self.seconds_between is None else ", between {} and {},".format(*map(duration, self.seconds_between))
            lines.append(f"time: about {duration(self.seconds)}{between} {rate}{start}")
            if self.vague:
                lines.append(f"that is not known within {WITHIN:.0%}: the run is too short for that, or the engine's pace too uneven")
        elif self.remaining:
            lines.append("time: not known, the probe measured nothing")
        if self.remaining and self.cost is not None:
            lines.append(f"cost: about {self.cost:,.4f}")
        if self.retries:
            most = counted(self.retry_tokens, "token")
            if self.tokens_per_second:
                most += f" and {duration(self.retry_tokens / self.tokens_per_second)}"
            if self.retry_cost is not None:
                most += f" and a cost of {self.retry_cost:,.4f}"
            lines.append(f"besides: about {counted(self.retries, 'cut answer')} to be asked for again (retry_truncated), up to {most} more")
        if self.probe.answers:
            lines += [self.probe.shares(), *(f"warning: {fault}" for fault in self.probe.faults()), tell(self.probe.examples())]
        return "\n".join(lines)


def tune_teacher(source: str | Path, config: DistillConfig, *, seconds: float, tell: Callable[[Trial], None]) -> EngineConfig:
    """Find the fastest settings for this teacher, these prompts and this machine, and remember them: `distill` then takes them.

    Nothing is stored but the settings. Raises UserError for no time at all, and what `core.engines.tuning.tune` raises.
    """
    if not seconds > 0:
        raise UserError(f"seconds: expected more than 0, found {seconds:g}")
    examples = read_prompts(source, config.limit or MOST_TO_TUNE)
    with closing(Teacher.find(config)) as teacher:
        if teacher.chat is None:
            raise UserError("tune: a server has its own settings; tune it where it runs")
        requests = []
        for number, example in enumerate(examples):
            messages, _ = split_prompt(example)
            system = [{"role": "system", "content": config.system}] if config.system is not None else []
            ids = tuple(teacher.chat.prompt([*system, *messages], thinking=config.thinking, tools=tools_of(example.meta)))
            if teacher.context is None or len(ids) + config.max_new_tokens <= teacher.context:
                request = Request(key=str(number), prompt_ids=ids, messages=messages, sampling=config.sampling, seed=number)
                requests.append(replace(request, logprob=config.logprobs))
    if not requests:
        raise UserError(f"{source}: holds no prompt that fits this teacher's context with an answer")
    return tune(config.teacher, config.engine, requests, revision=config.revision, warm_up=seconds / 2, seconds=seconds, tell=tell)


def estimate(source: str | Path, run: Path, config: DistillConfig) -> Estimate:
    """Generate one sample of up to 50 evenly spaced prompts that miss some, store them, and say what the rest will take.

    Where the answers' lengths differ so much that 50 do not tell their mean within 15 % (two standard errors), up to 250 are asked.
    Where many samples are missing and the engine is no server that wants a key, and so perhaps money, it is then given all that it can
    take until its pace is known: about 20 seconds of the work itself, after as many answers as it has under way at once. The run
    folder is begun with these settings, as `distill` would; raises what `distill` raises.
    """
    with distillation(source, run, config) as work:
        missing = work.missing()
        asked = work.first_of_each(missing, PROBE)
        start = time.monotonic()
        if asked:
            work.teacher.engine  # noqa: B018  opens it
        started = time.monotonic() - start if asked else None
        served = choose(config.engine) == "openai"
        flow = Flow(config.engine.concurrency * len((config.engine.base_url or "").split(",")), last=time.monotonic())
        probed, tokens, seconds = work.generate(asked, label="probe", enough=flow)
        paced = None if served and key_of_servers() else _pace(work, missing)
        if paced is None and (more := _unlike(work, missing)):
            flow.last = time.monotonic()
            again = work.generate(more, label="probe", enough=flow)
            probed, tokens, seconds = probed + again[0], tokens + again[1], seconds + again[2]
        stored = _first_answers(work)
        keys = set(stored["key"])
        left = [each for each in missing if each.key not in keys]
        mean, error, _ = _lengths(stored)
        probe = work.look_at(asked or work.first_of_each(work.wanted, PROBE))
        new_tokens = None if mean is None else mean * len(left)
        rate, whole, between = None, None, None
        if paced and left and mean:
            lengths = random.Random(0).choices(stored["num_tokens"].to_list(), k=len(left))
            pace, order, ending = paced
            found = pace.forecast(order, lengths, ending, in_batches=choose(config.engine) == "transformers")
            off = math.hypot(found.unlike, 2 * (error or 0.0) / mean)
            rate, whole, between = found.rate, found.seconds, (max(0.0, 1 - off) * found.least, (1 + off) * found.most)
        elif probed:
            rate = flow.rate if served else tokens / seconds
            whole = new_tokens / rate if new_tokens and rate else None
            if whole and choose(config.engine) == "vllm":
                between = min(seconds, whole), whole  # one turn of a full engine takes no less than the probe's did
        read = sum(prompt_tokens(each.prompt) for each in left)
        retries = 0
        if config.retry_truncated and stored.height:
            retries = len(work.retries()) + round(len(left) * stored.filter(pl.col("finish_reason") == "length").height / stored.height)
        cost = config.cost(new_tokens, read, whole or 0.0) if config.priced and new_tokens is not None else None
        retry_tokens = 2 * config.max_new_tokens * retries
        each = sum(prompt_tokens(one.prompt) for one in work.wanted) / max(1, len(work.wanted))  # any of them may be cut
        return Estimate(
            run=work.run.path,
            wanted=len(work.wanted),
            stored=len(work.wanted) - len(missing),
            probed=len(missing) - len(left),
            measured=stored.height,
            probe=probe,
            prompt_tokens=read if work.teacher.chat else None,
            new_tokens=new_tokens,
            standard_error=None if error is None else error * len(left),
            retries=retries,
            retry_tokens=retry_tokens,
            retry_cost=config.cost(retry_tokens, retries * each, retry_tokens / rate if rate else 0.0) if config.priced else None,
            cost=cost,
            tokens_per_second=rate,
            full=paced is not None,
            slots=flow.slots if served and paced is None else None,
            seconds_to_start=started,
            seconds=whole,
            seconds_between=between,
        )


def _first_answers(work: Distillation) -> pl.DataFrame:
    """Return the stored answers, each at its wanted length: of one that was cut and asked again, the one that was cut."""
    return work.store.frame().filter(pl.col("key").is_in([each.key for each in work.wanted]))


def _lengths(stored: pl.DataFrame) -> tuple[float | None, float | None, int]:
    """Return the mean tokens of an answer, its standard error, and the number of prompts: each counts once, with the mean of its own."""
    means = stored.group_by("example_id", maintain_order=True).agg(pl.col("num_tokens").mean())["num_tokens"].to_list()
    if not means:
        return None, None, 0
    mean = sum(means) / len(means)
    if len(means) == 1:
        return mean, None, 1
    return mean, math.sqrt(sum((each - mean) ** 2 for each in means) / (len(means) - 1) / len(means)), len(means)


def _unlike(work: Distillation, missing: list[Wanted]) -> list[Wanted]:
    """Return what to ask besides, where the answers so far are too unlike in length: one sample each of prompts that have none."""
    stored = _first_answers(work)
    mean, error, prompts = _lengths(stored)
    if not mean or error is None or 2 * error <= WITHIN * mean:
        return []
    known = set(stored["example_id"])
    wanted = min(MOST_PROBED, math.ceil(prompts * (2 * error / (WITHIN * mean)) ** 2)) - prompts
    return work.first_of_each([each for each in missing if each.row[0] not in known], wanted) if wanted > 0 else []


def _pace(work: Distillation, missing: list[Wanted]) -> tuple[Pace, list[str], float] | None:
    """Let the engine run full for a while; return how its answers came, to what, in this order, and the seconds after the last one.

    None where too little is missing, or nothing was answered. The prompts are taken in a random order, so that what they say of the
    rest is not what stands first in the file, and each with all its samples, as in the whole run.
    """
    stored = work.store.keys()
    left = [each for each in missing if each.key not in stored]
    if len(left) < FEWEST_FOR_PACE:
        return None
    by_prompt: dict[str, list[Wanted]] = {}
    for each in left:
        by_prompt.setdefault(each.row[0], []).append(each)
    groups = list(by_prompt.values())
    random.Random(0).shuffle(groups)
    several = getattr(work.teacher.engine, "wait_for_all", None)
    if several is not None:
        several()  # processes on one card start one after another
    first = [each for group in groups for each in group][: len(left) // SHARE_FOR_PACE]
    pace = Pace(begin=time.monotonic())
    _, tokens, seconds = work.generate(first, label="pace", enough=pace)
    return (pace, [each.key for each in first], max(0.0, seconds - pace.times[-1])) if tokens else None
