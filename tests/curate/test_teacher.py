"""A teacher before and after its engine is opened: what runs it, on which cards, and what its answers tell."""

from collections.abc import Callable

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


@pytest.mark.usefixtures("four_cards")
def test_what_answers_tell_does_not_change_when_a_folder_grows(settings: Callable[..., DistillConfig]) -> None:
    few, many = (Teacher.find(settings(engine={"engine": "auto", "device": None}), prompts=prompts) for prompts in (10, 10_000))
    assert (few._kind, many._kind) == ("transformers", "vllm")
    assert few.tells_logprobs is many.tells_logprobs is False
    assert Teacher.find(settings(logprobs=True, engine={"engine": "auto", "device": None}), prompts=10).tells_logprobs
    assert Teacher.find(settings(engine={"engine": "transformers"}), prompts=10_000).tells_logprobs
