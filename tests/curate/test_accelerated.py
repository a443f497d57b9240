"""The device's selection against the CPU's: the same picks, gains and witnesses; what is drawn at random against exact greedy."""

from itertools import islice

import numpy as np
import pytest
import torch
from sftkit.curate import accelerated
from sftkit.curate.cover import cover
from sftkit.curate.coverage import k_center
from sftkit.curate.facility_location import facility_location
from sftkit.curate.similarity import Candidates, Vectors, exact_cosines, nearest, unit_vectors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clustered(rows: int, seed: int, dimensions: int = 16) -> Vectors:
    """Return rows around a few centres, some of them twice, one of them zeros."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(12, dimensions))
    vectors = centres[draw.integers(12, size=rows)] + 0.5 * draw.normal(size=(rows, dimensions))
    vectors[draw.integers(rows, size=rows // 10)] = vectors[0]
    vectors[rows // 2] = 0
    return unit_vectors(vectors)


@pytest.mark.parametrize("seed", range(5))
def test_k_center_takes_the_same_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(400, seed)
    assert list(accelerated.k_center(vectors, 3, DEVICE)) == list(k_center(vectors, 3))


@pytest.mark.parametrize("seed", range(5))
def test_the_nearest_are_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerated, "HEIGHT", 64)
    monkeypatch.setattr(accelerated, "WIDTH", 50)
    vectors = clustered(500, seed)
    kept = np.random.default_rng(seed).permutation(500)[:170]
    mine, theirs = accelerated.nearest(vectors, range(500), kept, DEVICE), nearest(vectors, range(500), kept)
    assert (mine[0] == theirs[0]).all()
    assert (mine[1] == theirs[1]).all()
    brute = [exact_cosines(vectors, np.full(len(kept), row), kept) for row in range(500)]
    assert (mine[1] == [each.max() for each in brute]).all()
    assert (mine[0] == [kept[np.argmax(each)] for each in brute]).all()


def test_only_what_reaches_the_floor_is_proposed() -> None:
    vectors = clustered(300, 0)
    table = accelerated.Table(300, 16, DEVICE)
    table.append(vectors[:100])
    table.append(vectors[100:])
    found = Candidates(300, floor=0.9)
    table.propose(vectors, found)
    verified = found.verified(vectors, np.arange(300), np.arange(300))
    for row, (places, cosines) in enumerate(verified):
        brute = exact_cosines(vectors, np.full(300, row), np.arange(300))
        if brute.max() >= 0.9:
            assert cosines.max() == brute.max()
            assert places[np.argmax(cosines)] == np.argmax(brute)
        else:
            assert not (cosines >= 0.9).any()


@pytest.mark.parametrize("seed", range(8))
def test_a_cover_keeps_the_same_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerated, "WIDTH", 50)
    random = np.random.default_rng(seed)
    vectors, order = clustered(600, seed), random.permutation(600).tolist()
    settings = {"threshold": float(random.choice([0.7, 0.9, 1.0])), "order": order, "given": int(random.choice([0, 40]))}
    on_cpu = cover(vectors, **settings)
    monkeypatch.setattr("sftkit.curate.cover._Bounding", lambda *arguments: accelerated.Stayed(*arguments, DEVICE))
    for block in (64, 1024):
        mine = cover(vectors, block=block, **settings)
        assert mine[0].tolist() == on_cpu[0].tolist()
        assert mine[1].tolist() == on_cpu[1].tolist()
    assert 0 < (on_cpu[0] >= 0).sum() < 600


def value(vectors: Vectors, picks: list[int]) -> float:
    return float(np.maximum(vectors @ vectors[picks].T, 0).max(axis=1).sum())


def test_with_all_rows_asked_stochastic_is_greedy() -> None:
    vectors = unit_vectors(np.random.default_rng(1).normal(size=(200, 24)))
    exact = list(islice(facility_location(vectors), 30))
    drawn = list(accelerated.stochastic_facility_location(vectors, 30, epsilon=1e-13, device=DEVICE))  # 200/30·ln 1e13 = 200 rows
    assert [pick[0] for pick in drawn] == [pick[0] for pick in exact]
    assert [pick[2] for pick in drawn] == [pick[2] for pick in exact]
    assert [pick[1] for pick in drawn] == pytest.approx([pick[1] for pick in exact], abs=1e-3 if DEVICE == "cuda" else 1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_random_few_are_nearly_as_good(weight: float) -> None:
    vectors = clustered(1000, 7)
    quality = np.random.default_rng(7).random(1000)
    exact = [pick[0] for pick in islice(facility_location(vectors, quality, weight), 50)]
    drawn = [pick[0] for pick in accelerated.stochastic_facility_location(vectors, 50, quality, weight, device=DEVICE, seed=2)]
    assert len(set(drawn)) == 50

    def total(picks: list[int]) -> float:
        return (1 - weight) * value(vectors, picks) + weight * float(quality[picks].sum())

    worst = [total(list(np.random.default_rng(seed).permutation(1000)[:50])) for seed in range(20)]
    assert total(drawn) > 0.97 * total(exact)
    assert total(drawn) > max(worst)
    again = [pick[0] for pick in accelerated.stochastic_facility_location(vectors, 50, quality, weight, device=DEVICE, seed=2)]
    assert again == drawn


def test_a_budget_of_everything_takes_everything_once() -> None:
    vectors = clustered(60, 3)
    picks = [pick[0] for pick in accelerated.stochastic_facility_location(vectors, 60, device=DEVICE)]
    assert sorted(picks) == list(range(60))


def test_the_precision_of_products_is_given_back() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        list(accelerated.stochastic_facility_location(clustered(50, 1), 5, device=DEVICE))
        list(islice(accelerated.k_center(clustered(50, 1), 0, DEVICE), 5))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
