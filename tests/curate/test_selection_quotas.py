"""Quotas: of any beginning of the ranking every stratum has its share, rounded down or up; clusters; lengths that match."""

from collections import Counter

import numpy as np
import pytest
from sftkit.curate.controls import length_bucket, length_matched
from sftkit.curate.quotas import balanced_order, cluster, num_clusters, quota_order
from sftkit.curate.similarity import unit_vectors


def rows_of(ranking: object) -> list[int]:
    return [row for row, _, _ in ranking]  # type: ignore[attr-defined]


def quota_oracle(strata: list[int], order: list[int]) -> list[int]:
    """The quota method by its definition, with fractions as whole numbers."""
    from fractions import Fraction
    from math import ceil

    names = list(dict.fromkeys(strata[row] for row in order))
    queues = {name: [row for row in order if strata[row] == name] for name in names}
    taken, ranking = dict.fromkeys(names, 0), []
    for count in range(1, len(order) + 1):
        may = [name for name in names if taken[name] + 1 <= ceil(Fraction(len(queues[name]) * count, len(order)))]
        name = max(may, key=lambda name: Fraction(len(queues[name]), taken[name] + 1))
        ranking.append(queues[name][taken[name]])
        taken[name] += 1
    return ranking


@pytest.mark.parametrize("seed", range(20))
def test_quotas_equal_their_oracle_and_every_budget_has_its_shares(seed: int) -> None:
    random = np.random.default_rng(seed)
    for number in range(50):  # a thousand in all
        size = int(random.integers(1, 80 if number % 5 == 0 else 30))
        strata = (random.integers(0, int(random.integers(1, 9)), size=size) ** 2 // 4).tolist()
        order = random.permutation(size).tolist()
        found = rows_of(quota_order(strata, order))
        assert found == quota_oracle(strata, order)
        sizes, taken = Counter(strata), Counter()
        for count, row in enumerate(found, start=1):
            taken[strata[row]] += 1
            for name, of in sizes.items():  # as largest remainders: the share of each stratum, rounded down or up
                assert of * count // size <= taken[name] <= -(-of * count // size)
        for name in sizes:
            assert [row for row in found if strata[row] == name] == [row for row in order if strata[row] == name]


def test_a_larger_budget_takes_nothing_away_where_largest_remainders_do() -> None:
    """Of strata of 6, 6 and 2 rows largest remainders give the smallest 2 of 10 places and 1 of 11 (Alabama's paradox)."""

    def largest_remainders(sizes: list[int], budget: int) -> list[int]:
        shares = [divmod(size * budget, sum(sizes)) for size in sizes]
        seats = [whole for whole, _ in shares]
        for place in sorted(range(len(sizes)), key=lambda place: -shares[place][1])[: budget - sum(seats)]:
            seats[place] += 1
        return seats

    assert largest_remainders([6, 6, 2], 10)[2] == 2
    assert largest_remainders([6, 6, 2], 11)[2] == 1
    strata = ["a"] * 6 + ["b"] * 6 + ["c"] * 2
    found = [strata[row] for row in rows_of(quota_order(strata, range(14)))]
    counts = [found[:budget].count("c") for budget in range(15)]
    assert counts == sorted(counts)


def balanced_oracle(clusters: list[int], order: list[int]) -> list[int]:
    """Turn after turn the next row of every cluster that has one, larger clusters first, of equals the one that comes first."""
    queues: dict[int, list[int]] = {}
    for row in order:
        queues.setdefault(clusters[row], []).append(row)
    turn = sorted(queues.values(), key=len, reverse=True)
    return [queue[place] for place in range(len(order)) for queue in turn if place < len(queue)]


@pytest.mark.parametrize("seed", range(20))
def test_clusters_in_turn_equal_their_oracle_and_neither_names_nor_places_count(seed: int) -> None:
    """A thousand cases."""
    random = np.random.default_rng(seed)
    for _ in range(50):
        size = int(random.integers(1, 40))
        clusters, order = random.integers(0, int(random.integers(1, 12)), size=size).tolist(), random.permutation(size).tolist()
        found = rows_of(balanced_order(clusters, order))
        assert found == balanced_oracle(clusters, order)
        turn = random.permutation(size)
        renamed = [f"cluster {clusters[row]}" for row in turn]
        assert [int(turn[row]) for row in rows_of(balanced_order(renamed, np.argsort(turn)[order].tolist()))] == found


def test_every_cluster_has_one_before_any_has_two() -> None:
    clusters, order = [0, 0, 0, 1, 2, 2], [2, 1, 0, 3, 4, 5]
    assert rows_of(balanced_order(clusters, order)) == [2, 4, 3, 1, 5, 0]


def test_well_parted_rows_are_clustered_as_they_lie() -> None:
    random = np.random.default_rng(0)
    centers = np.eye(4).repeat(25, axis=0)
    vectors = unit_vectors(centers + 0.05 * random.normal(size=(100, 4)))
    labels = cluster(vectors, 4, 0)
    assert len(set(labels.tolist())) == 4
    assert [len(set(labels[start : start + 25].tolist())) for start in (0, 25, 50, 75)] == [1, 1, 1, 1]
    assert (cluster(vectors, 4, 7) == cluster(vectors, 4, 7)).all()


def test_each_row_is_in_the_cluster_whose_centre_is_nearest() -> None:
    vectors = unit_vectors(np.random.default_rng(1).normal(size=(300, 6)))
    labels = cluster(vectors, 8, 0)
    assert set(labels.tolist()) <= set(range(8))
    within = np.mean(
        [
            (vectors[labels == label] @ unit_vectors(vectors[labels == label].mean(axis=0, keepdims=True)).T).mean()
            for label in set(labels.tolist())
        ]
    )
    turned = np.random.default_rng(2).permutation(labels)
    among = np.mean(
        [
            (vectors[turned == label] @ unit_vectors(vectors[turned == label].mean(axis=0, keepdims=True)).T).mean()
            for label in set(turned.tolist())
        ]
    )
    assert within > 2 * among


def test_there_are_no_more_clusters_than_rows() -> None:
    assert [num_clusters(9, None), num_clusters(1, None), num_clusters(3, 10), num_clusters(100, 7)] == [3, 1, 3, 7]
    assert cluster(unit_vectors([[1.0, 0.0], [1.0, 0.0]]), 2, 0).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_length_matched_control_has_the_same_histogram(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 2000, size=100).tolist()
    taken, order = random.choice(100, 30, replace=False).tolist(), random.permutation(100).tolist()
    matched = length_matched(order, lengths, taken)
    assert len(set(matched)) == 30
    assert Counter(length_bucket(lengths[row], 4) for row in matched) == Counter(length_bucket(lengths[row], 4) for row in taken)
    assert matched == [row for row in order if row in set(matched)]
    assert matched == length_matched(order, lengths, taken[::-1])


def test_a_length_below_zero_is_in_the_first_bucket() -> None:
    assert length_bucket(-5.0) == length_bucket(0.0) == 0
    assert length_matched([2, 0, 1], [-5.0, 0.0, 90.0], [1]) == [0]
