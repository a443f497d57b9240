"""LoRA layers that compute together, held against PEFT's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from sftkit.train.adapters import FusedLinear, fuse_adapters, part_adapters, products, products_backward
from torch._dynamo.testing import CompileCounter
from transformers import Qwen2Config, Qwen2ForCausalLM


def adapted(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a small model with biases on queries, keys and values, and an adapter that does something."""
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    plain = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    model = get_peft_model(Qwen2ForCausalLM(settings).to(dtype), plain)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def losses_and_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.requires_grad)]


@pytest.mark.parametrize("length", [64, 37])  # in pieces, and a number of tokens that has none
def test_the_same_as_peft(length: int) -> None:
    model, ids = adapted(), torch.randint(0, 64, (1, length))
    wanted = losses_and_gradients(model, ids)
    assert fuse_adapters(model) == 3 * 7
    found = losses_and_gradients(model, ids)
    assert len(found) == 1 + 3 * 7 * 2
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    part_adapters(model)
    assert not any(isinstance(each, FusedLinear) for each in model.modules())
    assert any(type(each) is Linear for each in model.modules())
    assert torch.equal(losses_and_gradients(model, ids)[0], wanted[0])


def test_the_same_as_peft_within_rounding_under_autocast() -> None:
    model, ids = adapted(torch.bfloat16), torch.randint(0, 64, (1, 64))
    for each in model.parameters():
        each.data = each.data.float() if each.requires_grad else each.data
    exact = adapted()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    wanted = losses_and_gradients(exact, ids)
    offs = []
    for fused in (False, True):
        assert not fused or fuse_adapters(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = losses_and_gradients(model, ids)
        assert {each.dtype for each in found[1:]} == {torch.float32}
        offs.append(sum(float((one - other).norm() / one.norm()) for one, other in zip(wanted, found, strict=True)) / len(wanted))
    assert offs[1] <= offs[0] * 1.05  # as near to float32 as PEFT's own 16 bits


def test_activations_computed_twice_leave_nothing_behind() -> None:
    model, ids = adapted(), torch.randint(0, 64, (1, 64))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    wanted = losses_and_gradients(model, ids)
    fuse_adapters(model)
    found = losses_and_gradients(model, ids)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert not any(each.pending for each in model.modules() if isinstance(each, FusedLinear))


def test_outside_training_and_without_the_adapter_it_is_peft() -> None:
    model, ids = adapted(), torch.randint(0, 64, (1, 16))
    plain = model.eval()(input_ids=ids).logits
    fuse_adapters(model)
    assert torch.equal(model(input_ids=ids).logits, plain)
    with model.disable_adapter():
        bare = model.train()(input_ids=ids).logits
    assert not torch.allclose(bare, plain, atol=1e-3)


def test_layers_that_read_other_inputs_do_not_get_what_was_made_ahead() -> None:
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    one, other = torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    wanted = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one), attention.k_proj(one)]
    fuse_adapters(model)
    found = [attention.q_proj(one), attention.k_proj(other), attention.v_proj(one), attention.k_proj(one)]
    for each, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, expected)


def test_what_is_not_plain_stays_as_it_is() -> None:
    assert fuse_adapters(adapted(lora_dropout=0.1)) == 0
    assert fuse_adapters(adapted(use_dora=True)) == 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_trained_keep_their_gradients(bias: str) -> None:
    model = adapted(bias=bias)
    assert fuse_adapters(model) == 3 * 4  # the layers without a bias: o, gate, up, down
    assert all(gradient is not None for gradient in losses_and_gradients(model, torch.randint(0, 64, (1, 37))))


def test_compiled_layers_share_their_code() -> None:
    model, ids = adapted(), torch.randint(0, 64, (1, 64))
    wanted = losses_and_gradients(model, ids)
    fuse_adapters(model)
    counter = CompileCounter()
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=False, backend=counter, fullgraph=True)
    found = losses_and_gradients(model, ids)
    assert counter.frame_count == 2  # the first layer, whose input needs no gradient, and all others
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_what_compiled_code_is_told_of_the_products_is_so() -> None:
    """Shapes, formats and strides without data, and that nothing given is written to."""
    torch.manual_seed(0)
    x, down = torch.randn(64, 32), torch.randn(8, 32)
    weights, biases, ups = [torch.randn(48, 32), torch.randn(16, 32)], [None, torch.randn(16)], [torch.randn(48, 4), torch.randn(16, 4)]
    given = x, weights, biases, down, ups, 2.0
    torch.library.opcheck(products, given)
    narrow, *outs = products(*given)
    for of_input in (True, False):
        torch.library.opcheck(products_backward, ([torch.randn_like(each) for each in outs], x, narrow, weights, down, ups, 2.0, of_input))


def test_a_state_space_model_gets_an_adapter_where_peft_allows_it() -> None:
    from peft import get_peft_model
    from sftkit.train.adapters import adapter_config
    from sftkit.train.config import TrainConfig
    from transformers import Mamba2Config, Mamba2ForCausalLM

    shape = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=64, **shape))
    for kind in ("mamba2", "bamba"):  # PEFT refuses out_proj in the first alone; the kernels of both read past its adapter
        model.config.model_type = kind
        adapted = get_peft_model(model, adapter_config(TrainConfig(), model))
        assert {name.rpartition(".")[2] for name, each in adapted.named_modules() if hasattr(each, "lora_A")} == {"in_proj"}
        model = adapted.unload()
