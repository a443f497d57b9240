"""The law of conservation under poison: whatever stands in a row, each step accounts for it once, and the checker agrees."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from sftkit.core.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "decide.py"


@pytest.fixture(scope="module")
def decide() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decide", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decide"] = module
    spec.loader.exec_module(module)
    return module


def test_poisoned_rows_go_through_every_step_and_none_is_lost(decide: ModuleType, tmp_path: Path) -> None:
    checks = decide.fuzz(1500, tmp_path / "run")
    assert [fault for check in checks for fault in check.faults] == []
    assert {check.stage for check in checks} >= {
        "import",
        "best",
        "filter",
        "decontaminate",
        "dedup_exact",
        "dedup_minhash",
        "heldout",
        "select",
    }
    ledger = Run.open(tmp_path / "run").ledger.read()
    first = ledger.filter(pl.col("stage") == "import")
    assert len(first) == 1500
    assert {"truncated", "no_response", "not_best", "empty", "refusal", "exact_duplicate"} <= set(ledger["rule"])


def test_one_row_in_twenty_is_poisoned_and_ids_are_unique(decide: ModuleType) -> None:
    rows = decide.poisoned(3000)
    assert len(rows.select("example_id", "sample_index").unique()) == 3000
    odd = rows.filter(~pl.col("messages").str.contains("Question") | pl.col("logprob").is_nan() | (pl.col("finish_reason") != "stop"))
    assert 30 < len(odd) < 300
