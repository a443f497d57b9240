"""A teacher before and after its engine is opened: what runs it, on which cards, and what its answers tell."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sftkit.core.engines import loading
from sftkit.curate import distill as distill_module
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import Teacher


@pytest.fixture
def four_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have four GPUs and vLLM, and open no engine."""
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(distill_module, "tuned", lambda engine, identity: engine)


def opened(monkeypatch: pytest.MonkeyPatch, config: DistillConfig, prompts: int) -> Teacher:
    teacher = Teacher.find(config, prompts=prompts)
    engine = SimpleNamespace(identity=teacher.identity, close=lambda: None)
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **named: engine)
    assert teacher.engine is engine
    return teacher


@pytest.mark.usefixtures("four_cards")
@pytest.mark.parametrize(
    ("engine", "prompts", "cards"),
    [
        ({}, 10, ["4"]),  # transformers
        ({}, 10_000, ["4"]),  # vLLM, one process
        ({"device": "cuda:2"}, 10, ["6"]),
        ({"replicas": 2}, 10, ["4", "5"]),
        ({"replicas": "auto"}, 10, ["4", "5", "6", "7"]),
        ({"replicas": 8}, 10, ["4", "5", "6", "7"]),
        ({"tensor_parallel_size": 2}, 10, ["4", "5"]),
        ({"device": "cpu", "engine": "transformers"}, 10, []),
    ],
)
def test_the_cards_that_are_looked_at_are_those_that_run_it(
    monkeypatch: pytest.MonkeyPatch,
    settings: Callable[..., DistillConfig],
    engine: dict[str, Any],
    prompts: int,
    cards: list[str],
) -> None:
    """Those that are idle by the user's choice would make a busy one look idle."""
    teacher = opened(monkeypatch, settings(engine={"engine": "auto", "device": None, **engine}), prompts)
    assert teacher.gpus() == cards


@pytest.mark.usefixtures("four_cards")
def test_what_answers_tell_does_not_change_when_a_folder_grows(settings: Callable[..., DistillConfig]) -> None:
    few, many = (Teacher.find(settings(engine={"engine": "auto", "device": None}), prompts=prompts) for prompts in (10, 10_000))
    assert (few._settled.engine, many._settled.engine) == ("transformers", "vllm")
    assert few.tells_logprobs is many.tells_logprobs is False
    again = {"retry_truncated": True, "engine": {"engine": "auto", "device": None}}
    counted = [Teacher.find(settings(**again, max_new_tokens=tokens), prompts=10)._settled.engine for tokens in (170, 171)]
    assert counted == ["transformers", "vllm"]  # a cut answer is made again, of twice as many tokens
    assert Teacher.find(settings(logprobs=True, engine={"engine": "auto", "device": None}), prompts=10).tells_logprobs
    assert Teacher.find(settings(engine={"engine": "transformers"}), prompts=10_000).tells_logprobs
