"""The residual stream in bfloat16 under float32 weights: it is so in every layer, and gradients lose next to nothing by it."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sftkit.train import stream
from sftkit.train.attention import use_packed_attention
from sftkit.train.data import Row
from sftkit.train.head import loss_sum
from sftkit.train.memory import decoder_layers
from sftkit.train.packing import Packs
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2}, "qwen2": {"num_key_value_heads": 2}, "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 64}, "olmo2": {"num_key_value_heads": 2}, "gpt_neox": {},
}  # fmt: skip


def built(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    use_packed_attention(model)
    return model


def pack() -> dict[str, Any]:
    random = np.random.default_rng(0)
    rows = [Row((str(n), None), random.integers(4, 500, n).tolist(), [at >= n // 3 for at in range(n)]) for n in (90, 33, 128, 7)]
    return Packs(rows, batch_size=4, batch_tokens=4096, seed=0, pad=0)[0]


def learned(model: Any, *, half: torch.dtype | None = torch.bfloat16, wide: bool = False) -> tuple[set[torch.dtype], list[torch.Tensor]]:
    """Return the formats between the layers, and the gradients."""
    found = set()

    def see(_module: Any, _inputs: Any, out: Any) -> None:
        found.add((out[0] if isinstance(out, tuple) else out).dtype)

    handles = [layer.register_forward_hook(see) for layer in decoder_layers(model)]
    computing = torch.autocast("cpu", dtype=half) if half else nullcontext()
    with mock.patch.object(stream, "stream_format", return_value=None) if wide else nullcontext(), computing:
        loss = loss_sum(model, pack())
    for handle in handles:
        handle.remove()
    return found, list(torch.autograd.grad(loss, list(model.parameters())))


def off(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    apart = sum(float((one - other).square().sum()) for one, other in zip(some, others, strict=True))
    return (apart / sum(float(each.square().sum()) for each in others)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_bfloat16_and_gradients_are_nearly_as_exact_as_with_a_float32_one(kind: str) -> None:
    model = built(kind, **SIZES, **KINDS[kind])
    plain, exact = learned(model, half=None)
    wide, before = learned(model, wide=True)
    narrow, gradients = learned(model)
    assert (plain, wide, narrow) == ({torch.float32}, {torch.float32}, {torch.bfloat16})
    assert {each.dtype for each in gradients} == {torch.float32}
    assert 0 < off(gradients, exact) < 1.6 * off(before, exact) < 0.1
    assert not model.get_input_embeddings()._forward_hooks  # other calls of the model stay as they are


def test_what_does_not_bear_it_keeps_its_stream() -> None:
    learned_places = built("gpt2", vocab_size=512, n_embd=64, n_layer=2, n_head=4)
    assert learned(learned_places)[0] == {torch.float32}
    assert learned(built("llama", **SIZES), half=torch.float16)[0] == {torch.float32}
