"""Selection: rankings whose every beginning is a selection, equal to the definition, and what a budget does."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import selection
from sftkit.curate.config import SelectConfig
from sftkit.curate.rows import load_rows, row_ids
from sftkit.curate.selection import k_center, nearest_to_mean, select
from sftkit.curate.similarity import MARGIN, Vectors, unit_vectors


def cosine_table(vectors: Vectors) -> np.ndarray:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    return np.round(wide @ wide.T / np.outer(lengths, lengths), 9)


def oracle(vectors: Vectors, first: int) -> list[tuple[int, float | None, int | None]]:
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


@pytest.mark.parametrize("seed", range(30))
def test_k_center_equals_its_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    size, dimensions = int(random.integers(1, 60)), int(random.integers(2, 20))
    base = random.normal(size=(max(size // 2, 1), dimensions))  # some rows twice or more, so that there are ties
    vectors = unit_vectors(base[random.integers(len(base), size=size)])
    first = int(random.integers(size))
    found, expected = list(k_center(vectors, first)), oracle(vectors, first)
    assert [row for row, _, _ in found] == [row for row, _, _ in expected]
    assert [gain for _, gain, _ in found] == pytest.approx([gain for _, gain, _ in expected], abs=1e-9)
    table = cosine_table(vectors)
    for (row, _, witness), (_, _, other) in zip(found[1:], expected[1:], strict=True):
        assert table[row, witness] == table[row, other]


def test_gains_fall_and_cover_twice_as_well_as_any_choice() -> None:
    vectors = unit_vectors(np.random.default_rng(0).normal(size=(12, 2)))
    table = np.sqrt(np.maximum(2 - 2 * cosine_table(vectors), 0))  # distances
    picks = list(k_center(vectors, 0))
    gains = [gain for _, gain, _ in picks[1:]]
    assert gains == sorted(gains, reverse=True)
    from itertools import combinations

    for size in (2, 3, 4):
        radius = table[:, [row for row, _, _ in picks[:size]]].min(axis=1).max()
        best = min(table[:, list(chosen)].min(axis=1).max() for chosen in combinations(range(12), size))
        assert radius <= 2 * best + 1e-9


def test_orthogonal_rows_come_in_row_order() -> None:
    assert [row for row, _, _ in k_center(unit_vectors(np.eye(40)), 7)] == [7, *range(7), *range(8, 40)]


def test_nearest_to_the_mean_of_equals_is_the_lowest() -> None:
    assert nearest_to_mean(unit_vectors([[1, 0], [1, 1], [0, 1], [1, 1]])) == 1


@pytest.fixture
def placed(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run whose rows lie on a circle, at the angle that is their prompt."""

    def at_angles(run: Run, rows: pl.DataFrame, on: str, config: object) -> Vectors:
        turns = np.radians([float(prompt) for prompt in rows["prompt"]])
        return unit_vectors(np.stack([np.cos(turns), np.sin(turns)], axis=1))

    monkeypatch.setattr(selection, "embed_rows", at_angles)
    return lambda *angles, **more: toy_run([{"id": f"{angle}", "prompt": f"{angle}", "response": "r", **more} for angle in angles])


def test_select_ranks_and_gives_each_rejected_row_its_witness(placed: Callable[..., Run], rejections: Callable) -> None:
    run = placed(0, 10, 50, 90, 170)
    select(run, SelectConfig(budget=3))
    ranking = pl.read_parquet(run.path / "curate" / "selection.parquet")
    assert ranking["example_id"].to_list() == ["50", "170", "0"]
    assert ranking["gain"].to_list() == [None, pytest.approx(1.5), pytest.approx(1 - np.cos(np.radians(50)))]
    assert ranking["witness_id"].to_list() == [None, "50", "50"]
    assert row_ids(load_rows(run)) == ["0", "50", "170"]
    assert rejections(run, "select") == {
        "10": ("not_selected", pytest.approx(np.cos(np.radians(10))), None, "0"),
        "90": ("not_selected", pytest.approx(np.cos(np.radians(40))), None, "50"),
    }


def test_a_smaller_budget_is_a_prefix(placed: Callable[..., Run]) -> None:
    run = placed(*range(0, 300, 7))
    rankings = []
    for budget in (30, 10):
        select(run, SelectConfig(budget=budget))
        rankings.append(pl.read_parquet(run.path / "curate" / "selection.parquet")["example_id"].to_list())
    assert rankings[0][:10] == rankings[1]


def test_the_best_by_a_score_comes_first(placed: Callable[..., Run]) -> None:
    run = placed(0, 100, 20)
    select(run, SelectConfig(budget=1, by=("num_chars",)))
    assert row_ids(load_rows(run)) == ["0"]
    select(run, SelectConfig(budget=2, method="random"))
    assert len(load_rows(run)) == 2


def test_a_budget_above_the_rows_keeps_all_and_says_so(placed: Callable[..., Run]) -> None:
    outcome = select(placed(0, 100), SelectConfig(budget=3))
    assert outcome.notes == ("the budget holds all 2 rows: every one is kept",)
    assert outcome.removed == {}


def test_a_token_budget_is_a_prefix_too(placed: Callable[..., Run]) -> None:
    run = placed(0, 100, 200, 300, num_tokens=10)
    select(run, SelectConfig(budget_tokens=29))
    assert len(load_rows(run)) == 2
    with pytest.raises(UserError, match="the first row of the ranking alone has 10 tokens, more than budget_tokens 9"):
        select(run, SelectConfig(budget_tokens=9))


def test_a_token_budget_needs_counts(placed: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows have no token count.*num_tokens:model=MODEL"):
        select(placed(0, 100), SelectConfig(budget_tokens=9))


def test_random_is_drawn_by_row_and_seed(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [{"prompt": str(each), "response": "r"} for each in range(40)]
    run, turned = toy_run(rows), toy_run(rows[::-1], name="turned")
    for each in (run, turned):
        select(each, SelectConfig(method="random", budget=10, seed=5))
    first = row_ids(load_rows(run))
    assert first == row_ids(load_rows(turned))[::-1]
    assert set(rejections(run, "select").values()) == {("not_selected", None, None, None)}
    select(run, SelectConfig(method="random", budget=10, seed=6))
    assert row_ids(load_rows(run)) != first


def test_a_budget_is_needed() -> None:
    with pytest.raises(UserError, match="give --budget ROWS or --budget-tokens TOKENS"):
        SelectConfig()
    with pytest.raises(UserError, match="budget: expected 1 or more, found 0"):
        SelectConfig(budget=0)
