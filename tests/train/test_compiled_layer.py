"""What the memory plan says that a compiled layer keeps is what torch.compile's partitioner keeps of it, as training compiles it."""

from contextlib import nullcontext

import pytest
import torch
from sftkit.train import memory
from sftkit.train.head import loss_sum
from sftkit.train.memory import Load, bare_model, compiled_layer, decoder_layers, saved_by
from sftkit.train.trainer import Trainer, compile_layers
from torch._functorch.config import patch
from transformers import Qwen2Config, Qwen3Config

TOKENS = 512
SHAPE = {
    "vocab_size": 512, "hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
QWEN2 = Qwen2Config(**SHAPE)
QWEN3 = Qwen3Config(**SHAPE, head_dim=32)


@torch.library.custom_op("sftkit_tests::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand for the kernel: an operation that compiled code takes as it is. [1, heads, T, d] → [1, T, heads, d], sums."""
    _, heads, total, size = query.shape
    return query.new_zeros(1, total, heads, size), query.new_zeros(heads, total, dtype=torch.float32)


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, heads, total, size = query.shape
    return query.new_empty(1, total, heads, size), query.new_empty(heads, total, dtype=torch.float32)


@torch.library.custom_op("sftkit_tests::attend_backward", mutates_args=())
def attend_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of query, key and value."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@attend_backward.register_fake
def _(grad, query, key, value, out, sums):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


attend.register_autograd(lambda ctx, grad, *_: attend_backward(grad, *ctx.saved_tensors), setup_context=keep)


def as_a_kernel(_module, query, key, value, *_, **__):
    return attend(query.to(value.dtype), key.to(value.dtype), value)[0], None


@pytest.mark.parametrize(("dtype", "adapter"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("settings", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
def test_the_partitioner_keeps_what_the_plan_says(monkeypatch, settings, dtype, adapter) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(memory, "replayed_attention", as_a_kernel)
    load = Load(tokens=TOKENS, scored=100, accumulates=True, adapter=adapter, compiled=True, dtype=dtype, half=torch.bfloat16)
    model = bare_model(settings, load)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *told, **named: compile(*told, **named, backend="aot_eager_decomp_partition"))
    compile_layers(model)
    autocast = torch.autocast("cpu", dtype=load.half) if adapter or dtype is not load.half else nullcontext()
    with (
        patch(ban_recompute_materialized_backward=Trainer.keeps),
        saved_by(decoder_layers(model)[-1], {each.untyped_storage()._cdata for each in model.parameters()}) as found,
        autocast,
    ):
        assert loss_sum(model, memory._batch(load)).requires_grad
    shared = 2 * 2 * TOKENS * (settings.hidden_size // 4 if settings is QWEN2 else 32)  # cosines and sines, which all layers read
    assert sum(found.values()) - shared == pytest.approx(compiled_layer(model, load), rel=0.03)
