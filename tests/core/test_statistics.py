"""The intervals cover what they should, the tests err as often as they may, and all agree with known values and oracles."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sftkit.core.statistics import (
    Interval,
    _degrees_of_freedom,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    cluster_sums,
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_difference,
    sign_flip,
    wilson,
)


@pytest.mark.parametrize("n", [1, 3, 20, 541])
def test_wilson_is_scipys(n: int) -> None:
    for successes in {0, 1, n // 3, n - 1, n}:
        theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
        ours = wilson(successes, n)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson(0, n).low == 0.0
    assert wilson(n, n).high == 1.0


def test_wilson_covers() -> None:
    """No simulation: the coverage at a proportion is a sum over the binomial distribution."""
    n = 50
    intervals = [wilson(successes, n) for successes in range(n + 1)]
    coverages = []
    for share in np.linspace(0.02, 0.98, 97):
        covered = [not each.excludes(share) for each in intervals]
        coverages.append(stats.binom.pmf(range(n + 1), n, share)[covered].sum())
    assert np.mean(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.88


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for first, second in itertools.product(range(12), repeat=2):
        expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected), (first, second)
    assert mcnemar(1, 7) == pytest.approx(0.0703125)  # airway hyper-responsiveness, Bentur et al. 2009
    assert mcnemar(0, 5) > 0.05 > mcnemar(0, 6)  # fewer than six pairs can show nothing


def pairs(n: int, first: float, second: float) -> list[tuple[int, int, float]]:
    """Return every (only_first, only_second) of n pairs with its probability."""
    table = stats.multinomial(n, [first, second, 1 - first - second])
    return [(a, b, float(table.pmf([a, b, n - a - b]))) for a in range(n + 1) for b in range(n + 1 - a)]


@pytest.mark.parametrize("discordant", [0.05, 0.2, 0.5, 1.0])
def test_mcnemar_is_wrong_in_at_most_one_of_twenty(discordant: float) -> None:
    wrong = sum(p for a, b, p in pairs(40, discordant / 2, discordant / 2) if mcnemar(a, b) <= 0.05)
    assert wrong <= 0.05


def test_the_paired_difference_has_the_published_values() -> None:
    ours = paired_difference(4, 26, 48)  # statpsych's ci.prop.ps(.05, 12, 4, 26, 6)
    assert (ours.low, ours.high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    ours = paired_difference(1, 7, 21)  # Fagerland, Lydersen and Laake 2014, table V
    assert (ours.low, ours.high) == pytest.approx((0.013, 0.508), abs=5e-4)
    other = paired_difference(26, 4, 48)
    assert (other.low, other.high) == pytest.approx((-0.6251933, -0.2548067), abs=1e-7)
    assert paired_difference(0, 2, 2).high == 1.0
    with pytest.raises(ValueError, match="3 \\+ 2 of 4"):
        paired_difference(3, 2, 4)


@pytest.mark.parametrize(("first", "second"), [(0.1, 0.1), (0.05, 0.25), (0.0, 0.3), (0.3, 0.6)])
def test_the_paired_difference_covers(first: float, second: float) -> None:
    covered = sum(p for a, b, p in pairs(40, first, second) if not paired_difference(a, b, 40).excludes(second - first))
    assert 0.93 <= covered <= 0.985


@pytest.mark.parametrize(("n", "share", "level"), [(150, 0.3, 0.95), (60, 1.0, 0.95), (40, 0.5, 0.99)])
def test_the_minimum_detectable_difference_is_found_four_times_in_five(n: int, share: float, level: float) -> None:
    difference = minimum_detectable_difference(n, share, level=level)
    assert difference is not None
    found = [p for a, b, p in pairs(n, (share - difference) / 2, (share + difference) / 2) if mcnemar(a, b) <= 1 - level]
    assert sum(found) == pytest.approx(0.8, abs=1e-6)


def test_the_minimum_detectable_difference_is_near_the_usual_formula_and_knows_when_there_is_none() -> None:
    for n, share, power in ((1319, 0.2, 0.9), (14_042, 0.15, 0.8)):
        found = minimum_detectable_difference(n, share, power=power)
        assert found is not None
        right = stats.norm.ppf(0.975) * math.sqrt(share) + stats.norm.ppf(power) * math.sqrt(share - found**2)
        assert math.sqrt(n) * found == pytest.approx(right, rel=0.02)
        assert math.sqrt(n) * found > right  # the exact test is a little more careful than the formula
    assert [minimum_detectable_difference(*each) for each in ((1, 0.5), (3, 0.2), (5, 1.0), (20, 0.2), (100, 0.0))] == [None] * 5
    assert minimum_detectable_difference(6, 1.0) is not None


def test_the_bootstrap_is_the_distribution_over_all_resamples() -> None:
    """Three clusters have 27 resamples; the interval's ends are quantiles of theirs."""
    numerators, denominators = np.array([1.0, 4.0, 9.0]), np.array([2.0, 3.0, 5.0])
    every = sorted(numerators[list(each)].sum() / denominators[list(each)].sum() for each in itertools.product(range(3), repeat=3))
    tail = stats.norm.cdf(math.sqrt(3 / 2) * stats.t.ppf(0.1, 2))
    found = bootstrap_ratio(numerators, denominators, level=0.8, resamples=40_000)
    assert found.value == 14 / 10
    assert found.interval is not None
    expected = np.quantile(every, [tail, 1 - tail], method="inverted_cdf")
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected))


def test_the_bootstrap_agrees_with_scipys_where_the_expansion_is_nothing() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 200, 2000).astype(float)
    nats = tokens * generator.normal(1.5, 0.3, 2000)
    theirs = stats.bootstrap(
        (nats, tokens),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=generator,
    ).confidence_interval  # fmt: skip
    ours = bootstrap_ratio(nats, tokens, resamples=4000).interval
    assert ours is not None
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.08 * width)


def test_the_bootstrap_of_a_mean_is_as_wide_as_students() -> None:
    generator = np.random.default_rng(2)
    ratios = []
    for seed in range(200):
        values = generator.normal(size=8)
        interval = bootstrap_mean(values, resamples=2000, seed=seed).interval
        assert interval is not None
        low, high = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
        ratios.append((interval.high - interval.low) / (high - low))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)


def test_a_ratio_to_something_that_is_rare_has_no_upper_end() -> None:
    """Tokens for each accepted answer, of which there are few: a third of the resamples have none, and are infinite."""
    tokens, accepted = np.full(20, 9.0), np.array([1.0] + [0.0] * 19)
    found = bootstrap_ratio(tokens, accepted)
    assert found.value == 180
    assert found.interval is not None
    assert found.interval.high == math.inf
    assert 180 / 5 <= found.interval.low < 180
    seen = bootstrap_ratio(7 * accepted, accepted)  # 0 of 0 where it is not drawn: such a resample says nothing
    assert (seen.value, seen.interval) == (7, Interval(7, 7))


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(3).normal(size=30)
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)


def test_copies_in_a_cluster_tell_nothing_new() -> None:
    generator = np.random.default_rng(6)
    nats, tokens = generator.gamma(2, 20, 40), generator.integers(5, 80, 40)
    once = bootstrap_ratio(nats, tokens)
    names = [f"prompt {number}" for number in range(40) for _ in range(7)]
    clustered = bootstrap_ratio(np.repeat(nats, 7), np.repeat(tokens, 7), clusters=names)
    assert once.interval is not None
    assert clustered.interval is not None
    assert (clustered.value, clustered.interval.low, clustered.interval.high) == pytest.approx(
        (once.value, once.interval.low, once.interval.high)
    )
    naive = bootstrap_ratio(np.repeat(nats, 7), np.repeat(tokens, 7)).interval
    assert naive is not None
    assert naive.high - naive.low < 0.5 * (once.interval.high - once.interval.low)  # what ignoring the prompts would claim


def test_cluster_sums_keep_the_order_of_first_sight_and_refuse_a_wrong_length() -> None:
    sums = cluster_sums([[1, 2, 3, 4], [10, 20, 30, 40]], ["b", "a", "b", "c"])
    assert sums.tolist() == [[4, 40], [2, 20], [4, 40]]
    with pytest.raises(ValueError, match="4 rows, found 3"):
        cluster_sums([[1, 2, 3, 4]], ["a", "b", "c"])


def test_one_cluster_has_no_interval() -> None:
    found = bootstrap_ratio([1, 2, 3], [1, 1, 2], clusters=["a", "a", "a"])
    assert (found.value, found.interval) == (1.5, None)


def test_the_paired_ratio_difference_covers_with_few_prompts_and_is_narrower_than_an_unpaired_one() -> None:
    """Answers of very different lengths, two to a prompt, hard ones hard for both models; the truth is a difference of 0.1."""
    generator = np.random.default_rng(7)
    covered, widths, unpaired = 0, [], []
    repetitions = 400
    for seed in range(repetitions):
        tokens = np.exp(generator.normal(4, 0.7, 60)).round() + 5
        prompts = np.repeat(np.arange(30), 2)
        hard = 2 + generator.gamma(4, 0.2, 30)[prompts]
        first = tokens * (hard + generator.normal(0, 0.1, 60))
        second = tokens * (hard - 0.1 + generator.normal(0, 0.15, 30)[prompts])
        found = bootstrap_ratio_difference((first, tokens), (second, tokens), clusters=prompts.tolist(), resamples=1000, seed=seed)
        assert found.interval is not None
        covered += not found.interval.excludes(-0.1)
        widths.append(found.interval.high - found.interval.low)
        each = [bootstrap_ratio(nats, tokens, clusters=prompts.tolist(), resamples=500).interval for nats in (first, second)]
        unpaired.append(math.hypot(*(one.high - one.low for one in each if one)))
    assert covered / repetitions == pytest.approx(0.95, abs=0.025)
    assert np.mean(widths) < 0.5 * np.mean(unpaired)


def of_scores(generator: np.random.Generator, seed: int) -> Interval | None:
    return bootstrap_mean(generator.beta(0.8, 0.5, 100), resamples=500, seed=seed).interval


def of_subjects(generator: np.random.Generator, seed: int) -> Interval | None:
    """Twenty questions of each of 57 subjects, some of which are easy."""
    easy = np.repeat(generator.beta(2, 2, 57), 20)
    right = (generator.random(57 * 20) < easy).astype(float)
    return bootstrap_mean(right, clusters=np.repeat(np.arange(57), 20).tolist(), resamples=500, seed=seed).interval


def of_losses(generator: np.random.Generator, seed: int) -> Interval | None:
    """The losses of two models on 200 answers of very different lengths, one by 0.1 nats a token better."""
    tokens = np.exp(generator.normal(4, 0.7, 200)).round() + 5
    hard = 2 + generator.gamma(4, 0.2, 200)
    first, second = tokens * (hard + generator.normal(0, 0.1, 200)), tokens * (hard - 0.1 + generator.normal(0, 0.15, 200))
    return bootstrap_ratio_difference((first, tokens), (second, tokens), resamples=1000, seed=seed).interval


@pytest.mark.parametrize(("drawn", "truth"), [(of_scores, 8 / 13), (of_subjects, 0.5), (of_losses, -0.1)])
def test_the_bootstraps_intervals_cover_the_truth_in_95_of_100(
    drawn: Callable[[np.random.Generator, int], Interval | None], truth: float
) -> None:
    repetitions, covered = 4000, 0  # enough to tell 95 from 94 in three standard errors
    for seed in range(repetitions):
        interval = drawn(np.random.default_rng(seed), seed)
        assert interval is not None
        covered += not interval.excludes(truth)
    assert covered / repetitions == pytest.approx(0.95, abs=0.01)


def test_an_interval_is_wider_where_a_few_clusters_decide_and_never_narrower_than_students() -> None:
    generator = np.random.default_rng(12)
    for n in (2, 3, 8, 100):
        assert _degrees_of_freedom(generator.normal(size=n)) <= n - 1
    assert _degrees_of_freedom(np.array([0.0, 1.0] * 50)) == 99  # right and wrong: the spread is as good as known
    assert _degrees_of_freedom(np.ones(5)) == 4
    assert _degrees_of_freedom(np.array([0.0] * 99 + [1.0])) < 3  # one decides all


def test_in_one_of_twenty_evaluations_at_most_is_something_significant_where_nothing_is() -> None:
    """Three tasks and two models that are as good as the first: the least adjusted p-value of the six is what a reader sees."""
    generator, repetitions = np.random.default_rng(11), 4000
    sizes = (164, 541, 1319)
    wrong = 0
    for _ in range(repetitions):
        discordant = [int(generator.binomial(n, 0.2)) for n in sizes for _ in range(2)]
        firsts = [int(generator.binomial(each, 0.5)) for each in discordant]
        adjusted = holm([mcnemar(first, each - first) for first, each in zip(firsts, discordant, strict=True)])
        wrong += min(adjusted) <= 0.05
    assert wrong / repetitions <= 0.05


def test_sign_flips_are_scipys_permutations_of_pairs() -> None:
    generator = np.random.default_rng(8)
    for n in (4, 9, 12):
        values = generator.normal(0.5, 1, n)
        theirs = stats.permutation_test((values,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", n_resamples=np.inf)
        assert sign_flip(values) == pytest.approx(theirs.pvalue)
    values = generator.normal(0.25, 1, 60)
    theirs = stats.permutation_test((values,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", n_resamples=20_000, rng=9)
    assert sign_flip(values) == pytest.approx(theirs.pvalue, abs=0.015)


def test_sign_flips_know_ties_and_zeros() -> None:
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([0.1] * 6) == 2 / 64
    assert sign_flip([0.1, 0.2, 0.3, -0.1, 0.0, 0.0]) == sign_flip([0.1, 0.2, 0.3, -0.1])
    assert sign_flip(np.full(400, 3.0)) == 1 / 10_001  # never zero


def test_sign_flips_are_wrong_in_one_of_twenty() -> None:
    generator = np.random.default_rng(10)
    wrong = np.mean([sign_flip(generator.standard_t(3, 25), resamples=400, seed=seed) <= 0.05 for seed in range(4000)])
    assert wrong == pytest.approx(0.05, abs=0.01)


def test_holm_has_the_values_of_r() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # p.adjust(…, "holm")
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_holds_its_ends() -> None:
    interval = Interval(-0.2, 0.0)
    assert not interval.excludes(0.0)
    assert interval.excludes(1e-9)
