"""Models in one quantised file: read where they lie, unpacked into weights that can be trained and saved."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.gguf import check_gguf, load_unpacked, save_checkpoint
from sftkit.core.models import context_length, load_model, load_settings, model_identity, resolve_model
from sftkit.core.templates import BUILT_IN

WIDTH, INNER, VOCABULARY = 64, 128, 300


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama in 8 bits, with a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *letters, "he", "ll"]
    tokens += [f"<|unused{number}|>" for number in range(VOCABULARY - len(tokens))]
    control = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(control)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template(BUILT_IN["sftkit:chatml"][1])
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        packed = quantize(draw.normal(0, 0.05, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", VOCABULARY, WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", WIDTH, WIDTH)
    add("blk.0.ffn_gate.weight", INNER, WIDTH)
    add("blk.0.ffn_up.weight", INNER, WIDTH)
    add("blk.0.ffn_down.weight", WIDTH, INNER)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def first_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].float()


def test_a_gguf_file_is_a_model_like_any_other(tiny_gguf: Path) -> None:
    ref = resolve_model(tiny_gguf)
    assert model_identity(ref).startswith("sha256:")
    assert context_length(load_settings(ref)) == 256
    chat = load_chat(ref)
    assert chat.template_source == "model"
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == "<|im_end|>"
    assert chat.pad_id not in chat.stop_ids
    ids = chat.prompt([{"role": "user", "content": "hello 你好"}])
    assert chat.tokenizer.decode(ids) == "<|im_start|>user\nhello 你好<|im_end|>\n<|im_start|>assistant\n"
    model = load_model(ref, dtype="float32")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.isfinite(first_logits(model, ids)).all()
    assert load_model(ref).dtype == torch.bfloat16


def test_what_is_unpacked_can_be_trained_and_saved(tiny_gguf: Path, tmp_path: Path) -> None:
    model = load_unpacked(tiny_gguf, torch.float32)
    ids = [1, 10, 20, 30]
    before = first_logits(model, ids)
    model.save_pretrained(tmp_path / "same")
    again = load_model(resolve_model(tmp_path / "same"))
    assert torch.equal(first_logits(again, ids), before)
    model.train()
    model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_checkpoint_made_of_it_answers_the_same(tiny_gguf: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny_gguf, tmp_path / "model")
    ref = resolve_model(tmp_path / "model")
    assert load_settings(ref).dtype == torch.bfloat16
    chat = load_chat(ref)
    assert chat.fingerprint() == load_chat(resolve_model(tiny_gguf)).fingerprint()
    assert chat.tokenizer.model_max_length == 256
    ids = chat.prompt([{"role": "user", "content": "hello"}])
    assert torch.equal(first_logits(load_model(ref), ids), first_logits(load_model(resolve_model(tiny_gguf)), ids))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_gguf_file_that_was_cut_short_is_one_line(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    content = tiny_gguf.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError) as error:
        load_model(resolve_model(cut))
    assert "cut.gguf" in str(error.value)
    assert "\n" not in str(error.value)
    if share < 0.01:  # nor is there a tokenizer in it
        with pytest.raises(UserError, match=r"cut.gguf: its tokenizer cannot be read"):
            load_chat(resolve_model(cut))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(UserError, match=r"empty.gguf: is not a GGUF file \(it begins with b''"):
        check_gguf(tmp_path / "empty.gguf")
