"""A distillation that failed at its start: it says what to change, and its folder takes the changed settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.config import load_config
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(3)))
    return path


def config(teacher: Path, **changes: Any) -> DistillConfig:
    engine = {"engine": "transformers", "device": "cpu", "dtype": "float32"}
    return load_config(DistillConfig, {"teacher": str(teacher), "max_new_tokens": 4, "engine": engine, **changes})


def test_answers_that_fit_no_context_are_the_length_to_change(path: Path, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(
        UserError, match=r"3 prompt_too_long; the shortest of \d+ tokens and 512 new ones \(max_new_tokens\) do not fit .* 512"
    ):
        distill(path, tmp_path / "run", config(tiny_model, max_new_tokens=512))
    assert distill(path, tmp_path / "run", config(tiny_model)).samples == 3


def test_a_folder_that_holds_no_sample_takes_other_settings_and_prompts(path: Path, tmp_path: Path, tiny_model: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    schema = '{"type": "object"}'
    with pytest.raises(UserError, match="the transformers engine cannot hold an answer to a schema"):
        distill(path, run, config(tiny_model, json_schema=schema))
    other.write_text(json.dumps({"prompt": "Who are you?"}) + "\n")
    assert distill(other, run, config(tiny_model, seed=3)).samples == 1
    assert Run.open(run).config()["distill"]["json_schema"] is None
    with pytest.raises(UserError, match=r"this folder holds another run \(distill.seed was 3, now 4"):
        distill(other, run, config(tiny_model, seed=4))
    with pytest.raises(UserError, match="this folder holds other prompts"):
        distill(path, run, config(tiny_model, seed=3))
