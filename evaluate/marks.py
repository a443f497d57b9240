"""From marks to numbers: how good each model is at a task, and whether one is better than the first, with how sure that is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri

from ..core.statistics import (
    Estimate,
    Interval,
    bootstrap_mean,
    cluster_sums,
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_difference,
    pass_at_k,
    sign_flip,
    wilson,
)
from .health import Health
from .results import aligned, told
from .tasks.base import Mark

ALPHA = 0.05  # chance that anything at all is called significant where nothing is
POWER = 0.8

WAYS = {"chat": "asked in chats", "completion": "given texts to go on from", "choices": "by the probability of the choices"}

Marks = Sequence[Mapping[str, Mark]]  # of one item's answers, by metric


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A model's mean over questions, from 0 to 1, and its 95 % interval; None where one cluster tells nothing about others."""

    name: str
    n: int  # questions
    clusters: int | None  # subjects or conversations that they share; None where they share none
    mean: float
    interval: Interval | None
    not_found: float  # share of answers in which no answer was found; they count as wrong
    pass_at: dict[int, Estimate]  # of several samples: that one of k is right
    majority: Estimate | None  # of several samples: that the answer given most often is right; ties are shared
    clean: Estimate | None = None  # the mean without the questions that stand in the training data
    clean_n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model minus the first one, in one of the ways that this was asked, over the same questions. 95 % interval, paired."""

    task: str
    metric: str
    model: str
    baseline: str
    difference: float
    interval: Interval | None
    p_value: float  # exact McNemar for right and wrong, sign flips for scores
    p_adjusted: float  # Holm, over tasks and models
    detectable: float | None  # what so many questions find four times in five, all tests counted; None: they are too few for any

    def told(self) -> str:
        """Write it for people."""
        line = f"{self.model} − {self.baseline}: {self.metric} {_signed(self.difference)} points"
        if self.interval is not None:
            line += f" (95 % {_signed(self.interval.low)} to {_signed(self.interval.high)})"
        line += f", p {self.p_adjusted:.2g}: {'significant' if self.p_adjusted <= ALPHA else 'not significant'}"
        if self.detectable is None:
            return f"{line}; too few questions to find any difference"
        return f"{line}; {100 * self.detectable:.1f} points would be found four times in five"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What came out of one task, by the name under which a model was asked."""

    name: str
    n: int
    left_out: dict[str, int]
    asked: dict[str, str]  # how, by row: chat, completion, choices, or by which template that is not the model's own
    unasked: dict[str, str]  # rows that are missing, for not one question was answered, and why
    metrics: dict[str, list[Metric]]
    health: dict[str, Health | None]  # None where nothing was written
    comparisons: list[Comparison]
    generated: dict[str, int]
    contaminated: int | None

    def summary(self) -> str:
        """Write it for people."""
        lines = [f"{self.name}: {self.n:,} question{'s' * (self.n != 1)} answered by every model"]
        if self.left_out:
            lines.append(f"left out for all models: {told(self.left_out)}")
        lines += [f"{name} answered no question and is left out: {reasons}" for name, reasons in self.unasked.items()]
        ways = {way: [name for name in self.asked if self.asked[name] == way] for way in self.asked.values()}
        lines.append("; ".join(f"{WAYS.get(way, f'asked {way}')}: {', '.join(names)}" for way, names in ways.items()))
        extra = sorted({k for each in self.metrics.values() for metric in each for k in metric.pass_at})
        clean = self.contaminated is not None
        head = ["model", "metric", "score", "95 %", "n", "no answer found", *(f"pass@{k}" for k in extra)]
        rows: list[Sequence[str]] = [[*head, *(["maj"] if extra else []), *(["without contaminated"] if clean else [])]]
        for name, metrics in self.metrics.items():
            for each in metrics:
                span = "one group" if each.interval is None else f"{100 * each.interval.low:.1f} to {100 * each.interval.high:.1f} %"
                row = [name, each.name, _percent(each.mean), span, f"{each.n:,}", _percent(each.not_found)]
                row += [_told(each.pass_at.get(k)) for k in extra] + ([_told(each.majority)] if extra else [])
                rows.append([*row, *([f"{_told(each.clean)} of {each.clean_n:,}"] if clean else [])])
        lines += aligned(rows)
        if clean:
            lines.append(f"{self.contaminated:,} of {self.n:,} questions stand in the training data")
        written = {name: each for name, each in self.health.items() if each is not None}
        if written:
            table: list[Sequence[str]] = [("answers", "stopped", "cut", "repetitive", "empty", "mean tokens", "other language", "new")]
            for name, each_health in written.items():
                shares = [each_health.stop_rate, each_health.truncated, each_health.repetitive, each_health.empty]
                told_shares = [_percent(share) for share in shares]
                tokens, other = f"{each_health.mean_tokens:.1f}", _percent(each_health.other_language)
                table.append((name, *told_shares, tokens, other, f"{self.generated[name]:,}"))
            lines += aligned(table)
        return "\n".join([*lines, *(each.told() for each in self.comparisons), *against_both(self.comparisons)])


def against_both(comparisons: Sequence[Comparison]) -> list[str]:
    """Say of each model whether it is better than the first in every way that this was asked; nothing where there was one.

    Better than each of two is what both tests show at once, whatever the better way is (Berger 1982, "Multiparameter hypothesis
    testing and acceptance sampling", Technometrics 24).
    """
    told = []
    for model in dict.fromkeys(each.model for each in comparisons):
        own = [each for each in comparisons if each.model == model]
        if len(own) > 1:
            shown = all(each.p_adjusted <= ALPHA for each in own)
            up, down = all(each.difference > 0 for each in own), all(each.difference < 0 for each in own)
            verdict = "better" if shown and up else "worse" if shown and down else "no difference holds against both"
            told.append(f"{model} against both {' and '.join(each.baseline for each in own)}: {verdict}")
    return told


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _told(estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None:
        return _percent(None if estimate is None else estimate.value)
    return f"{100 * estimate.value:.1f} % ({100 * estimate.interval.low:.1f} to {100 * estimate.interval.high:.1f})"


def measure(marks: Sequence[Marks], metric: str, groups: Sequence[str | None], drawn: Mapping[str, Any]) -> Metric:
    """Return a model's number for a metric, from the marks of each item's answers. There is at least one item."""
    values = _means(marks, metric)
    every = [each[metric] for item in marks for each in item]
    samples = len(marks[0])
    binary = all(each.value in (0.0, 1.0) for each in every)
    clusters = _clusters(groups)
    whole = _estimate(values, clusters, binary, drawn)
    pass_at, majority = {}, None
    if samples > 1 and binary:
        steps = sorted({1, samples, *(2**power for power in range(1, samples.bit_length()) if 2**power < samples)})
        right = [round(sum(each[metric].value for each in item)) for item in marks]
        pass_at = {k: _estimate([pass_at_k(samples, correct, k) for correct in right], clusters, binary, drawn) for k in steps}
        if any(each.answer and each.votes for each in every):
            majority = _estimate([_majority([each[metric] for each in item]) for item in marks], clusters, binary, drawn)
    return Metric(
        name=metric,
        n=len(values),
        clusters=len(set(clusters)) if clusters else None,
        mean=whole.value,
        interval=whole.interval,
        not_found=sum(not each.found for each in every) / len(every),
        pass_at=pass_at,
        majority=majority,
    )


def without(
    metric: Metric, marks: Sequence[Marks], groups: Sequence[str | None], clean: Sequence[bool], drawn: Mapping[str, Any]
) -> Metric:
    """Return a metric with its mean over the clean items beside it."""
    kept = [place for place, good in enumerate(clean) if good]
    if not kept:
        return replace(metric, clean_n=0)
    binary = all(each[metric.name].value in (0.0, 1.0) for item in marks for each in item)
    values = _means([marks[place] for place in kept], metric.name)
    return replace(metric, clean=_estimate(values, _clusters([groups[place] for place in kept]), binary, drawn), clean_n=len(kept))


def _means(marks: Sequence[Marks], metric: str) -> list[float]:
    return [sum(each[metric].value for each in item) / len(item) for item in marks]


def _estimate(values: Sequence[float], clusters: Sequence[str] | None, binary: bool, drawn: Mapping[str, Any]) -> Estimate:
    """Return the mean of questions and its interval: Wilson's where each is right or wrong and independent, else a bootstrap."""
    if binary and clusters is None and all(each in (0.0, 1.0) for each in values):
        return Estimate(sum(values) / len(values), wilson(round(sum(values)), len(values)))
    found = bootstrap_mean(values, clusters=clusters, **drawn)
    span = found.interval
    if _alike(span) and 0 <= found.value <= 1:  # resamples cannot show that others may differ
        count = len(set(clusters)) if clusters else len(values)
        return Estimate(found.value, wilson(round(found.value * count), count))
    return found


def _alike(span: Interval | None) -> bool:
    """Say whether all clusters gave one value, but for rounding."""
    return span is not None and span.high - span.low < 1e-9


def _majority(marks: Sequence[Mark]) -> float:
    counts = Counter(each.answer for each in marks if each.found)
    if not counts:
        return 0.0
    most = max(counts.values())
    value = {each.answer: each.value for each in marks if each.found}
    winners = [value[answer] for answer, count in counts.items() if count == most]
    return sum(winners) / len(winners)


def _clusters(groups: Sequence[str | None]) -> list[str] | None:
    """Return the cluster of each item; None where no two share one."""
    named = [f"group {group}" if group is not None else f"item {number}" for number, group in enumerate(groups)]
    return None if len(set(named)) == len(named) else named


def compare_marks(
    task: str,
    metric: str,
    marks: Mapping[str, Sequence[Marks]],
    pairs: Sequence[tuple[str, str]],
    groups: Sequence[str | None],
    drawn: Mapping[str, Any],
    *,
    tests: int = 1,
) -> list[Comparison]:
    """Compare the marks of pairs (baseline, other), item by item. p_adjusted is p_value until `adjust` sees all tasks.

    `tests` are the comparisons of all tasks: what so many questions find, they find after the adjustment for these.
    """
    means = {name: np.array([sum(each[metric].value for each in item) / len(item) for item in items]) for name, items in marks.items()}
    clusters = _clusters(groups)
    found = []
    for baseline, name in pairs:
        first, second = means[baseline], means[name]
        change, n = second - first, len(first)
        binary = clusters is None and all(set(np.unique(each)) <= {0.0, 1.0} for each in (first, second))
        interval: Interval | None
        detectable: float | None
        if binary:
            only_first, only_second = int((change < 0).sum()), int((change > 0).sum())
            interval, p_value = paired_difference(only_first, only_second, n), mcnemar(only_first, only_second)
            # the share of unequal pairs is not known exactly either: one of each kind more than were seen
            detectable = minimum_detectable_difference(n, (only_first + only_second + 2) / (n + 2), level=1 - ALPHA / tests)
        else:
            interval = bootstrap_mean(change, clusters=clusters, **drawn).interval
            sums = cluster_sums([change], clusters)[:, 0]
            mean = float(change.mean())
            if _alike(interval) and abs(mean) <= 1:  # resamples cannot show that others may differ
                up, down = (round(len(sums) * max(0.0, each)) for each in (mean, -mean))
                interval = paired_difference(down, up, len(sums))
            p_value = sign_flip(sums, **drawn)
            width = 0.0 if interval is None else interval.high - interval.low
            least = 2 / 2 ** len(sums)  # p-value that flipping so many signs can give
            detectable = _detectable(width / 2, tests) if least <= ALPHA / tests and width > 0 and math.isfinite(width) else None
        comparison = Comparison(
            task=task,
            metric=metric,
            model=name,
            baseline=baseline,
            difference=float(change.mean()),
            interval=interval,
            p_value=p_value,
            p_adjusted=p_value,
            detectable=detectable,
        )
        found.append(comparison)
    return found


def _detectable(half: float, tests: int) -> float:
    """Return the difference of scores that is found four times in five, from half of its 95 % interval."""
    return half * float(ndtri(1 - ALPHA / tests / 2) + ndtri(POWER)) / float(ndtri(1 - ALPHA / 2))


def adjust(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Return results whose comparisons are adjusted for there being several, over all tasks and models."""
    adjusted = iter(holm([each.p_value for result in results for each in result.comparisons]))
    return [replace(result, comparisons=[replace(each, p_adjusted=next(adjusted)) for each in result.comparisons]) for result in results]
