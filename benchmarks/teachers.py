"""Teachers and prompts for the benchmarks of distillation: random weights in real shapes, and questions of different lengths."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {  # as their makers publish them
    "1.5b": {  # Qwen2.5-Coder-1.5B
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
    },
    "0.5b": {  # Qwen2.5-0.5B
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
    },
    "135m": {  # SmolLM2-135M
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
    },
    "tiny": {  # for a CPU, to see that a script runs
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
    },
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SPREAD = 0.1  # of the embeddings, and so of the logits: at 0.02 every token would be as likely as the next, and top-p would cut nothing
TALE = "a train leaves the station with sixty apples and travels north for several hours while her brother counts boxes of red paint"


def random_teacher(shape: str, tokenizer: Path, folder: Path) -> str:
    """Write a model with a shape and random weights beside the tokenizer of another; return its folder.

    Seconds, not minutes: one block of random numbers is used again and again. Ids that the tokenizer does not have decode to nothing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    known = AutoTokenizer.from_pretrained(folder)
    settings = {**SHAPES[shape], "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id, "tie_word_embeddings": True}
    assert len(known) <= settings["vocab_size"], f"the tokenizer has {len(known):,} tokens, the shape {settings['vocab_size']:,}"
    config = {**settings, "bos_token_id": None, "dtype": "bfloat16", "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    torch.manual_seed(0)
    block = torch.randn(1 << 22)
    weights = {}
    for name, parameter in model.named_parameters():  # tied ones come once
        spread = SPREAD if "embed_tokens" in name else 0.02
        times = -(-parameter.numel() // block.numel())
        filled = (block * spread).to(torch.bfloat16).repeat(times)[: parameter.numel()].view(parameter.shape)
        weights[name] = torch.ones_like(filled) if "norm" in name else filled.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def write_questions(path: Path, count: int) -> Path:
    """Write a file of prompts, 20 to 120 words each, no two alike."""
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(chance.choices(TALE.split(), k=chance.randint(20, 120)))
            file.write(json.dumps({"prompt": f"Question {number}: {words}. How many are left?"}) + "\n")
    return path
