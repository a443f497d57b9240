"""Models that are looked up together run in one engine."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sftkit.core import models, named_models
from sftkit.core.engines import loading
from sftkit.core.engines.base import EngineConfig
from sftkit.core.named_models import find_models


def test_models_that_are_compared_have_one_engine(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packed = shutil.copytree(tiny_model, tmp_path / "packed")
    settings = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    pair = {"plain": str(tiny_model), "packed": str(packed)}
    assert [each.engine.engine for each in find_models(pair, EngineConfig(), answers=(3, 100))] == ["vllm", "vllm"]
    assert [each.engine.engine for each in find_models({"plain": str(tiny_model)}, EngineConfig(), answers=(3, 100))] == ["transformers"]
    assert [each.engine.engine for each in find_models(pair, EngineConfig())] == ["auto", "auto"]


def test_a_model_is_looked_up_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Hub each look is a request, and the settings of a GGUF file stand behind its whole vocabulary."""
    looked: list[str] = []
    for module in (models, named_models):
        for name in ("resolve_model", "load_settings"):
            monkeypatch.setattr(module, name, partial(_looking, looked, name, getattr(module, name)))
    find_models({"base": str(tiny_model)}, EngineConfig(), answers=(3, 100))
    assert sorted(looked) == ["load_settings", "resolve_model"]


def _looking(looked: list[str], name: str, real: Callable[[Any], Any], asked: Any) -> Any:
    looked.append(name)
    return real(asked)
