"""MMR, DPP and DEITA's filter equal their definitions; what other tools get wrong on the same rows is named."""

from collections.abc import Sequence

import numpy as np
import pytest
from sftkit.core.errors import UserError
from sftkit.curate.diversity import COPY, WIDTH, deita_filter, dpp, mmr
from sftkit.curate.similarity import Vectors, unit_vectors


def cosine_table(vectors: Vectors) -> np.ndarray:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    lengths[lengths == 0] = 1
    return np.round(wide @ wide.T / np.outer(lengths, lengths), 9)


def at_angles(*degrees: float) -> Vectors:
    turns = np.radians(degrees)
    return unit_vectors(np.stack([np.cos(turns), np.sin(turns)], axis=1))


def scattered(random: np.random.Generator, size: int) -> Vectors:
    """Random rows, some of them copies."""
    base = random.normal(size=(max(size // 2, 1), int(random.integers(2, 12))))
    return unit_vectors(base[random.integers(len(base), size=size)] + random.choice([0, 0.1]) * random.normal(size=(size, base.shape[1])))


def mmr_oracle(vectors: Vectors, quality: np.ndarray, weight: float) -> list[tuple[int, float]]:
    table, left, taken = cosine_table(vectors), list(range(len(vectors))), []
    picks = []
    while left:
        gains = [weight * quality[row] - (1 - weight) * (table[row, taken].max() if taken else 0.0) for row in left]
        place = int(np.argmax(gains))
        picks.append((left[place], gains[place]))
        taken.append(left.pop(place))
    return picks


@pytest.mark.parametrize("seed", range(20))
def test_mmr_equals_its_oracle(seed: int) -> None:
    """A thousand cases; where no two rows have the same score, the order of rows changes nothing."""
    random = np.random.default_rng(seed)
    for number in range(50):
        vectors = scattered(random, int(random.integers(1, 50 if number % 10 == 0 else 20)))
        alike = number % 2 == 0
        quality = random.integers(0, 5, size=len(vectors)) / 4.0 if alike else random.random(len(vectors))
        weight = float(random.choice([0, 0.3, 0.5, 1] if alike else [0.3, 0.5, 1]))
        found, expected = list(mmr(vectors, quality, weight)), mmr_oracle(vectors, quality, weight)
        assert [row for row, _, _ in found] == [row for row, _ in expected]
        assert [gain for _, gain, _ in found] == pytest.approx([gain for _, gain in expected], abs=1e-9)
        table = cosine_table(vectors)
        for place, (row, _, witness) in enumerate(found[1:], start=1):
            assert table[row, witness] == max(table[row, [pick for pick, _, _ in found[:place]]])
        if not alike:
            turn = random.permutation(len(vectors))
            assert [int(turn[row]) for row, _, _ in mmr(vectors[turn], quality[turn], weight)] == [row for row, _, _ in found]


def test_mmr_of_score_alone_is_by_score_and_of_difference_alone_is_k_center() -> None:
    vectors, quality = at_angles(0, 5, 90, 180), np.array([1.0, 0.9, 0.2, 0.1])
    assert [row for row, _, _ in mmr(vectors, quality, 1.0)] == [0, 1, 2, 3]
    assert [row for row, _, _ in mmr(vectors, quality, 0.0)] == [0, 3, 2, 1]


def dpp_oracle(vectors: Vectors, quality: np.ndarray | None, weight: float) -> list[tuple[int, float | None]]:
    """Greedy by determinants of the kernel, each computed from nothing."""
    kernel = np.exp((cosine_table(vectors) - 1) / WIDTH)
    np.fill_diagonal(kernel, 1.0)
    left, taken, picks = list(range(len(vectors))), [], []
    while left:
        before = np.linalg.slogdet(kernel[np.ix_(taken, taken)])[1] if taken else 0.0
        logs = {}
        for row in left:
            sign, log = np.linalg.slogdet(kernel[np.ix_([*taken, row], [*taken, row])])
            if sign > 0 and np.exp(log - before) > COPY:
                logs[row] = log - before
        if not logs:
            return picks + [(row, None) for row in left]
        rest = sorted(logs)
        gains = [round(logs[row] if quality is None else (1 - weight) * logs[row] + weight * quality[row], 9) for row in rest]
        place = int(np.argmax(gains))
        picks.append((rest[place], gains[place]))
        taken.append(rest[place])
        left.remove(rest[place])
    return picks


@pytest.mark.parametrize("seed", range(20))
def test_dpp_equals_the_search_by_determinants(seed: int) -> None:
    """A thousand cases; any smaller size is the beginning of the ranking."""
    random = np.random.default_rng(seed)
    for number in range(50):
        base = random.normal(size=(int(random.integers(1, 20 if number % 10 == 0 else 8)), 12))
        vectors = unit_vectors(base[random.integers(len(base), size=int(random.integers(1, 30 if number % 10 == 0 else 12)))])
        quality, weight = (
            (None, 0.0) if number % 2 else (random.integers(0, 5, size=len(vectors)) / 4.0, float(random.choice([0.2, 0.5, 1])))
        )
        found, expected = list(dpp(vectors, quality, weight, len(vectors))), dpp_oracle(vectors, quality, weight)
        assert [row for row, _, _ in found] == [row for row, _ in expected]
        for (_, gain, _), (_, other) in zip(found, expected, strict=True):
            assert (gain is None and other is None) or gain == pytest.approx(other, abs=1e-6)
        fewer = int(random.integers(1, len(vectors) + 1))
        assert list(dpp(vectors, quality, weight, fewer)) == found[:fewer]


def test_dpp_goes_on_where_bare_cosines_have_no_more_dimensions() -> None:
    vectors = unit_vectors(np.random.default_rng(0).normal(size=(30, 3)))
    gains = [gain for _, gain, _ in dpp(vectors, None, 0.0, 10)]
    assert len(gains) == 10
    assert all(gain is not None and gain < 0.0 for gain in gains[1:])
    assert gains == sorted(gains, reverse=True)


def test_dpp_puts_copies_last_and_a_smaller_ranking_is_a_prefix() -> None:
    vectors = at_angles(0, 0, 90, 45, 90)
    assert list(dpp(vectors, None, 0.0, 5))[3:] == [(1, None, 0), (4, None, 2)]
    assert list(dpp(vectors, None, 0.0, 2)) == list(dpp(vectors, None, 0.0, 5))[:2]


def test_dpp_says_what_memory_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.curate.diversity.MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"dpp: 20 of 20 rows would take .* GiB of memory.*give --budget 6 or less"):
        next(dpp(at_angles(*range(20)), None, 0.0, 20))


def deita_oracle(vectors: Vectors, order: Sequence[int], threshold: float) -> list[int]:
    table, kept = cosine_table(vectors), []
    for row in order:
        if not kept or table[row, kept].max() < threshold:
            kept.append(row)
    return kept


@pytest.mark.parametrize("block", [1, 8, 64, 256])
def test_the_batch_of_the_filter_changes_nothing(block: int) -> None:
    """deita's own filter keeps 79, 79, 74 and 66 of such rows in batches of 1, 8, 64 and 256."""
    random = np.random.default_rng(0)
    vectors, order = unit_vectors(random.normal(size=(2000, 4))), random.permutation(2000).tolist()
    found = [row for row, _, _ in deita_filter(vectors, order, 0.95, block=block)]
    assert found == deita_oracle(vectors, order, 0.95)


@pytest.mark.parametrize("seed", range(20))
def test_deita_equals_its_oracle(seed: int) -> None:
    """A thousand cases; the filter looks at rows in the order of their quality, so that their order in the file changes nothing."""
    random = np.random.default_rng(seed)
    for _ in range(50):
        vectors = scattered(random, int(random.integers(1, 40)))
        order, threshold = random.permutation(len(vectors)).tolist(), float(random.choice([0.3, 0.9, 0.95, 1.0]))
        found = list(deita_filter(vectors, order, threshold, block=int(random.choice([1, 3, 100]))))
        assert [row for row, _, _ in found] == deita_oracle(vectors, order, threshold)
        table = cosine_table(vectors)
        for place, (row, gain, witness) in enumerate(found[1:], start=1):
            earlier = [pick for pick, _, _ in found[:place]]
            assert gain == pytest.approx(1 - table[row, earlier].max(), abs=1e-9)
            assert table[row, witness] == table[row, earlier].max()
        turn = random.permutation(len(vectors))
        place_of = np.argsort(turn)
        turned = deita_filter(vectors[turn], place_of[order].tolist(), threshold, block=int(random.choice([1, 3, 100])))
        assert [int(turn[row]) for row, _, _ in turned] == [row for row, _, _ in found]


def test_of_a_pair_one_stays_where_distilabel_keeps_none() -> None:
    assert [row for row, _, _ in deita_filter(at_angles(0, np.degrees(np.arccos(0.94))), [1, 0], 0.9)] == [1]


def test_of_a_chain_both_ends_stay_where_semhash_semdedup_and_nemo_keep_one() -> None:
    assert [row for row, _, _ in deita_filter(at_angles(0, 20, 40), [0, 1, 2], 0.9)] == [0, 2]


def test_a_copy_of_the_best_row_does_not_remove_it_as_in_distilabel() -> None:
    assert [row for row, _, _ in deita_filter(at_angles(10, 10, 80), [1, 0, 2], 0.9)] == [1, 2]


def test_the_best_row_comes_first_where_distilabel_returns_the_worst() -> None:
    """The three rows of the example in distilabel's DeitaFiltering, scores .25, .36 and .49: with a budget of 1 it returns .25."""
    scores = [0.5 * 0.5, 0.6 * 0.6, 0.7 * 0.7]
    vectors = unit_vectors(
        [
            [-8.12729941, -5.24642847, -6.34003029],
            [2.99329242, 0.7800932, 0.7799726],
            [10.29041806, 14.33088073, 13.00557506],
        ]
    )
    order = sorted(range(3), key=lambda row: -scores[row])
    assert scores[next(deita_filter(vectors, order, 0.9))[0]] == pytest.approx(0.49)
