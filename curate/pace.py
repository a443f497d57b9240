"""The pace of an engine, from when the answers of a short run came, and with it what other answers will take.

An engine with slots for so many answers at once takes the next request when one of them ends, and makes a token of each in a step. A
step takes a time of its own and a time for each of its tokens, and the first steps of a process take more: kernels are compiled and
loaded. So an answer comes after

    cold + per_step x steps until then + per_token x tokens until then

where steps and tokens follow from the slots and the lengths of the answers alone. Slots and times are those with which the answers
would have come when they came. Then the steps of other answers can be counted, and their time is known, with the steps at its end in
which fewer and fewer are under way, and with an engine that gives its answers in waves, since all are as long.
"""

import heapq
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import t as student

from ..core.engines.base import Completion

log = logging.getLogger(__name__)

SECONDS_OF_PACE = 20.0
WITHIN = 0.15  # what an estimate is meant to be right within
AGAIN = 0.5  # of a cold beginning: a process loads its kernels anew, and finds those on the disk that another has compiled
COLD_WEIGHT, EVEN_WEIGHT = 0.05, 0.02  # of what is taken where the answers do not tell: no cold, and half of a full step for its tokens
COARSE, FINE = 1.25, 1.0005  # numbers of slots that are tried are so far apart, first and last
SHOWN = 0.01  # of the time: what steps take at least, if they are seen at all
MOST_GAPS = 8  # between answers, the longest, at which a wave may end
FEWEST_TURNS, MOST_TURNS = 4, 10  # of the slots, whose paces are compared
SURE = 0.95  # how often the time is to be within what is said, if the pace goes on as unevenly as it was


@dataclass(slots=True)
class Pace:
    """When answers came. It is enough after so many as were under way at the first, and SECONDS_OF_PACE from there."""

    begin: float  # by time.monotonic
    times: list[float] = field(default_factory=list)  # in seconds from the beginning
    tokens: dict[str, int] = field(default_factory=dict)  # by key
    passing: int = 0  # under way at the first answer

    def __call__(self, completion: Completion, under_way: int) -> bool:
        """Take an answer; say whether it is enough."""
        if not self.times:
            self.passing = under_way
        self.times.append(time.monotonic() - self.begin)
        self.tokens[completion.key] = completion.num_tokens
        return len(self.times) > self.passing and self.times[-1] - self.times[self.passing] >= SECONDS_OF_PACE

    def forecast(self, asked: Sequence[str], lengths: Sequence[int], ending: float, *, in_batches: bool) -> "Forecast":
        """Tell what answers of such lengths will take, in tokens, in the order in which they are asked.

        `asked` has the keys of the requests that were measured, in their order, and `ending` is the seconds after the last answer. An
        engine that works `in_batches` has no slots: its next requests wait for the last answer of a batch, and take as long for each
        token as these did; so has one whose answers came all at once.
        """
        times, order = np.array(self.times), [self.tokens[key] for key in asked if key in self.tokens]
        engine = None if in_batches else fit(order, times, self.passing + 1)
        if engine is None or engine.seconds(order) < SHOWN * times[-1]:
            rate = sum(order) / times[-1]
            rest, turn, cold, hidden = sum(lengths) / rate, self.passing + 1, 0.0, 0.0
            fitted = np.cumsum(order) / rate
        else:
            rest, rate, turn, cold = engine.seconds(lengths), engine.rate, engine.slots, engine.cold
            fitted = engine.times(order)
            # within two turns nothing but unlike lengths tells a slow beginning from slow steps
            hidden = times[0] / times[-1] if len(times) < 2 * turn else 0.0
            log.info("pace: about %s answers at once, %.1f s of a cold beginning", f"{turn:,}", cold)
        return Forecast(
            seconds=float(rest + AGAIN * cold + ending),
            least=float(rest * (1 - hidden) + ending),
            most=float(rest + cold + ending),
            unlike=_unlike(times, fitted, turn, float(rest)),
            rate=float(rate),
        )


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the rest will take. The least and the most are without and with the whole of a cold beginning, at an even pace."""

    seconds: float
    least: float
    most: float
    unlike: float  # how far the time may be off, as a share of it, by how uneven the pace was
    rate: float  # tokens per second of a full engine


@dataclass(frozen=True, slots=True)
class Slotted:
    """An engine with slots, as its answers showed it."""

    slots: int
    cold: float  # seconds
    per_step: float  # seconds
    per_token: float  # seconds

    @property
    def rate(self) -> float:
        """Return the tokens per second when all slots are taken."""
        return self.slots / (self.per_step + self.per_token * self.slots)

    def times(self, lengths: Sequence[int]) -> Any:
        """Return when answers come, in order; their beginning is not cold."""
        steps, tokens = count_steps(lengths, self.slots)
        return self.per_step * steps + self.per_token * tokens

    def seconds(self, lengths: Sequence[int]) -> float:
        """Return when the last one comes."""
        return float(self.times(lengths)[-1])


def count_steps(lengths: Sequence[int], slots: int) -> tuple[Any, Any]:
    """Return of each answer, in the order in which they end, the steps until then and the tokens of all answers until then."""
    free = [0] * min(slots, len(lengths))
    begins = []
    for length in lengths:
        begins.append(free[0])
        heapq.heapreplace(free, free[0] + length)
    begun = np.array(begins, dtype=float)
    ends = np.sort(begun + np.array(lengths, dtype=float))
    left = np.arange(len(ends) - 1, -1, -1)
    tokens = np.cumsum(ends) + left * ends - begun.sum()  # where all have begun: those that have ended, and those that have not
    return ends, np.where(ends <= begun[-1], slots * ends, tokens)


def fit(lengths: Sequence[int], times: Any, most: int) -> Slotted:
    """Find the engine, of at most so many slots, that gives answers of these lengths at these times: the least squares."""
    tried: dict[int, tuple[float, Slotted]] = {}

    def off(slots: float) -> float:
        number = max(1, min(round(slots), most, len(lengths)))
        if number not in tried:
            tried[number] = _fit(lengths, times, number)
        return tried[number][0]

    waves = np.sort(np.argsort(np.diff(times))[-MOST_GAPS:] + 1)
    begin = [most / COARSE**power for power in range(1 + int(math.log(most, COARSE)))]
    best, step = min([*begin, *waves, *np.diff(waves)], key=off), math.sqrt(COARSE)
    while step > FINE:
        best, step = min((best, best / step, best * step), key=off), math.sqrt(step)
    return min(tried.values(), key=lambda each: each[0])[1]


def _fit(lengths: Sequence[int], times: Any, slots: int) -> tuple[float, Slotted]:
    """Return the squares that are left with so many slots, and the engine."""
    steps, tokens = count_steps(lengths, slots)
    columns = np.stack([np.ones(len(steps)), steps, tokens / slots], axis=1)
    weight = math.sqrt(len(steps))
    cold, even = COLD_WEIGHT * weight, EVEN_WEIGHT * weight * steps[-1]
    found, _ = nnls(np.concatenate([columns, [[cold, 0, 0], [0, even, -even]]]), np.concatenate([times, [0, 0]]))
    return float(((columns @ found - times) ** 2).sum()), Slotted(slots, float(found[0]), float(found[1]), float(found[2]) / slots)


def _unlike(times: Any, fitted: Any, turn: int, seconds: float) -> float:
    """Return how far off so many seconds may be, as a share, by the paces of a few parts (Student's t); WITHIN where there are too few."""
    parts = min(MOST_TURNS, len(times) // turn)
    if parts < FEWEST_TURNS:
        return WITHIN
    took, meant = (np.diff([part.mean() for part in np.array_split(each, parts)]) for each in (times, fitted))
    if not (took.any() and meant.all() and seconds):  # answers that all came at once, or are empty
        return WITHIN
    pace = took / meant
    error = pace.std(ddof=1) / pace.mean()
    return float(student.ppf((1 + SURE) / 2, len(pace) - 1) * error * math.sqrt(1 / len(pace) + meant.mean() / seconds))
