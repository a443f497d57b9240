"""The memory plan held against what a GPU takes: the predicted and the measured peak of twelve configurations.

    python benchmarks/memory_plan.py [--out FILE]          on one GPU, three minutes; a line of JSON per configuration, at once
    python benchmarks/memory_plan.py --capped              a 10 GB card: its memory is all that the process may take
    python benchmarks/memory_plan.py --qlora               a T4: a 7B model in 4 bits, float16, 15.6 GB (needs bitsandbytes)
    python benchmarks/memory_plan.py --cpu                 tiny shapes, and nothing measured: the script runs (with --capped, --qlora too)

Models have random weights and real shapes, rows random tokens and the lengths of short chats: neither changes what memory is taken.
Each configuration trains two updates with the trainer that `sftkit train sft` uses; the peak is torch.cuda.max_memory_allocated.
The capped ones stand without compiling and with activations computed twice, as the plan would have them, and their losses must be numbers.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sftkit.core.chat import Chat
from sftkit.core.models import resolve_model
from sftkit.train.adapters import adapter_config
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.local import load_start
from sftkit.train.memory import Load, predict
from sftkit.train.trainer import make_trainer
from sftkit.train.watch import Watch
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
    "7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=32768,
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
    qlora: bool = False

    def name(self) -> str:
        """Say what it is."""
        method = "QLoRA" if self.qlora else "LoRA" if self.lora else "full"
        marks = [*(["checkpointing"] if self.checkpointing else []), *(["compiled"] if self.compiled else [])]
        return f"{self.shape} {method} {self.dtype} {self.passes} x {self.tokens:,}{' ' if marks else ''}{' '.join(marks)}"


CASES = (  # what was measured least comes first
    Case("0.6b", 16_384, passes=2, lora=True, compiled=True),
    Case("0.6b", 16_384, lora=True),
    Case("1.5b", 8_192, lora=True, checkpointing=True),
    Case("0.5b", 16_384, passes=2, checkpointing=True),
    Case("0.6b", 4_096, dtype="bfloat16", checkpointing=True),
    Case("0.5b", 8_192, passes=2),
    Case("1.5b", 8_192, passes=2),
    Case("135m", 32_768),
    Case("0.5b", 16_384, dtype="bfloat16"),
    Case("135m", 32_768, passes=2, compiled=True),
    Case("0.5b", 32_768, passes=2, dtype="bfloat16", compiled=True),
    Case("1.5b", 8_192, passes=2, dtype="bfloat16", compiled=True),
)
CAPPED = (  # what has to fit into an RTX 3080's 10 GB
    Case("0.6b", 4_096, passes=2, dtype="bfloat16", checkpointing=True),
    Case("1.5b", 4_096, passes=2, lora=True, checkpointing=True),
)
QLORA = (Case("7b", 2_048, passes=2, lora=True, qlora=True, checkpointing=True),)  # a T4: no bfloat16
CAP, T4 = 10e9, 15.6e9
LENGTH, TRAINED = 128, 0.6  # tokens of a row, and the share of them that is learned
UPDATES = 2


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


def measure(case: Case, chat: Chat, *, device: str, cap: float = 0.0) -> tuple[int, int, list[float]]:
    """Return the predicted and the measured peak in bytes, and the losses; on a CPU the second is 0. `cap`: of the device's memory."""
    count, updates = case.tokens // LENGTH, UPDATES * 4 if case.qlora else UPDATES  # float16's scale is found in the first few
    random = np.random.default_rng(0)
    mask = [place >= LENGTH * (1 - TRAINED) for place in range(LENGTH)]
    rows = [Row((str(n), None), random.integers(3, 500, LENGTH).tolist(), mask) for n in range(count * case.passes * updates)]
    half = torch.float16 if case.qlora else None if case.dtype == "bfloat16" and not case.lora else torch.bfloat16
    weights = torch.float16 if case.qlora else torch.bfloat16 if case.dtype == "bfloat16" or case.lora else torch.float32
    config = TrainConfig(
        batch_size=count * case.passes, batch_tokens=case.tokens, validation=0, dtype=case.dtype, lora=case.lora and not case.qlora,
        qlora=case.qlora, warmup=0.0, compile=case.compiled, gradient_checkpointing=case.checkpointing, logging_steps=1,
    )  # fmt: skip
    width = -(-case.tokens // LENGTH) * LENGTH
    load = Load(
        tokens=width, scored=count * (sum(mask) - (1 if mask[0] else 0)), accumulates=case.passes > 1, adapter=case.lora,
        quantised=case.qlora, checkpointing=case.checkpointing, compiled=case.compiled, dtype=weights, half=half,
    )  # fmt: skip
    predicted = predict(SHAPES[case.shape], load).peak
    model = quantised_model(case.shape, config, device) if case.qlora else random_model(case.shape, weights, device)
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if cap:
            torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            model, chat, rows, [], config, checkpoints=Path(folder), device=device, half=half, batch_tokens=case.tokens, watch=watch,
            peft_config=adapter_config(config) if case.lora else None,
        )  # fmt: skip
        trainer.train()
        watch.close()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return predicted, torch.cuda.max_memory_allocated() if device == "cuda" else 0, losses


def random_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]), dtype=dtype)


def quantised_model(shape: str, config: TrainConfig, device: str) -> Any:
    """Return a model in 4 bits, loaded from a folder as `sftkit train sft --qlora` does on a card without bfloat16; on a CPU whole."""
    if device == "cpu":
        return random_model(shape, torch.float32, device)
    with tempfile.TemporaryDirectory() as folder:
        random_model(shape, torch.float16, device).save_pretrained(folder)
        gc.collect()
        torch.cuda.empty_cache()
        with mock.patch("sftkit.train.local.half_precision", return_value=torch.float16):
            return load_start(resolve_model(folder), config, torch.float16, device)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="memory_plan.jsonl")
    parser.add_argument("--capped", action="store_true", help="the cases of a card of 10 GB, with no more memory than that")
    parser.add_argument("--qlora", action="store_true", help="a 7B model in 4 bits on a T4's memory")
    parser.add_argument("--only", default="", help="a word that a configuration's name must hold")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, nothing measured")
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    chat, table = small_chat(), []
    card = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    begun = time.perf_counter()
    print(f"{card}, torch {torch.__version__}", flush=True)
    cases = [*(CAPPED if arguments.capped else ()), *(QLORA if arguments.qlora else ())] or CASES
    for each in [case for case in cases if arguments.only in case.name()]:
        case = replace(each, shape="tiny", tokens=1024, compiled=False) if arguments.cpu else each
        cap = T4 if case in QLORA else CAP if case in CAPPED else 0.0
        start, error = time.perf_counter(), ""
        predicted, measured, losses = 0, 0, []
        gc.collect()
        torch._dynamo.reset()
        try:
            predicted, measured, losses = measure(case, chat, device=device, cap=cap)
            error = "" if losses and all(map(math.isfinite, losses)) else f"losses {losses}"
        except Exception as fault:  # noqa: BLE001  one configuration's fault is told, and the others are still measured
            error = f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"
        off = predicted / measured - 1 if measured else None
        found = {
            "case": case.name(), "card": card, "cap_gb": cap / 1e9 or None, "predicted_gb": round(predicted / 1e9, 2),
            "measured_gb": round(measured / 1e9, 2), "off": None if off is None else round(off, 4), "losses": losses,
            "seconds": round(time.perf_counter() - start, 1), "error": error,
        }  # fmt: skip
        table.append(found)
        with open(arguments.out, "a") as file:
            file.write(json.dumps(found) + "\n")
        print(line_of(found), flush=True)
    print("\n".join(["", *map(line_of, table)]))
    offs = [abs(each["off"]) for each in table if each["off"] is not None]
    if offs:
        print(f"off by {statistics.median(offs):.1%} (median), {max(offs):.1%} (maximum), over {len(offs)} configurations")
    print(f"{sum(bool(each['error']) for each in table)} failed, {time.perf_counter() - begun:.0f} s")


def line_of(found: dict[str, Any]) -> str:
    """Write a result as a line of the table."""
    off = "" if found["off"] is None else f"{found['off']:+.1%}"
    cap = f" of {found['cap_gb']:.1f}" if found["cap_gb"] else ""
    told = f"{found['predicted_gb']:8.2f} GB {found['measured_gb']:8.2f} GB{cap} {off:>7}"
    return f"{found['case']:48} {told}  ({found['seconds']} s) {found['error']}"


if __name__ == "__main__":
    main()
