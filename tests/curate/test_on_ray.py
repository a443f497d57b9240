"""Scores and vectors that the actors of a real Ray cluster compute: those of one process, although an actor is killed meanwhile."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from sftkit.core.engines.ray_replicas import RayReplicas
from sftkit.core.run import Run
from sftkit.core.values import ValueStore
from sftkit.curate.config import ScoreConfig
from sftkit.curate.decide_config import EmbedConfig
from sftkit.curate.embed import EmbeddingStore, embed_rows
from sftkit.curate.score import score

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start a cluster of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def all_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask nothing before every actor is ready: the one that is killed is to have work, however slow the machine is."""
    opened = RayReplicas.__init__

    def open_all(self: RayReplicas, *arguments: Any, **keywords: Any) -> None:
        opened(self, *arguments, **keywords)
        self.wait_for_all()

    monkeypatch.setattr(RayReplicas, "__init__", open_all)


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list[int]]:
    """Let the third call of a method kill an actor; return the list that holds its process id then."""

    def arm(owner: type, name: str) -> list[int]:
        killed: list[int] = []
        calls = 0
        method = getattr(owner, name)

        def wrapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                killed.append(next(each.pid for each in psutil.Process().children(recursive=True) if "_Host" in " ".join(each.cmdline())))
                os.kill(killed[0], signal.SIGKILL)
            return method(*arguments)

        monkeypatch.setattr(owner, name, wrapped)
        return killed

    return arm


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?", "response": f"The answer is {number}. " * (1 + number % 7)} for number in range(count)]


def test_scores_are_those_of_one_process(
    toy_run: Callable[..., Run], tiny_model: Path, killing: Callable[[type, str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"model": str(tiny_model), "device": "cpu", "dtype": "float32", "batch_tokens": 512}
    expected = score(toy_run(rows(400), "alone"), ScoreConfig(scorers={"grape": options}))["grape"]
    killed = killing(ValueStore, "put")
    on_ray = {**options, "executor": "ray", "replicas": "2"}
    with caplog.at_level(logging.WARNING, logger="sftkit"):
        found = score(toy_run(rows(400), "on-ray"), ScoreConfig(scorers={"grape": on_ray}))["grape"]
    assert len(killed) == 1
    assert "it is started again" in caplog.text
    assert found["value"].null_count() == 0
    np.testing.assert_allclose(found.sort("example_id")["value"], expected.sort("example_id")["value"], atol=1e-5)


def test_vectors_are_those_of_one_process(
    toy_run: Callable[..., Run], minilm: Path, killing: Callable[[type, str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    config = EmbedConfig(model=str(minilm), device="cpu", dtype="float32", batch_tokens=256)
    alone, on_ray = toy_run(rows(120), "alone"), toy_run(rows(120), "on-ray")
    table = pl.read_parquet(alone.room("curate") / "rows.parquet")
    expected = embed_rows(alone, table, "pair", config)
    killed = killing(EmbeddingStore, "add")
    with caplog.at_level(logging.WARNING, logger="sftkit"):
        found = embed_rows(on_ray, table, "pair", replace(config, executor="ray", replicas=2))
    assert len(killed) == 1
    assert "it is started again" in caplog.text
    np.testing.assert_allclose(found, expected, atol=1e-6)
    names = [set(pl.read_parquet(run.room("curate") / "embeddings.parquet")["name"]) for run in (alone, on_ray)]
    assert names[0] == names[1]
