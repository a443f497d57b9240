"""Toy runs, written as a run holds rows or samples, without a teacher; a distillation's settings and a watch on its engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.config import load_config
from sftkit.core.example import Decision, content_id
from sftkit.core.run import Run
from sftkit.curate.config import DistillConfig
from sftkit.curate.decided import record
from sftkit.curate.rows import STORED

from .teachers import Between

ToyRun = Callable[..., Run]


@pytest.fixture
def toy_run(tmp_path: Path) -> ToyRun:
    """Make a run of rows `{"prompt": …, "response": …}` and what else rows.parquet holds; `index` makes a row a sample."""

    def make(rows: list[dict[str, Any]], name: str = "run") -> Run:
        run = Run.create(tmp_path / name)
        stored = []
        for row in rows:
            prompt = [{"role": "user", "content": row.get("prompt", "")}]
            answer = [{"role": "assistant", "content": row["response"]}] if row.get("response") is not None else []
            index = row.get("index")
            stored.append(
                {
                    **{key: row.get(key) for key in ("reference", "finish_reason", "num_tokens", "logprob")},
                    "example_id": row.get("id") or content_id(prompt if index is not None else prompt + answer),
                    "sample_index": index,
                    "messages": json.dumps(row.get("messages") or prompt + answer),
                    "source": "toy.jsonl:1",
                    "meta": json.dumps(row.get("meta", {})),
                }
            )
        pl.DataFrame(stored, schema=STORED).write_parquet(run.room("curate") / "rows.parquet")
        names = [(row["example_id"], row["sample_index"]) for row in stored]
        record(run, "import", names, [Decision(*each, "import", "kept") for each in names])
        return run

    return make


@pytest.fixture
def rejections() -> Callable[[Run, str], dict[str, tuple[str, float | None, float | None, str | None]]]:
    """Return what a stage rejected: rule, score, threshold and witness by row id, where the id is ID or ID/INDEX."""

    def read(run: Run, stage: str) -> dict[str, tuple[str, float | None, float | None, str | None]]:
        found = run.ledger.read().filter((pl.col("stage") == stage) & (pl.col("action") != "kept"))
        return {
            row["example_id"] if row["sample_index"] is None else f"{row['example_id']}/{row['sample_index']}": (
                row["rule"],
                row["score"],
                row["threshold"],
                row["witness_id"],
            )
            for row in found.iter_rows(named=True)
        }

    return read


@pytest.fixture
def settings(tiny_model: Path) -> Callable[..., DistillConfig]:
    """Make the settings of a distillation by the tiny model, on the CPU, with answers of up to 12 tokens, and what else is given."""

    def make(**changes: Any) -> DistillConfig:
        engine = {"engine": "transformers", "dtype": "float32", "device": "cpu", **changes.pop("engine", {})}
        return load_config(DistillConfig, {"teacher": str(tiny_model), "max_new_tokens": 12, "engine": engine, **changes})

    return make


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Between:
    return Between(monkeypatch)
