"""Models that vLLM's CPU build can run, and one engine of each kind for all tests of a process."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sftkit.core.engines.base import Engine, EngineConfig
from sftkit.core.engines.registry import open_engine

MAX_NUM_SEQS = 4


@pytest.fixture(scope="session")
def tiny_for_vllm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model with heads of 32, the smallest that vLLM's attention on a CPU has a kernel for."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-for-vllm"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_engine(tiny_for_vllm: Path) -> Iterator[Engine]:
    config = EngineConfig(engine="vllm", dtype="float32", max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=640, enforce_eager=True)
    engine = open_engine(str(tiny_for_vllm), config)
    yield engine
    engine.close()
    assert_no_processes()


@pytest.fixture(scope="session")
def reference(tiny_for_vllm: Path) -> Engine:
    """The transformers engine with the same model in the same number format."""
    return open_engine(str(tiny_for_vllm), EngineConfig(engine="transformers", dtype="float32", device="cpu"))


def assert_no_processes() -> None:
    """Assert that nothing of vLLM is left among this process's descendants."""
    import psutil

    left = [each.name() for each in psutil.Process().children(recursive=True) if each.name().startswith("VLLM")]
    assert left == []
