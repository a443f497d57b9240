"""Models that are looked up together run in one engine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sftkit.core.engines import loading
from sftkit.core.engines.base import EngineConfig
from sftkit.core.named_models import find_models


def test_models_that_are_compared_have_one_engine(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packed = shutil.copytree(tiny_model, tmp_path / "packed")
    settings = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    models = {"plain": str(tiny_model), "packed": str(packed)}
    assert [each.engine.engine for each in find_models(models, EngineConfig(), answers=(3, 100))] == ["vllm", "vllm"]
    assert [each.engine.engine for each in find_models({"plain": str(tiny_model)}, EngineConfig(), answers=(3, 100))] == ["transformers"]
    assert [each.engine.engine for each in find_models(models, EngineConfig())] == ["auto", "auto"]
