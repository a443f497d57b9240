"""GGUF: the file computes what the model does, and what is not known is refused."""

import pytest
import torch
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, load_tokenizer, resolve_model
from sftkit.train.export import export_gguf
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPE = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("format", ["f32", "f16"])
def test_the_file_computes_what_the_model_does(format: str, tmp_path, tiny_model) -> None:
    made = export_gguf(tiny_model, tmp_path / "tiny.gguf", format=format)
    assert made.off < (1e-5 if format == "f32" else 0.02)
    one, other = (load_model(resolve_model(each), dtype="float32") for each in (tiny_model, tmp_path / "tiny.gguf"))
    ids = torch.randint(4, 900, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=1e-4 if format == "f32" else 0.05, rtol=0)
    tokenizer = load_tokenizer(resolve_model(tmp_path / "tiny.gguf"))
    assert tokenizer.chat_template == load_tokenizer(resolve_model(tiny_model)).chat_template
    assert [each.name for each in tmp_path.glob("*.gguf")] == ["tiny.gguf"]
    with pytest.raises(UserError, match="is there already"):
        export_gguf(tiny_model, tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"ends with \.gguf"):  # no other is read as one
        export_gguf(tiny_model, tmp_path / "tiny")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_models_too(kind: str, tmp_path, tiny_model) -> None:
    torch.manual_seed(0)
    config, model = (Qwen2Config, Qwen2ForCausalLM) if kind == "qwen2" else (Qwen3Config, Qwen3ForCausalLM)
    more = {} if kind == "qwen2" else {"head_dim": 128}  # transformers takes it for granted
    model(config(**SHAPE, **more, tie_word_embeddings=kind == "qwen2")).save_pretrained(tmp_path / kind)
    load_tokenizer(resolve_model(tiny_model)).save_pretrained(tmp_path / kind)
    assert export_gguf(tmp_path / kind, tmp_path / "model.gguf", format="f32").off < 1e-4


def test_what_is_not_known_is_refused(tmp_path, tiny_model, cli) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(resolve_model(tiny_model)).save_pretrained(tmp_path / "gpt2")
    code, _, err = cli("train", "export", tmp_path / "gpt2", "--gguf", tmp_path / "a.gguf")
    assert code == 1
    assert "is a gpt2 model; GGUF is written for llama, qwen2, qwen3" in err
    assert not list(tmp_path.glob("*.gguf"))
