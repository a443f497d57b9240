"""The memory plan held against what a GPU takes: the predicted and the measured peak of twelve configurations.

    python benchmarks/memory_plan.py [--out FILE]          on one GPU, a few minutes; a line of JSON per configuration, at once
    python benchmarks/memory_plan.py --capped              two cases of a 10 GB card: its memory is all that the process may take
    python benchmarks/memory_plan.py --cpu                 the same with tiny shapes and without a measurement: the script runs

Models have random weights and real shapes, rows random tokens and the lengths of short chats: neither changes what memory is taken.
Each configuration trains a few updates with the trainer that `sftkit train sft` uses; the peak is torch.cuda.max_memory_allocated.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sftkit.core.chat import Chat
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.memory import Load, predict
from sftkit.train.sft import adapter_config
from sftkit.train.trainer import Watch, make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

warnings.simplefilter("ignore")

QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES: dict[str, Any] = {
    "135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "0.5b": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, **QWEN
    ),
    "0.6b": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, **QWEN
    ),
    "1.5b": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, **QWEN
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One configuration. `passes` forward passes make an update."""

    shape: str
    tokens: int
    passes: int = 1
    dtype: str = "auto"
    lora: bool = False
    checkpointing: bool = False
    compiled: bool = False

    def name(self) -> str:
        """Say what it is."""
        method = "LoRA" if self.lora else "full"
        marks = [*(["checkpointing"] if self.checkpointing else []), *(["compiled"] if self.compiled else [])]
        return f"{self.shape} {method} {self.dtype} {self.passes} x {self.tokens:,}{' ' if marks else ''}{' '.join(marks)}"


CASES = (
    Case("135m", 32_768),
    Case("135m", 32_768, passes=2, compiled=True),
    Case("0.5b", 8_192, passes=2),
    Case("0.5b", 16_384, dtype="bfloat16"),
    Case("0.5b", 16_384, passes=2, checkpointing=True),
    Case("0.5b", 32_768, passes=2, dtype="bfloat16", compiled=True),
    Case("0.6b", 4_096, dtype="bfloat16", checkpointing=True),
    Case("0.6b", 16_384, lora=True),
    Case("0.6b", 16_384, passes=2, lora=True, compiled=True),
    Case("1.5b", 8_192, passes=2),
    Case("1.5b", 8_192, lora=True, checkpointing=True),
    Case("1.5b", 8_192, passes=2, dtype="bfloat16", compiled=True),
)
CAPPED = (  # what has to fit into an RTX 3080's 10 GB
    Case("0.6b", 4_096, passes=2, dtype="bfloat16", checkpointing=True),
    Case("1.5b", 4_096, passes=2, lora=True, checkpointing=True),
)
CAP = 10e9
LENGTH, TRAINED = 128, 0.6  # tokens of a row, and the share of them that is learned
UPDATES = 3


def small_chat() -> Chat:
    """Return a tokenizer of a few words: nothing here is read."""
    words = {word: place for place, word in enumerate(["<|im_end|>", "<|im_start|>", "<|pad|>", "a", "b", "user", "assistant", "\n"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=specials
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Chat(tokenizer)


def measure(case: Case, chat: Chat, *, device: str) -> tuple[int, int]:
    """Return the predicted and the measured peak in bytes; on a CPU the second is 0."""
    count = case.tokens // LENGTH
    random = np.random.default_rng(0)
    mask = [place >= LENGTH * (1 - TRAINED) for place in range(LENGTH)]
    rows = [Row((str(n), None), random.integers(3, 500, LENGTH).tolist(), mask) for n in range(count * case.passes * UPDATES)]
    half = None if case.dtype == "bfloat16" and not case.lora else torch.bfloat16
    weights = torch.bfloat16 if case.dtype == "bfloat16" or case.lora else torch.float32
    config = TrainConfig(
        batch_size=count * case.passes, batch_tokens=case.tokens, validation=0, dtype=case.dtype, lora=case.lora, warmup=0.0,
        compile=case.compiled, gradient_checkpointing=case.checkpointing, logging_steps=1000,
    )  # fmt: skip
    width = -(-case.tokens // LENGTH) * LENGTH
    load = Load(
        tokens=width, scored=count * (sum(mask) - (1 if mask[0] else 0)), accumulates=case.passes > 1, adapter=case.lora,
        checkpointing=case.checkpointing, compiled=case.compiled, dtype=weights, half=half,
    )  # fmt: skip
    predicted = predict(SHAPES[case.shape], load).peak
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[case.shape]), dtype=weights)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            model, chat, rows, [], config, checkpoints=Path(folder), device=device, half=half, batch_tokens=case.tokens, watch=watch,
            peft_config=adapter_config(config) if case.lora else None,
        )  # fmt: skip
        trainer.train()
        watch.close()
    return predicted, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="memory_plan.jsonl")
    parser.add_argument("--capped", action="store_true", help="the cases of a card of 10 GB, with no more memory than that")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, nothing measured")
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    chat, table = small_chat(), []
    card = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    begun = time.perf_counter()
    print(f"{card}, torch {torch.__version__}", flush=True)
    if arguments.capped and not arguments.cpu:
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)
    for each in CAPPED if arguments.capped else CASES:
        case = Case("tiny", 1024, each.passes, each.dtype, each.lora, each.checkpointing) if arguments.cpu else each
        start, error = time.perf_counter(), ""
        predicted, measured = 0, 0
        try:
            predicted, measured = measure(case, chat, device=device)
        except Exception as fault:  # noqa: BLE001  one configuration's fault is told, and the others are still measured
            error = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        off = predicted / measured - 1 if measured else None
        found = {
            "case": case.name(), "card": card, "predicted_gb": round(predicted / 1e9, 2), "measured_gb": round(measured / 1e9, 2),
            "off": None if off is None else round(off, 4), "seconds": round(time.perf_counter() - start, 1), "error": error,
        }  # fmt: skip
        table.append(found)
        with open(arguments.out, "a") as file:
            file.write(json.dumps(found) + "\n")
        told = "" if off is None else f"  {off:+.1%}"
        print(f"{case.name():48} {predicted / 1e9:8.2f} GB {measured / 1e9:8.2f} GB{told}  ({found['seconds']} s) {error}", flush=True)
        gc.collect()
    offs = [abs(each["off"]) for each in table if each["off"] is not None]
    if offs:
        print(f"off by {statistics.median(offs):.1%} (median), {max(offs):.1%} (maximum), over {len(offs)} configurations")
    print(f"{sum(bool(each['error']) for each in table)} failed, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
