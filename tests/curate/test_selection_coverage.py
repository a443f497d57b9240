"""Coverage: k-center and facility location equal their definitions, whatever is remembered and compared at a time."""

from itertools import combinations, islice

import numpy as np
import pytest
from sftkit.curate.coverage import k_center, nearest_to_mean
from sftkit.curate.facility_location import UNIT, Covering, facility_location
from sftkit.curate.similarity import MARGIN, Vectors, unit_vectors

from .vectors import scattered


def cosine_table(vectors: Vectors) -> np.ndarray:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    lengths[lengths == 0] = 1
    return np.round(wide @ wide.T / np.outer(lengths, lengths), 9)


def k_center_oracle(vectors: Vectors, first: int) -> list[tuple[int, float | None, int | None]]:
    """k-center by the definition; copies of picked rows last, in row order."""
    table, picks = cosine_table(vectors), [(first, None, None)]
    taken = [first]
    while len(taken) < len(vectors):
        rest = [row for row in range(len(vectors)) if row not in taken]
        closest = {row: max(table[row, taken]) for row in rest}
        far = min(rest, key=lambda row: closest[row])
        for row in rest if closest[far] >= 1 - MARGIN else [far]:
            picks.append((row, 1 - closest[row], next(pick for pick in taken if table[row, pick] == closest[row])))
        taken = [row for row, _, _ in picks]
    return picks


@pytest.mark.parametrize("seed", range(20))
def test_k_center_equals_its_oracle_in_any_order_of_rows_and_any_block(seed: int) -> None:
    """A thousand cases in all, a third of them with copies, which come last; of the others the order of rows changes nothing."""
    random = np.random.default_rng(seed)
    for number in range(50):
        size, dimensions = int(random.integers(1, 60 if number % 10 == 0 else 24)), int(random.integers(2, 20))
        base = random.normal(size=(max(size // 2, 1) if number % 3 == 0 else size, dimensions))
        vectors = unit_vectors(base[random.integers(len(base), size=size)] if number % 3 == 0 else base)
        first, front, batch = int(random.integers(size)), int(random.choice([1, 2, 7, 100])), int(random.choice([1, 3, 100]))
        found, expected = list(k_center(vectors, first, front=front, batch=batch)), k_center_oracle(vectors, first)
        assert [row for row, _, _ in found] == [row for row, _, _ in expected]
        assert [gain for _, gain, _ in found] == pytest.approx([gain for _, gain, _ in expected], abs=1e-9)
        table = cosine_table(vectors)
        for (row, _, witness), (_, _, other) in zip(found[1:], expected[1:], strict=True):
            assert table[row, witness] == table[row, other]
        if number % 3:
            turn = random.permutation(size)
            turned = k_center(vectors[turn], int(np.flatnonzero(turn == first)[0]), front=int(random.integers(1, 100)))
            whole = sum(gain is None or gain > MARGIN for _, gain, _ in found)  # the rest are copies of picks, in the order of the rows
            assert [int(turn[row]) for row, _, _ in islice(turned, whole)] == [row for row, _, _ in found[:whole]]


def test_gains_fall_and_cover_twice_as_well_as_any_choice() -> None:
    vectors = unit_vectors(np.random.default_rng(0).normal(size=(12, 2)))
    table = np.sqrt(np.maximum(2 - 2 * cosine_table(vectors), 0))  # distances
    picks = list(k_center(vectors, 0))
    gains = [gain for _, gain, _ in picks[1:]]
    assert gains == sorted(gains, reverse=True)
    for size in (2, 3, 4):
        radius = table[:, [row for row, _, _ in picks[:size]]].min(axis=1).max()
        best = min(table[:, list(chosen)].min(axis=1).max() for chosen in combinations(range(12), size))
        assert radius <= 2 * best + 1e-9


@pytest.mark.parametrize(("front", "batch"), [(1, 128), (20, 1), (60, 128), (599, 7), (600, 1000)])
def test_k_center_of_many_rows_is_the_same_however_many_are_looked_at_first(front: int, batch: int) -> None:
    vectors = unit_vectors(np.random.default_rng(9).normal(size=(600, 12)))
    table, taken = cosine_table(vectors), [5]
    closest = table[5].copy()
    while len(taken) < 600:
        taken.append(int(np.argmin(np.where(np.isin(np.arange(600), taken), np.inf, closest))))
        closest = np.maximum(closest, table[taken[-1]])
    assert [row for row, _, _ in k_center(vectors, 5, front=front, batch=batch)] == taken


def test_orthogonal_rows_come_in_row_order() -> None:
    assert [row for row, _, _ in k_center(unit_vectors(np.eye(40)), 7)] == [7, *range(7), *range(8, 40)]


def test_nearest_to_the_mean_of_equals_is_the_lowest() -> None:
    assert nearest_to_mean(unit_vectors([[1, 0], [1, 1], [0, 1], [1, 1]])) == 1


def location_oracle(
    vectors: Vectors, quality: np.ndarray | None = None, weight: float = 0.0, size: int | None = None
) -> list[tuple[int, float]]:
    """Greedy by the definition: every row's gain is computed anew for every pick."""
    table = np.rint(np.maximum(cosine_table(vectors), 0) * UNIT).astype(np.int64)
    covered, left, picks = np.zeros(len(vectors), dtype=np.int64), list(range(len(vectors))), []
    while left and len(picks) != size:
        added = [int(np.maximum(table[row] - covered, 0).sum()) / UNIT for row in left]
        gains = [gain if gain >= MARGIN else 0.0 for gain in added]
        if quality is not None:
            gains = [(1 - weight) * gain + weight * quality[row] for row, gain in zip(left, gains, strict=True)]
        place = int(np.argmax(gains))
        picks.append((left[place], gains[place]))
        covered = np.maximum(covered, table[left.pop(place)])
    return picks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["facility-location", "qdit"])
def test_facility_location_and_qdit_equal_their_oracle(method: str, seed: int) -> None:
    """A thousand cases of each. Whole numbers decide between equal gains, so that each order of rows has its one right ranking."""
    random = np.random.default_rng([seed, len(method)])
    for number in range(50):
        vectors = scattered(random, int(random.integers(1, 60 if number % 10 == 0 else 16)))
        quality, weight = None, 0.0
        if method == "qdit":
            quality, weight = random.integers(0, 4, size=len(vectors)) / 3.0, float(random.choice([0.1, 0.5, 0.9, 1.0]))
        neighbors, block = int(random.choice([1, 3, 8, 100])), int(random.choice([1, 2, 32]))
        found = list(facility_location(vectors, quality, weight, neighbors=neighbors, block=block))
        expected = location_oracle(vectors, quality, weight)
        assert [row for row, _, _ in found] == [row for row, _ in expected]
        assert [gain for _, gain, _ in found] == pytest.approx([gain for _, gain in expected], abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_rows_decides_only_between_rows_that_add_exactly_the_same(seed: int) -> None:
    """A thousand cases. Two rows that stand for each other and for no third add the same; `select` sorts rows by id before it asks."""
    random = np.random.default_rng(seed)
    for _ in range(50):
        size = int(random.integers(1, 24))
        vectors, turn = unit_vectors(random.normal(size=(size, 6))), random.permutation(size)
        found, turned = facility_location(vectors, neighbors=5), facility_location(vectors[turn], neighbors=9)
        for (row, gain, _), (place, other, _) in zip(found, turned, strict=True):
            assert gain == pytest.approx(other, abs=1e-12)
            if row != turn[place]:
                break


def test_a_pick_of_facility_location_names_the_pick_that_stood_for_it() -> None:
    vectors = scattered(np.random.default_rng(5), 50)
    table, picks = cosine_table(vectors), []
    for row, _, witness in facility_location(vectors, neighbors=4):
        near = max(picks, key=lambda pick: table[row, pick], default=None)  # of equals the earliest
        assert witness == (near if near is not None and table[row, near] > 0 else None)
        picks.append(row)


@pytest.mark.parametrize(("neighbors", "block"), [(1, 1), (16, 32), (31, 5), (400, 1024)])
def test_what_is_remembered_and_compared_at_a_time_changes_no_ranking(neighbors: int, block: int) -> None:
    random = np.random.default_rng(3)
    vectors = unit_vectors(random.normal(size=(400, 24)) + random.normal(size=(20, 24)).repeat(20, axis=0))
    found = [row for row, _, _ in facility_location(vectors, neighbors=neighbors, block=block)]
    assert found == [row for row, _ in location_oracle(vectors)]


def test_of_two_rows_that_add_the_same_the_lower_comes_first_however_rows_are_turned() -> None:
    vectors = unit_vectors([[1, 0, 0], [0, 3, 4], [0, 4, 3]])  # the last two are alike only to each other: they add exactly the same
    assert [row for row, _, _ in facility_location(vectors)] == [1, 0, 2]
    assert [row for row, _, _ in facility_location(vectors[[0, 2, 1]])] == [1, 0, 2]


def test_many_rows_alike_are_not_all_remembered() -> None:
    random = np.random.default_rng(0)
    vectors = unit_vectors(np.concatenate([np.ones((450, 8)) + 1e-4 * random.normal(size=(450, 8)), random.normal(size=(150, 8))]))
    state = Covering(vectors, neighbors=10)
    remembered = int(np.diff(state._column_starts).sum())
    assert remembered <= 8 * 10 * len(vectors)
    found = facility_location(vectors, neighbors=10)
    assert [next(found)[0] for _ in range(20)] == [row for row, _ in location_oracle(vectors, size=20)]
