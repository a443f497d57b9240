"""Numbers from verdicts on pairs: win rates, raw and at equal lengths, flips, and how often a judge agrees with labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtri

from ..core.statistics import LEVEL, Estimate, Interval, bootstrap_mean, mcnemar, wilson

PRIOR = 1 / 9  # precision of both coefficients (sd 3): it keeps them finite where one side wins everything, and is nothing beside data


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often the first of two models is preferred; a tie is half a win. `controlled` is the rate at equal lengths."""

    n: int
    wins: int
    ties: int
    losses: int
    rate: Estimate
    controlled: Estimate
    p_value: float  # of wins against losses, exact, ties aside
    flips: int  # ties because the two orders disagree
    flip_interval: Interval
    longer_wins: float | None  # share of the decided pairs of unequal length that the longer answer won; None without any


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How often a judge says what the labels say, of one set of labelled pairs, each judged in both orders."""

    name: str
    n: int
    accuracy: float  # mean over both orders
    interval: Interval | None
    both: float  # right in both orders, where a guess is right one time in four
    same: float  # the orders agree


def win_rate(winners: Sequence[int], flipped: Sequence[bool], lengths: Sequence[tuple[int, int]], *, seed: int = 0) -> WinRate:
    """Return the numbers of verdicts: 1, 2 or 0 (a tie), whether the orders disagreed, and the lengths of both answers."""
    outcomes = np.array([{1: 1.0, 2: 0.0, 0: 0.5}[each] for each in winners])
    differences = np.array([first - second for first, second in lengths], dtype=np.float64)
    decided = (outcomes != 0.5) & (differences != 0)
    wins, losses = int((outcomes == 1).sum()), int((outcomes == 0).sum())
    rate, controlled = share(outcomes, seed=seed), length_controlled(outcomes, differences)
    if outcomes.min() == outcomes.max():  # residuals tell nothing then: it is as uncertain as the raw rate
        controlled = Estimate(controlled.value, rate.interval)
    return WinRate(
        n=len(outcomes),
        wins=wins,
        ties=len(outcomes) - wins - losses,
        losses=losses,
        rate=rate,
        controlled=controlled,
        p_value=mcnemar(wins, losses),
        flips=sum(flipped),
        flip_interval=wilson(sum(flipped), len(outcomes)),
        longer_wins=float(((differences > 0) == (outcomes == 1))[decided].mean()) if decided.any() else None,
    )


def share(outcomes: NDArray[np.float64], *, seed: int) -> Estimate:
    """Return the mean of outcomes (1, 0.5 or 0) and its interval.

    It is a bootstrap interval, or where all outcomes are equal, which resampling would take for certain, Wilson's; there a half is
    one win of two.
    """
    n, estimate = len(outcomes), bootstrap_mean(outcomes, seed=seed)
    if n < 2 or outcomes.min() != outcomes.max():
        return estimate
    return Estimate(estimate.value, wilson(n, 2 * n) if outcomes[0] == 0.5 else wilson(int(outcomes.sum()), n))


def length_controlled(outcomes: ArrayLike, differences: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Return the win rate that a logistic regression gives at equal lengths, and its interval.

    `outcomes` are 1, 0.5 or 0, `differences` the first length minus the second. The regression is that of AlpacaEval 2 (Dubois et
    al. 2024, arXiv 2404.04475) for one pair of models, without the term for the difficulty of each instruction:
    P(win) = σ(θ + φ · tanh(difference / sd of the differences)); the rate is σ(θ). The interval is from the sandwich variance of θ,
    for halves have no binomial one.
    """
    y, difference = np.asarray(outcomes, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    spread = float(difference.std())
    columns = np.stack([np.ones_like(y), np.tanh(difference / spread) if spread else np.zeros_like(y)], axis=1)
    beta = np.zeros(2)
    for _ in range(50):
        chance = expit(columns @ beta)
        gradient = columns.T @ (y - chance) - PRIOR * beta
        curvature = (columns * (chance * (1 - chance))[:, None]).T @ columns + PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    if len(y) < 2:
        return Estimate(float(expit(beta[0])), None)
    parts = columns * (y - expit(columns @ beta))[:, None]
    inverse = np.linalg.inv(curvature)
    error = float(np.sqrt((inverse @ (parts.T @ parts) @ inverse)[0, 0])) * np.sqrt(len(y) / (len(y) - 1))
    half = float(ndtri(0.5 + level / 2)) * error
    return Estimate(float(expit(beta[0])), Interval(float(expit(beta[0] - half)), float(expit(beta[0] + half))))


def agreement(name: str, labels: Sequence[int], orders: Sequence[tuple[int | None, int | None]], *, seed: int = 0) -> Agreement:
    """Return how often verdicts are right: `labels` are 1 or 2, `orders` what was said in either order, None where nothing was."""
    right = np.array([[said == label for said in pair] for label, pair in zip(labels, orders, strict=True)], dtype=np.float64)
    accuracy = share(right.mean(axis=1), seed=seed)
    return Agreement(
        name=name,
        n=len(labels),
        accuracy=accuracy.value,
        interval=accuracy.interval,
        both=float(right.all(axis=1).mean()),
        same=float(np.mean([first == second and first is not None for first, second in orders])),
    )
