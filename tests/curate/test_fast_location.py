"""Fast facility location: greedy for its estimate by the definition, exact greedy where the sample holds all rows, and nearly as good elsewhere."""

from itertools import islice

import numpy as np
import pytest
from sftkit.curate import fast_location as module
from sftkit.curate.facility_location import facility_location
from sftkit.curate.fast_location import GRID, LOW, fast_location
from sftkit.curate.similarity import Vectors, unit_vectors

from .vectors import scattered

UNIT = GRID * GRID  # products of rounded vectors are whole numbers of 1 / UNIT


def parts(vectors: Vectors, neighbors: int, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cosines of rounded vectors in whole numbers, each row's floor in them, and the rows that are drawn."""
    steps = np.rint(vectors.astype(np.float64) * GRID).astype(np.int64)
    rounded, kind, _ = module._kinds(vectors)
    drawn = np.random.default_rng(0).permutation(len(vectors))[: max(sample, module.HITS * len(vectors) // neighbors)]
    floors, low = module._floors(rounded, kind[drawn], neighbors, sample)
    return steps @ steps.T, np.rint(floors[kind].astype(np.float64) * UNIT).astype(np.int64), drawn[: len(low)]


def oracle(vectors: Vectors, quality: np.ndarray | None, weight: float, neighbors: int, sample: int) -> list[tuple[int, float, int | None]]:
    """Greedy by the definition: what every row adds above the floors and, for those drawn, up to them is computed anew for every pick."""
    table, floors, drawn = parts(vectors, neighbors, sample)
    high = np.maximum(table - floors[:, None], 0)
    low = np.rint(np.minimum(np.maximum(table[drawn], 0) / UNIT * LOW, floors[drawn, None] / UNIT * LOW)).astype(np.int64)
    high_covered, low_covered = np.zeros(len(high), dtype=np.int64), np.zeros(len(low), dtype=np.int64)
    witness, left, picks = np.full(len(high), -1), list(range(len(high))), []
    share, bonus = (1.0, np.zeros(len(high))) if quality is None else (1 - weight, weight * quality)
    while left:
        above = np.array([int(np.maximum(high[:, row] - high_covered, 0).sum()) for row in left]) / UNIT
        below = np.array([int(np.maximum(low[:, row] - low_covered, 0).sum()) for row in left])
        gains = share * (above + len(high) / len(low) / LOW * below) + bonus[left]
        place = int(np.argmax(gains))
        pick = left.pop(place)
        picks.append((pick, float(gains[place]), None if witness[pick] < 0 else int(witness[pick])))
        witness[high[:, pick] > high_covered] = pick
        high_covered, low_covered = np.maximum(high_covered, high[:, pick]), np.maximum(low_covered, low[:, pick])
    return picks


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_its_oracle_with_its_gains_and_witnesses(seed: int) -> None:
    """A thousand cases, with quality and without, of which the sample holds all rows or few."""
    random = np.random.default_rng(seed)
    for number in range(50):
        vectors = scattered(random, int(random.integers(1, 60 if number % 10 == 0 else 16)))
        quality = None if number % 2 else random.integers(0, 4, size=len(vectors)) / 3.0
        weight, neighbors, sample = float(random.choice([0.1, 0.5, 1.0])), int(random.choice([1, 3, 8])), int(random.choice([1, 4, 100]))
        found = list(fast_location(vectors, quality, weight, neighbors=neighbors, sample=sample))
        expected = oracle(vectors, quality, weight, neighbors, sample)
        assert [(row, witness) for row, _, witness in found] == [(row, witness) for row, _, witness in expected]
        assert [gain for _, gain, _ in found] == pytest.approx([gain for _, gain, _ in expected], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_with_few_rows_it_is_exact_greedy_of_the_rounded_vectors(seed: int) -> None:
    """Where the sample holds all rows nothing is estimated: each gain is what the value grows by, but for the grid of low cosines."""
    random = np.random.default_rng(seed)
    vectors = unit_vectors(random.normal(size=(300, 8)))
    picks = list(islice(fast_location(vectors, neighbors=20), 40))
    rounded = np.rint(vectors * GRID) / GRID
    covered = np.zeros(300)
    for pick, gain, _ in picks:
        gains = np.maximum(rounded @ rounded.T - covered[:, None], 0).sum(axis=0)
        assert gain == pytest.approx(gains[pick], abs=300 / LOW)
        assert gains[pick] >= gains.max() - 2 * 300 / LOW
        covered = np.maximum(covered, rounded @ rounded[pick])


@pytest.mark.parametrize(("height", "width", "lines", "threads"), [(7, 50, 1, 1), (64, 64, 3, 3), (1000, 5000, 1000, 2)])
def test_blocks_and_threads_change_nothing(height: int, width: int, lines: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(np.random.default_rng(3), 700)
    expected = list(fast_location(vectors, neighbors=16, sample=64))
    for name, value in (("HEIGHT", height), ("WIDTH", width), ("LINES", lines)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("sftkit.curate.similarity.THREADS", threads)
    assert list(fast_location(vectors, neighbors=16, sample=64)) == expected


def test_any_beginning_of_the_ranking_is_the_ranking_of_that_size_and_copies_come_last() -> None:
    vectors = clustered(np.random.default_rng(4), 300)[np.r_[0:300, 0:100]]
    picks = [row for row, _, _ in fast_location(vectors, neighbors=16, sample=64)]
    assert sorted(picks) == list(range(400))
    assert picks[300:] == list(range(300, 400))
    assert [row for row, _, _ in islice(fast_location(vectors, neighbors=16, sample=64), 50)] == picks[:50]


def clustered(random: np.random.Generator, size: int) -> Vectors:
    return unit_vectors(random.normal(size=(size // 20, 64))[random.integers(size // 20, size=size)] + random.normal(size=(size, 64)))


def anywhere(random: np.random.Generator, size: int) -> Vectors:
    return unit_vectors(random.normal(size=(size, 64)))


def repeated(random: np.random.Generator, size: int) -> Vectors:
    """A few rows again and again, half of them exactly, by Zipf's law."""
    share = 1 / np.arange(1, size // 4 + 1)
    base = random.normal(size=(size // 4, 64))[random.choice(size // 4, size=size, p=share / share.sum())]
    return unit_vectors(base + (random.random((size, 1)) < 0.5) * 0.05 * random.normal(size=(size, 64)))


def narrow(random: np.random.Generator, size: int) -> Vectors:
    """All in one direction more or less, as the embeddings of some models are: no cosine is near 0."""
    return unit_vectors(random.normal(size=(size, 64)) * np.geomspace(1, 0.1, 64) + 0.5)


@pytest.mark.parametrize("kind", [clustered, anywhere, repeated, narrow])
def test_its_value_is_nearly_that_of_exact_greedy(kind: object) -> None:
    vectors = kind(np.random.default_rng(2), 2000)  # type: ignore[operator]
    exact, fast = ([row for row, _, _ in islice(ranking, 200)] for ranking in (facility_location(vectors), fast_location(vectors)))
    for size, least in ((20, 0.98), (60, 0.98), (200, 0.99)):  # what is far is judged by a sample: the fewer picks, the more that matters
        assert total(vectors, fast[:size]) >= least * total(vectors, exact[:size])


def total(vectors: Vectors, picks: list[int]) -> float:
    return float(np.maximum((vectors @ vectors[picks].T).max(axis=1), 0).sum())
