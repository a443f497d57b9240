"""Budgets of tokens, cost and time: none is exceeded, and what they leave out is no failure."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from sftkit.core.engines.base import Completion, Request
from sftkit.core.errors import UserError
from sftkit.curate import distill as distill_module
from sftkit.curate.distill import distill
from sftkit.curate.estimate import estimate

from .teachers import Between, Server, ledger, prompts, stored


def test_a_budget_is_never_exceeded_and_its_leftovers_are_no_failures(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 20), tmp_path / "run"
    result = distill(path, run, settings(k=2, budget_tokens=200))
    assert 200 - 12 < result.tokens <= 200
    assert result.samples + result.over_budget == 40
    assert result.over_budget > 0
    left = ledger(run, "distill").filter(pl.col("action") == "failed")
    assert left["rule"].unique().to_list() == ["budget"]
    again = distill(path, run, settings(k=2, budget_tokens=200))  # the budget is of the folder, not of each call
    assert (again.new_samples, again.samples) == (0, result.samples)
    assert len(between.asked) == result.samples
    rest = distill(path, run, settings(k=2))
    assert (rest.samples, rest.new_samples, rest.over_budget) == (40, 40 - result.samples, 0)


def test_a_budget_of_cost_is_never_exceeded(tmp_path: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 30), tmp_path / "run"
    priced = {"price_input": 100.0, "price_output": 1000.0}
    dry = estimate(path, run, settings(k=4, max_new_tokens=40, **priced))
    assert dry.cost == pytest.approx((dry.prompt_tokens * 100 + dry.new_tokens * 1000) / 1e6)
    assert f"cost: about {dry.cost:,.4f}" in dry.summary()
    probe = stored(run)
    probed = (probe["prompt_tokens"].sum() * 100 + probe["num_tokens"].sum() * 1000) / 1e6
    first = probed + dry.cost * 0.4
    result = distill(path, run, settings(k=4, max_new_tokens=40, budget_cost=first, **priced))
    samples = stored(run)
    assert result.cost == pytest.approx((samples["prompt_tokens"].sum() * 100 + samples["num_tokens"].sum() * 1000) / 1e6)
    assert first * 0.6 < result.cost <= first
    assert result.over_budget > 0
    assert distill(path, run, settings(k=4, max_new_tokens=40, budget_cost=first, **priced)).new_samples == 0  # it is the folder's
    before = result.cost
    whole = distill(path, run, settings(k=4, max_new_tokens=40, **priced))
    assert whole.over_budget == 0
    assert whole.cost > before
    assert whole.cost - probed == pytest.approx(dry.cost, rel=0.15)
    timed = distill(path, tmp_path / "timed", settings(k=2, price_hour=3600.0, budget_cost=1e-9))
    assert timed.over_budget > 0
    for changes, message in [
        ({"budget_cost": 1.0}, "budget_cost: expected more than 0, and a price"),
        ({"price_hour": -1}, "price_hour: expected 0"),
    ]:
        with pytest.raises(UserError, match=message):
            settings(**changes)


@pytest.mark.parametrize(("prices", "least"), [({"price_output": 1000.0}, "0.012"), ({"price_input": 1e6}, "2.")])
def test_a_budget_below_the_price_of_one_answer_is_refused_before_anything_is_opened(
    prices: dict[str, float], least: str, tmp_path: Path, settings: Any, between: Between
) -> None:
    path = prompts(tmp_path / "p.jsonl", 3)
    for budget in (0.0119, 1e-9):
        with pytest.raises(UserError, match=rf"budget_cost: expected {least}.* or more \(one answer can cost that\), found {budget:g}"):
            distill(path, tmp_path / "run", settings(budget_cost=budget, **prices))
    assert between.opened == 0
    assert distill(path, tmp_path / "run", settings(budget_cost=100.0, **prices)).over_budget == 0


def test_a_budget_of_time_stops_asking_and_is_no_failure(tmp_path: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 20), tmp_path / "run"
    result = distill(path, run, settings(k=2, budget_hours=1e-9))
    assert (result.failed, result.over_budget) == ({}, 40 - result.samples)
    assert result.over_budget > 0
    assert "a budget is used up" in result.summary()
    assert "GPU" not in result.summary()
    assert "(5 tokens/s, GPU busy 78% of the time)" in replace(result, new_samples=1, new_tokens=5, seconds=1.0, gpu_busy=0.777).summary()
    assert distill(path, run, settings(k=2)).samples == 40


@pytest.mark.parametrize(
    ("budget", "given"),
    [({"budget_hours": 0.01}, 4), ({"budget_hours": 1.0}, 9), ({"budget_cost": 0.03, "price_hour": 3.0}, 4)],
)
def test_what_is_under_way_when_the_time_is_over_has_a_while_to_finish(
    budget: dict[str, float], given: int, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes nine at once and answers one in 30 s, until the time is over and a minute, or a twentieth of it, besides."""
    now = 0.0
    monkeypatch.setattr(distill_module, "time", SimpleNamespace(monotonic=lambda: now))

    class Slow(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            nonlocal now
            taken = list(islice(requests, 9))
            for completion in super().generate(taken):
                now += 30.0
                yield completion
            if taken:
                now = 36_000.0

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Slow())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    result = distill(prompts(tmp_path / "p.jsonl", 20), tmp_path / "run", settings(**budget, **asked))
    assert (result.samples, result.over_budget, result.failed) == (given, 20 - given, {})


def test_cut_answers_that_are_not_asked_for_again_are_told_with_the_reason(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 6), tmp_path / "run"
    first = distill(path, run, settings(max_new_tokens=4))
    assert f"left out: {first.cut} cut answers (truncated); retry_truncated asks for them once more" in first.summary()
    assert first.cut > 2
    some = distill(path, run, settings(max_new_tokens=4, retry_truncated=True, budget_tokens=first.tokens + 8))
    assert (some.new_samples, some.again) == (1, {"budget": first.cut - 1})
    assert f"{first.cut - 1} of them were not asked for once more, as a budget is used up" in some.summary()
    between.fails = lambda request: "no such luck"
    none = distill(path, run, settings(max_new_tokens=4, retry_truncated=True))
    assert none.again == {"no such luck": first.cut - 1}
    assert "everything that was asked for is there" not in none.summary()
    assert f"{first.cut - 1} of them failed when asked for once more, as with: no such luck" in none.summary()
    between.fails = lambda request: None
    whole = distill(path, run, settings(max_new_tokens=4, retry_truncated=True))
    assert whole.again == {}
    assert "of them" not in whole.summary().partition("left out")[2]
