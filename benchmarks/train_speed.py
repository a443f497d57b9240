"""Tokens per second of full fine-tuning on one GPU: sftkit beside TRL's defaults, TRL's packing and the course notebook's recipe.

    python benchmarks/train_speed.py CHATS TOKENIZER [--shapes 135m,0.5b,1.5b,lora-0.6b] [--out FILE]
    python benchmarks/train_speed.py CHATS TOKENIZER --shapes lora-0.6b --variants "fp32 weights, compiled;fused"     LoRA two ways

CHATS is a data file with real conversations (their lengths are what counts), TOKENIZER a model folder whose tokenizer renders them.
The models have the shapes of SmolLM2-135M, Qwen2.5-0.5B and 1.5B, and Qwen3-0.6B with LoRA, and random weights: the speed does
not depend on what the weights say. Every variant runs on the same rows in this process, one after another; the first steps (kernels
are compiled, memory is taken) are not counted. A line of JSON per variant goes to FILE as soon as it is measured.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sftkit.core.chat import Chat, load_chat
from sftkit.core.formats import read_examples
from sftkit.core.hardware import measured_peak
from sftkit.core.models import resolve_model
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row, prepare
from sftkit.train.trainer import Watch, make_trainer, token_flops
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, TrainerCallback
from trl import SFTConfig, SFTTrainer

warnings.simplefilter("ignore")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs the shape `tiny`, to see that the script is sound

SHAPES: dict[str, Any] = {
    "lora-tiny": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
    ),
    "0.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "1.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "lora-0.6b": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
}  # fmt: skip


class Clock(TrainerCallback):  # type: ignore[misc]
    """Takes the time, once the device is done, after the first `skip` steps and after the last; between them nothing waits for it."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.times: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (self.skip, state.max_steps):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.times[state.global_step] = time.perf_counter()

    def rate(self, tokens: list[int]) -> float:
        """Return the tokens a second between the two, given the tokens of each step."""
        (first, start), (last, end) = sorted(self.times.items())
        return sum(tokens[first:last]) / (end - start)


class FusedAdapter(torch.autograd.Function):
    """x Wᵀ + s (x Aᵀ) Bᵀ with W frozen: the narrow products are added inside the wide ones' outputs (addmm), not in passes of their own.

    PEFT's layer writes its product out, scales it and adds it, and takes x through float32: passes over memory, which bind LoRA.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        """x [N, in], weight [out, in], down [r, in], up [out, r], all of one 16-bit format → [N, out]."""
        narrow = x @ down.T
        ctx.save_for_backward(x, weight, down, up, narrow)
        ctx.scale = scale
        return torch.addmm(x @ weight.T, narrow, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, down, up, narrow = ctx.saved_tensors
        (grad,) = grads
        inner = (grad @ up) * ctx.scale
        grad_x = torch.addmm(grad @ weight, inner, down) if ctx.needs_input_grad[0] else None
        return grad_x, None, inner.T @ x, (grad.T @ narrow) * ctx.scale, None


def fuse_adapters(model: Any) -> int:
    """Let PEFT's LoRA layers compute through FusedAdapter; return how many."""
    from peft.tuners.lora.layer import Linear

    layers = [each for each in model.modules() if isinstance(each, Linear)]
    for layer in layers:

        def forward(x: torch.Tensor, *_: Any, layer: Any = layer, **__: Any) -> torch.Tensor:
            base, half = layer.base_layer, torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            down, up = (part["default"].weight.to(half) for part in (layer.lora_A, layer.lora_B))
            flat = x.reshape(-1, x.shape[-1]).to(half)
            out = FusedAdapter.apply(flat, base.weight.to(half), down, up, layer.scaling["default"])
            out = out if base.bias is None else out + base.bias.to(half)
            return out.reshape(*x.shape[:-1], -1)

        layer.forward = forward
    return len(layers)


def check_fused() -> None:
    """Hold fused adapters against PEFT's on a small model, forward and back; raise AssertionError where they differ."""
    from peft import get_peft_model
    from sftkit.train.sft import adapter_config

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(SHAPES["tiny"](), dtype=torch.float32), adapter_config(TrainConfig(lora=True)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(0, 1000, (1, 64))
    found = []
    for fused in (False, True):
        if fused:
            assert fuse_adapters(model) == 14
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def build(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype).train()


def ours(
    shape: str,
    rows: list[Row],
    chat: Chat,
    *,
    step_tokens: int,
    batch_tokens: int,
    steps: int,
    compiled: bool,
    dtype: str,
    fused: bool = False,
) -> Any:
    mean = sum(len(row.ids) for row in rows) / len(rows)
    size = round(step_tokens / mean)
    chosen = rows[: size * steps]
    lora = shape.startswith("lora")
    config = TrainConfig(
        batch_size=size, batch_tokens=batch_tokens, validation=0, compile=compiled, dtype=dtype, logging_steps=1000, lora=lora, warmup=0.0
    )
    weights = torch.bfloat16 if dtype == "bfloat16" or lora else torch.float32
    model = build(shape, weights)
    half = None if dtype == "bfloat16" else torch.bfloat16
    peft = None
    if lora:
        from sftkit.train.sft import adapter_config

        peft = adapter_config(config)
    with tempfile.TemporaryDirectory() as folder:
        watch, clock = Watch(Path(folder) / "metrics.jsonl", chat, save_minutes=1e9), Clock(skip=8)
        trainer = make_trainer(
            model, chat, chosen, [], config, checkpoints=Path(folder), device=DEVICE, half=half, batch_tokens=batch_tokens, watch=watch,
            peft_config=peft,
        )  # fmt: skip
        trainer.add_callback(clock)
        if fused:
            fuse_adapters(trainer.model)
        parts = trainer.packs.parts
        sizes = [sum(len(chosen[row].ids) for row in pack) for pack in trainer.packs.rows()]
        tokens = [sum(sizes[start : start + parts]) for start in range(0, len(sizes), parts)]
        trainer.train()
        watch.close()
        flops = token_flops(trainer.model, mean)
    return {
        "tokens_per_second": clock.rate(tokens),
        "flops": flops,
        "parts": parts,
        "step_tokens": tokens[0],
    }


def theirs(shape: str, rows: list[Row], chat: Chat, *, name: str, steps: int) -> Any:
    settings: dict[str, dict[str, Any]] = {
        "notebook recipe": {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": False, "bf16": False
        },
        "TRL defaults": {},
        "TRL packing": {
            "packing": True, "per_device_train_batch_size": 8, "gradient_checkpointing": False, "bf16": True, "max_length": 1024
        },
    }  # fmt: skip
    chosen = {"max_length": None, **settings[name]}
    model = build(shape, torch.float32)
    data = Dataset.from_dict({"input_ids": [row.ids for row in rows[:4000]], "labels": [row.labels for row in rows[:4000]]})
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(skip=3)
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=DEVICE == "cpu",
            max_steps=steps,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            save_strategy="no",
            **chosen,
        )
        peft = None
        if shape.startswith("lora"):
            from peft import LoraConfig

            peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=chat.tokenizer, callbacks=[clock], peft_config=peft
        )
        counts: list[int] = []
        plain = trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids = inputs["input_ids"]
            counts.append(int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel())
            return plain(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        trainer.train()
        each = arguments.gradient_accumulation_steps
        tokens = [sum(counts[start : start + each]) for start in range(0, len(counts), each)]
    return {"tokens_per_second": clock.rate(tokens), "step_tokens": tokens[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chats")
    parser.add_argument("tokenizer")
    parser.add_argument("--shapes", default="135m,0.5b,1.5b,lora-0.6b")
    parser.add_argument("--out", default="train_speed.jsonl")
    parser.add_argument("--step-tokens", type=int, default=65_536)
    parser.add_argument(
        "--variants", default="", help="words of which a variant's name must hold one, separated by semicolons; all without"
    )
    arguments = parser.parse_args()
    check_fused()
    chat = load_chat(resolve_model(arguments.tokenizer))
    quiet = TrainConfig(validation=0)
    rows = prepare(read_examples(arguments.chats), chat, quiet, context=8192).train
    card, peak = (torch.cuda.get_device_name(), measured_peak("cuda")) if DEVICE == "cuda" else ("CPU", 1e12)
    mean = sum(len(row.ids) for row in rows) / len(rows)
    print(f"{card}, {peak / 1e12:.0f} TFLOP/s in a matrix product; {len(rows):,} rows, {mean:.0f} tokens on average", flush=True)
    large = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory > 100e9
    table = []
    for shape in arguments.shapes.split(","):
        micro = {"135m": 65_536, "0.5b": 32_768, "1.5b": 16_384, "lora-0.6b": 32_768}.get(shape, 1024) if large else 16_384
        variants: list[tuple[str, Any]] = [
            ("notebook recipe", lambda s: theirs(s, rows, chat, name="notebook recipe", steps=8)),
            ("TRL defaults", lambda s: theirs(s, rows, chat, name="TRL defaults", steps=8)),
            ("TRL packing", lambda s: theirs(s, rows, chat, name="TRL packing", steps=8)),
        ]
        for dtype in ("auto", "bfloat16"):
            for compiled in (False, True):
                name = f"sftkit {'bf16 weights' if dtype == 'bfloat16' else 'fp32 weights'}{', compiled' if compiled else ''}"
                variants.append(
                    (
                        name,
                        lambda s, d=dtype, c=compiled, m=micro: ours(
                            s, rows, chat, step_tokens=arguments.step_tokens, batch_tokens=m, steps=24, compiled=c, dtype=d
                        ),
                    )
                )
        if shape.startswith("lora"):
            told = {
                "step_tokens": arguments.step_tokens,
                "batch_tokens": micro,
                "steps": 24,
                "compiled": True,
                "dtype": "auto",
                "fused": True,
            }
            variants.append(("sftkit fused adapters, compiled", lambda s, t=told: ours(s, rows, chat, **t)))
        for name, measure in variants:
            if arguments.variants and not any(word in name for word in arguments.variants.split(";")):
                continue
            torch.cuda.empty_cache()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                found = measure(shape)
            except torch.OutOfMemoryError:
                found = {"tokens_per_second": 0.0, "error": "out of memory"}
            except Exception as error:  # noqa: BLE001  one variant's fault is told, and the others are still measured
                found = {"tokens_per_second": 0.0, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            found |= {
                "shape": shape, "variant": name, "card": card, "peak_tflops": round(peak / 1e12),
                "seconds": round(time.perf_counter() - start, 1),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
            }  # fmt: skip
            found["mfu"] = round(found["tokens_per_second"] * found.get("flops", 0) / peak, 3)
            table.append(found)
            print(f"{shape:10} {name:28} {found['tokens_per_second']:10,.0f} tok/s  {found['memory_gb']:6.1f} GB  MFU {found['mfu']:.0%}  "
                  f"({found['seconds']:.0f} s){' ' + found['error'] if 'error' in found else ''}", flush=True)  # fmt: skip
            with open(arguments.out, "a") as file:
                file.write(json.dumps(found) + "\n")
            gc.collect()
    print(json.dumps({"rows": len(table)}))


if __name__ == "__main__":
    main()
