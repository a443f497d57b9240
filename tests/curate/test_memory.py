"""What selection by vectors takes is planned: facility location remembers less, other methods refuse, and the picks stay the same."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.decide_config import DedupConfig, EmbedConfig, SelectConfig
from sftkit.curate.dedup import dedup
from sftkit.curate.facility_location import NEIGHBORS
from sftkit.curate.memory import FEWEST, GB, cover_bytes, fit_neighbors, hold_to, least_dimensions, select_bytes
from sftkit.curate.selection import select


def config(method: str, memory_gb: float | None) -> SelectConfig:
    return SelectConfig(method=method, budget=10, memory_gb=memory_gb, by=("num_chars",) if method == "qdit" else ())


@pytest.mark.parametrize("method", ["k-center", "facility-location", "qdit", "deita", "cluster-balanced"])
def test_memory_is_linear_in_the_rows(method: str) -> None:
    for fast in (False, True):
        small, large = (select_bytes(method, rows, 384, 100, fast=fast) for rows in (50_000, 200_000))
        assert small < large < 4 * small


def test_facility_location_remembers_what_fits() -> None:
    assert fit_neighbors(config("facility-location", None), 100_000, 384, 10) == NEIGHBORS
    assert fit_neighbors(config("facility-location", 100), 100_000, 384, 10) == NEIGHBORS
    fewer = fit_neighbors(config("qdit", 1.0), 100_000, 384, 10)
    assert FEWEST < fewer < NEIGHBORS
    assert select_bytes("qdit", 100_000, 384, 10, fewer) <= 1.0 * GB < select_bytes("qdit", 100_000, 384, 10, fewer + 1)


def test_too_little_is_refused_before_it_begins() -> None:
    with pytest.raises(UserError, match=r"select facility-location: takes about 0\.\d GB for 100,000 rows, memory_gb allows 0\.3"):
        fit_neighbors(config("facility-location", 0.3), 100_000, 384, 10)
    fast = SelectConfig(method="facility-location", budget=10, fast=True, memory_gb=0.6)  # more than exact takes at least
    with pytest.raises(UserError, match=r"memory_gb allows 0\.6: give more, fewer rows, or leave fast out, or another method"):
        fit_neighbors(fast, 100_000, 384, 10)
    with pytest.raises(UserError, match=r"select dpp: takes about \d\.\d GB for 100,000 rows, memory_gb allows 1: give more, fewer rows"):
        fit_neighbors(SelectConfig(method="dpp", budget=9000, memory_gb=1), 100_000, 384, 9000)
    with pytest.raises(UserError, match="dedup by meaning: takes about"):
        hold_to(0.1 * GB, cover_bytes(100_000, 384), 100_000, "dedup by meaning", "--no-semantic")


def test_what_takes_much_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sftkit"):
        fit_neighbors(config("facility-location", None), 1000, 384, 10)
        assert caplog.text == ""
        fit_neighbors(config("facility-location", None), 100_000, 384, 10)
    assert "select facility-location: about 2.0 GB of memory at its peak" in caplog.text


def test_the_limit_decides_memory_and_not_the_rows(toy_run: Callable[..., Run], minilm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run([{"prompt": f"Tell me about the number {n * n}.", "response": f"It is {n} times {n}."} for n in range(40)])
    embed = EmbedConfig()
    free = select(run, SelectConfig(method="facility-location", budget=8, embed=embed))
    held = select(run, SelectConfig(method="facility-location", budget=8, embed=embed, memory_gb=0.2))
    assert held.kept["example_id"].to_list() == free.kept["example_id"].to_list()
    few = select(run, SelectConfig(method="facility-location", budget=8, embed=embed, epsilon=0.05))
    assert len(few.kept) == 8
    fast = select(run, SelectConfig(method="facility-location", budget=8, embed=embed, fast=True))
    assert fast.kept["example_id"].to_list() == free.kept["example_id"].to_list()
    assert not any("fewer than 1% of the rows" in each for each in fast.notes)
    monkeypatch.setattr("sftkit.curate.selection.FEW", 0.5)
    fast = select(run, SelectConfig(method="facility-location", budget=8, embed=embed, fast=True))
    assert any("fewer than 50% of the rows are taken, where fast" in each for each in fast.notes)
    with pytest.raises(UserError, match=r"select facility-location: takes about 0\.1 GB for 40 rows, memory_gb allows 0\.001"):
        select(run, SelectConfig(method="facility-location", budget=8, embed=embed, fast=True, memory_gb=0.001))
    with pytest.raises(UserError, match=r"memory_gb allows 0\.001"):
        select(run, SelectConfig(method="k-center", budget=8, embed=embed, memory_gb=0.001))
    with pytest.raises(
        UserError,
        match=r"dedup by meaning: takes about 0\.1 GB for 8 rows, memory_gb allows 0\.001: give more, fewer rows, or --no-semantic",
    ):
        dedup(run, DedupConfig(embed=embed, memory_gb=0.001))


def test_what_cannot_be_done_is_refused_before_anything_is_embedded(
    toy_run: Callable[..., Run], minilm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr("sftkit.curate.selection.embed_rows", never)
    monkeypatch.setattr("sftkit.curate.dedup.embed_rows", never)
    assert least_dimensions(EmbedConfig()) == 384
    run = toy_run([{"prompt": f"{n}", "response": "r"} for n in range(9)])
    with pytest.raises(UserError, match=r"select mmr: takes about 0\.1 GB for 9 rows, memory_gb allows 0\.001"):
        select(run, SelectConfig(method="mmr", by=("num_chars",), budget=2, memory_gb=0.001))
    with pytest.raises(UserError, match=r"dedup by meaning: takes about 0\.1 GB for 9 rows"):
        dedup(run, DedupConfig(exact=False, memory_gb=0.001))


def test_an_embedder_says_how_long_its_vectors_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert least_dimensions(EmbedConfig(model=str(tmp_path))) == 64
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "config.json").write_text('{"in_features": 64, "out_features": 16}')
    assert least_dimensions(EmbedConfig(model=str(tmp_path))) == 16
    assert least_dimensions(EmbedConfig(model="someone/on-the-hub")) == 1


@pytest.mark.parametrize("memory_gb", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_number_above_0(memory_gb: float) -> None:
    for make in (lambda: SelectConfig(budget=1, memory_gb=memory_gb), lambda: DedupConfig(memory_gb=memory_gb)):
        with pytest.raises(UserError, match="memory_gb: expected more than 0, found"):
            make()
