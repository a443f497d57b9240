"""Intervals and tests for models that answered the same questions: everything is paired, and says how sure it is."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrik, ndtr, ndtri, stdtrit

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1 << 20  # numbers held at once while resampling: 8 MB

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Say whether the value lies outside."""
        return not self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval; None where there are too few clusters (fewer than two) to tell."""

    value: float
    interval: Interval | None


def wilson(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the score interval of a proportion: it stays sensible at 0 of n, at n of n and for small n.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, found {successes} of {n}")
    z = float(ndtri(0.5 + level / 2))
    share, weight = successes / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # at the ends the bound is exact; rounding would leave it a hair inside
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of equal proportions in pairs, from the pairs in which only one of the two succeeded.

    Under the null hypothesis these fall to either side like a fair coin. McNemar 1947, Psychometrika 12; the binomial
    form is in Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91.
    """
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5)))


def paired_difference(only_first: int, only_second: int, n: int, *, level: float = LEVEL) -> Interval:
    """Return the interval of (proportion of the second) - (proportion of the first), over n pairs.

    Wald's with one pseudo-pair for each side: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data", Journal of Educational and Behavioral Statistics 37(4).
    """
    if n <= 0 or only_first + only_second > n:
        raise ValueError(f"expected at most n discordant pairs and n > 0, found {only_first} + {only_second} of {n}")
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = float(ndtri(0.5 + level / 2)) * math.sqrt((first + second - (second - first) ** 2) / (n + 2))
    return Interval(max(-1.0, second - first - half), min(1.0, second - first + half))


def minimum_detectable_difference(n: int, discordant: float, *, level: float = LEVEL, power: float = 0.8) -> float | None:
    """Return the smallest difference of two paired proportions that the exact McNemar test finds with this power in n pairs.

    `discordant` is the share of pairs in which only one of the two succeeds. None where even the largest difference that this share
    allows would be missed. The power is the test's own, summed over how many pairs come out unequal: the usual formula (Connor 1987,
    "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43) promises more than the exact test has.
    """
    if n <= 0 or not 0 <= discordant <= 1 or not 0 < power < 1:
        raise ValueError(f"expected n > 0, a share of discordant pairs, a power below 1; found {n}, {discordant}, {power}")
    if discordant == 0:
        return None
    middle, width = n * discordant, 8 * math.sqrt(n * discordant * (1 - discordant)) + 1
    unequal = np.arange(max(0, math.floor(middle - width)), min(n, math.ceil(middle + width)) + 1)
    chance = bdtr(unequal, n, discordant) - np.where(unequal > 0, bdtr(np.maximum(unequal - 1, 0), n, discordant), 0.0)
    # the most successes of the one that has fewer at which the test still finds a difference
    critical = np.floor(np.nan_to_num(bdtrik((1 - level) / 2, unequal, 0.5), nan=0.0))
    critical -= bdtr(critical, unequal, 0.5) > (1 - level) / 2
    found = critical >= 0

    def power_at(difference: float) -> float:
        better = (discordant + difference) / (2 * discordant)
        tails = [bdtr(critical[found], unequal[found], each) for each in (better, 1 - better)]
        return float(chance[found] @ (tails[0] + tails[1]))

    if power_at(discordant) < power:
        return None
    low, high = 0.0, discordant
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power_at(middle) >= power else (middle, high)
    return high


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples is right, from n of which `correct` are.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, section 2.1.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"expected 0 <= correct <= n and 1 <= k <= n, found {correct} of {n}, k {k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_mean(
    values: ArrayLike, *, clusters: Sequence[Hashable] | None = None, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return the mean of values and its bootstrap interval; for paired scores give their differences. See `bootstrap`."""
    column = np.asarray(values, dtype=np.float64)
    sums = cluster_sums([column, np.ones_like(column)], clusters)
    return bootstrap(sums, lambda each: each[:, 0] / each[:, 1], level=level, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return sum(numerators) / sum(denominators) and its bootstrap interval: nats per token, bits per byte. See `bootstrap`."""
    sums = cluster_sums([numerators, denominators], clusters)
    return bootstrap(sums, lambda each: each[:, 0] / each[:, 1], level=level, resamples=resamples, seed=seed)


def bootstrap_ratio_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the ratio of the second minus that of the first, each (numerators, denominators) over the same rows, paired.

    A resample takes the same clusters for both. See `bootstrap`.
    """
    sums = cluster_sums([*first, *second], clusters)

    def difference(each: Numbers) -> Numbers:
        return each[:, 2] / each[:, 3] - each[:, 0] / each[:, 1]

    return bootstrap(sums, difference, level=level, resamples=resamples, seed=seed)


def cluster_sums(columns: Sequence[ArrayLike], clusters: Sequence[Hashable] | None) -> Numbers:
    """Return the columns' sums within each cluster, [clusters, columns]; without clusters each row is one."""
    rows = np.stack([np.asarray(each, dtype=np.float64) for each in columns], axis=1)
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise ValueError(f"expected a cluster for each of {len(rows)} rows, found {len(clusters)}")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(each, len(numbers)) for each in clusters]
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, places, rows)
    return sums


def bootstrap(sums: Numbers, statistic: Callable[[Numbers], Numbers], *, level: float, resamples: int, seed: int) -> Estimate:
    """Return a statistic of column sums and its interval, from clusters drawn with replacement.

    `sums` is [clusters, columns], `statistic` maps [resamples, columns] to [resamples]. Whole clusters are drawn because
    the rows of one prompt are not independent: Davison and Hinkley 1997, "Bootstrap Methods and their Application", 3.8.
    The interval is the expanded percentile one, which is as wide as Student's where a plain percentile interval is too
    narrow for few clusters: Hesterberg 2015, "What teachers should know about the bootstrap", arXiv 1411.5279. Where a few clusters
    decide, as the longest answers do, it is as wide as Student's with as many degrees of freedom as their spread is known with.
    Resamples of which the statistic says nothing (0 of 0) are left out; one that is infinite (something of 0) may be an end.
    """
    value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    n = len(sums)
    if n < 2:
        return Estimate(value, None)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // n)
    drawn = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        places = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(places.ravel(), minlength=size * n).reshape(size, n)  # how often each resample has each cluster
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(statistic(times @ sums))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = _degrees_of_freedom(statistic(sums.sum(axis=0) - sums))
    tail = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(freedom, (1 - level) / 2)))
    found = np.concatenate(drawn)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, [tail, 1 - tail], method="linear" if np.isfinite(found).all() else "nearest")
    return Estimate(value, Interval(float(low), float(high)))


def _degrees_of_freedom(left_out: Numbers) -> float:
    """Return the degrees of freedom of the variance of a statistic, from its values without each cluster: at most n - 1.

    Those of the chi-squared distribution that has the mean and the variance of the sample variance (Satterthwaite 1946, "An
    approximate distribution of estimates of variance components", Biometrics Bulletin 2): 2 n / (k - (n - 3) / (n - 1)), k the kurtosis.
    """
    n = len(left_out)
    away = left_out[np.isfinite(left_out)]
    away = away - away.mean() if len(away) else away
    spread = float((away**2).mean()) if len(away) else 0.0
    if spread == 0:
        return n - 1
    heavier = float((away**4).mean()) / spread**2 - (n - 3) / (n - 1)
    return n - 1 if heavier <= 0 else min(n - 1, max(1.0, 2 * n / heavier))


def sign_flip(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the two-sided p-value that paired differences centre on zero, from random changes of their signs.

    Exact where all 2**n changes are no more than `resamples`; else (b + 1) / (resamples + 1), which never is zero.
    Fisher 1935, "The Design of Experiments", section 21; Phipson and Smyth 2010, arXiv 1603.05766, for the + 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]  # their sign changes nothing
    observed = abs(values.sum()) * (1 - 1e-12)  # equal sums may differ by rounding
    n = len(values)
    if n == 0:
        return 1.0
    if 2**n <= resamples:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ values) >= observed))
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // n)
    beyond = 0
    for start in range(0, resamples, block):
        signs = 2 * generator.integers(2, size=(min(block, resamples - start), n), dtype=np.int8) - 1
        beyond += int((np.abs(signs @ values) >= observed).sum())
    return (beyond + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having tested several hypotheses, in their order.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
