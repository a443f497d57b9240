"""Tokens per second of full fine-tuning on one GPU: sftkit beside TRL's defaults, TRL's packing and the course notebook's recipe.

    python benchmarks/train_speed.py CHATS TOKENIZER [--shapes 135m,0.5b,1.5b,lora-0.6b] [--out FILE]      the table, 4 to 5 minutes
    python benchmarks/train_speed.py CHATS TOKENIZER --shapes 135m,lora-0.6b --variants "fp32 weights.;flex" --profile
    python benchmarks/train_speed.py CHATS TOKENIZER --shapes 1.5b --variants "40 GB.;larger passes."      the same in less memory, in more
    python benchmarks/train_speed.py CHATS TOKENIZER --shapes 135m,0.5b,1.5b --variants "weights.;fp32 stream;small pieces"
    python benchmarks/train_speed.py CHATS TOKENIZER --losses                              each step's loss beside TRL's plain path
    python benchmarks/train_speed.py CHATS TOKENIZER --losses --variants "TRL.;fp32 stream"     and so with the residual stream in float32
    python benchmarks/train_speed.py CHATS TOKENIZER --shapes tiny,lora-tiny --tiny         on a CPU: that the script is sound

CHATS is a data file with real conversations (their lengths are what counts), TOKENIZER a model folder whose tokenizer renders them.
The models have the shapes of SmolLM2-135M, Qwen2.5-0.5B and 1.5B, and Qwen3-0.6B with LoRA, and random weights: the speed does
not depend on what the weights say. Every variant runs on the same rows in this process, one after another, each with code compiled
for it anew; the first steps (kernels are compiled, memory is taken) are not counted, then --seconds are. A line of JSON per variant
goes to FILE as soon as it is measured. --profile writes what two more steps spent their time on beside FILE. Among the variants, "fp32
stream" goes without what train/stream.py does, "small pieces" computes the loss in 2^27 logits at a time, as it is done uncompiled, and
"launched" records no pass (train/recorded.py), "varlen" attends by PyTorch's kernels alone (train/row_attention.py).
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from row_blocks import BLOCK, blocks_of_rows
from sftkit.core.chat import Chat, load_chat
from sftkit.core.formats import read_examples
from sftkit.core.hardware import measured_peak
from sftkit.core.models import resolve_model
from sftkit.train import attention, head, stream
from sftkit.train.account import prepare
from sftkit.train.adapters import adapter_config, part_adapters
from sftkit.train.attention import packed_attention
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.memory import token_flops
from sftkit.train.trainer import make_trainer
from sftkit.train.watch import Watch
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig, SFTTrainer

warnings.simplefilter("ignore")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs the shape `tiny`, to see that the script is sound
STEPS = 24
SHORT = 256

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
    """Takes the time of the steps after the first `skip`, until `seconds` are over; waits for the device only at both ends.

    With a `profile` two more steps follow, and what they spent their time on is written there.
    """

    def __init__(self, *, skip: int, seconds: float, profile: Path | None = None) -> None:
        self.skip, self.seconds, self.profile = skip, seconds, profile
        self.times: dict[int, float] = {}
        self.profiler: Any = None
        self.events: list[Any] = []  # at the end of each step that is counted, on the device

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, now = state.global_step, time.perf_counter()
        if len(self.times) < 2:
            over = step > self.skip and (now - self.times[self.skip] > self.seconds or step >= state.max_steps - (2 if self.profile else 0))
            if step == self.skip or over:
                synchronize()
                self.times[step] = time.perf_counter()
            if DEVICE == "cuda" and step >= self.skip:
                self.events.append(torch.cuda.Event(enable_timing=True))
                self.events[-1].record()
            if over and self.profile:
                self.profiler = profile(activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU])
                self.profiler.__enter__()
            control.should_training_stop = over and not self.profile
        elif self.profile and step == max(self.times) + 2:
            synchronize()
            self.profiler.__exit__(None, None, None)
            key = "self_cuda_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
            self.profile.write_text(self.profiler.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=90))
            control.should_training_stop = True

    def rate(self, tokens: list[int]) -> float:
        """Return the tokens a second between the two, given the tokens of each step."""
        (first, start), (last, end) = sorted(self.times.items())
        return sum(tokens[first:last]) / (end - start)

    def steps_ms(self) -> list[float]:
        """Return the milliseconds of each step that was counted, on the device."""
        return [round(one.elapsed_time(two), 1) for one, two in pairwise(self.events)]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype).train()


def ours(
    shape: str,
    rows: list[Row],
    chat: Chat,
    clock: Clock,
    *,
    batch_tokens: int,
    step_tokens: int,
    compiled: bool = True,
    dtype: str = "auto",
    peft: bool = False,
    wide: bool = False,
    small: bool = False,
    flex: bool = False,
    launched: bool = False,
    varlen: bool = False,
    kept: bool = False,
) -> Any:
    """Train with the trainer of `sftkit train sft`.

    `wide`: what goes from layer to layer is float32 under float32 weights. `small`: the loss in small pieces. `flex`: attention by
    PyTorch's flex_attention. `peft`: LoRA's layers as PEFT computes them. `launched`: the host launches every kernel of every pass.
    `varlen`: attention by PyTorch's kernels for variable lengths. `kept`: layers keep what products read, as torch.compile has it.
    """
    mean = sum(len(row.ids) for row in rows) / len(rows)
    size = max(1, round(step_tokens / mean))
    chosen = rows[: size * STEPS]
    lora = shape.startswith("lora")
    config = TrainConfig(
        batch_size=size, batch_tokens=batch_tokens, validation=0, compile=compiled, dtype=dtype, logging_steps=1000, lora=lora, warmup=0.0
    )
    weights = torch.bfloat16 if dtype == "bfloat16" or lora else torch.float32
    model = build(shape, weights)
    half = None if dtype == "bfloat16" else torch.bfloat16
    with ExitStack() as until, tempfile.TemporaryDirectory() as folder:
        if wide:
            until.enter_context(wide_stream())
        if varlen:
            until.enter_context(mock.patch.object(attention, "SHORT", {}))
        if small:
            until.enter_context(mock.patch.object(head, "piece_rows", lambda vocabulary, *_: max(1, head.ELEMENTS // vocabulary)))
        watch = Watch(Path(folder) / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            model, chat, chosen, [], config, checkpoints=Path(folder), device=DEVICE, half=half, batch_tokens=batch_tokens, watch=watch,
            peft_config=adapter_config(config) if lora else None,
        )  # fmt: skip
        trainer.add_callback(clock)
        if peft:
            part_adapters(trainer.model)
        trainer.keeps = kept
        if launched or flex or peft:
            trainer.records = False
        if flex:
            attend_by_blocks(trainer.model.get_base_model() if lora else trainer.model)
        parts = trainer.packs.parts
        sizes = [sum(len(chosen[row].ids) for row in pack) for pack in trainer.packs.rows()]
        tokens = [sum(sizes[start : start + parts]) for start in range(0, len(sizes), parts)]
        trainer.train()
        watch.close()
        flops = token_flops(trainer.model, mean)
    return {"tokens_per_second": clock.rate(tokens), "flops": flops, "parts": parts, "step_tokens": tokens[0], "ms": clock.steps_ms()}


def wide_stream() -> Any:
    """Let what goes from layer to layer be float32, for a while."""
    return mock.patch.object(stream, "stream_format", return_value=None)


def attend_by_blocks(model: Any) -> None:
    """Let a model attend within rows by flex_attention: the blocks of 128 keys that a block of queries needs, and a mask within them."""
    ALL_ATTENTION_FUNCTIONS.register("flex_rows", flex_rows)
    model.set_attn_implementation("flex_rows")

    def add_blocks(_module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        return arguments, {**named, "block_mask": blocks_of_rows(named["cu_seq_lens_q"], named["input_ids"].shape[1])}

    model.base_model.register_forward_pre_hook(add_blocks, with_kwargs=True)


def flex_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, *, scaling: float | None = None,
    block_mask: Any = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend as transformers asks it of a function."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


def check_blocks() -> None:
    """Hold flex_attention over rows against our own attention; raise AssertionError where they differ."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 2 * BLOCK, 16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 100, 101, 230, 256, 256], dtype=torch.int32)
    found, _ = flex_rows(None, query, key, value, block_mask=blocks_of_rows(bounds, 2 * BLOCK))
    wanted, _ = packed_attention(None, query, key, value, cu_seq_lens_q=bounds)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def short_rows(shape: str, rows: list[Row], chat: Chat, clock: Clock, **told: Any) -> Any:
    """Train on the short rows alone: what the kernel's work for rows that might be longer costs."""
    return ours(shape, [row for row in rows if len(row) <= SHORT], chat, clock, **told)


def theirs(shape: str, rows: list[Row], chat: Chat, clock: Clock, *, name: str) -> Any:
    """Train with TRL's own trainer, as `name` says."""
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
        arguments = SFTConfig(
            output_dir=folder, use_cpu=DEVICE == "cpu", max_steps=STEPS, report_to="none", disable_tqdm=True, logging_steps=1000,
            save_strategy="no", **chosen,
        )  # fmt: skip
        lora = adapter_config(TrainConfig(lora=True)) if shape.startswith("lora") else None
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=chat.tokenizer, callbacks=[clock], peft_config=lora
        )
        counts: list[Any] = []
        plain = trainer.training_step

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            counts.append(inputs["input_ids"].numel() if mask is None else mask.sum())  # read at the end: nothing waits for it here
            return plain(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        trainer.train()
        each = arguments.gradient_accumulation_steps
        tokens = [int(sum(counts[start : start + each])) for start in range(0, len(counts), each)]
    return {"tokens_per_second": clock.rate(tokens), "step_tokens": tokens[0]}


def losses_beside_trl(shape: str, rows: list[Row], chat: Chat, *, updates: int, size: int, wide: bool = False) -> dict[str, Any]:
    """Train the same weights on the same updates, packed and compiled here, padded through PyTorch's own attention in TRL's trainer.

    Return the losses of both, and how far the mean of the last quarter is off. `wide`: as for `ours`.
    """
    chosen = rows[: updates * size]
    config = TrainConfig(
        batch_size=size, batch_tokens=65_536, validation=0, compile=DEVICE == "cuda", schedule="constant", warmup=0.0, logging_steps=1,
        learning_rate=3e-4, lora=shape.startswith("lora"),
    )  # fmt: skip
    weights = torch.bfloat16 if config.lora else torch.float32
    found: dict[str, list[float]] = {}
    with wide_stream() if wide else nullcontext(), tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            build(shape, weights), chat, chosen, [], config, checkpoints=Path(folder), device=DEVICE, half=torch.bfloat16,
            batch_tokens=65_536, watch=watch, peft_config=adapter_config(config) if config.lora else None,
        )  # fmt: skip
        order = [row for number in range(len(chosen) // size) for row in trainer.packs.update(number)]
        if config.lora:
            torch.manual_seed(0)
            start = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
        trainer.train()
        watch.close()
        found["sftkit"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        del trainer
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.from_dict({"input_ids": [chosen[row].ids for row in order], "labels": [chosen[row].labels for row in order]})
        arguments = SFTConfig(
            output_dir=folder, use_cpu=DEVICE == "cpu", num_train_epochs=1, report_to="none", disable_tqdm=True, logging_steps=1,
            save_strategy="no", per_device_train_batch_size=size, gradient_checkpointing=False, bf16=True, learning_rate=config.rate,
            lr_scheduler_type="constant", max_length=None, train_sampling_strategy="sequential", shuffle_dataset=False,
        )  # fmt: skip
        plain = SFTTrainer(
            model=build(shape, weights), args=arguments, train_dataset=data, processing_class=chat.tokenizer,
            peft_config=adapter_config(config) if config.lora else None,
        )  # fmt: skip
        if config.lora:
            for name, each in plain.model.named_parameters():
                if each.requires_grad:
                    each.data = start[name].to(each.device, torch.float32)
        plain.train()
        found["TRL"] = [line["loss"] for line in plain.state.log_history if "loss" in line]
    assert len(found["sftkit"]) == len(found["TRL"]) == len(order) // size
    off = [one / other - 1 for one, other in zip(found["sftkit"], found["TRL"], strict=True)]
    last = max(1, len(off) // 4)
    ends = {name: statistics.mean(losses[-last:]) for name, losses in found.items()}
    return {
        "updates": len(off), "off_at_the_end": ends["sftkit"] / ends["TRL"] - 1, "most_off": max(off, key=abs), "first": off[0],
        **{f"{name} at the end": value for name, value in ends.items()}, **found,
    }  # fmt: skip


def variants_of(shape: str, *, step_tokens: int, large: bool) -> list[tuple[str, Any]]:
    """Return what is measured of a shape: names, and functions of (shape, rows, chat, clock)."""
    lora = shape.startswith("lora")
    tokens = {"135m": 65_536, "0.5b": 32_768, "1.5b": 16_384, "lora-0.6b": 32_768}.get(shape, 1024)
    told: dict[str, Any] = {
        "step_tokens": step_tokens,
        "batch_tokens": tokens if large else min(tokens, 16_384),
        "compiled": DEVICE == "cuda",
    }
    found: list[tuple[str, Any]] = []
    found += [(name, partial(theirs, name=name)) for name in ("notebook recipe", "TRL defaults", "TRL packing")]
    found.append(("sftkit fp32 weights", partial(ours, **told)))
    if lora:
        found.append(("sftkit fp32 weights, PEFT's layers", partial(ours, **told, peft=True)))
    else:
        found.append(("sftkit bf16 weights", partial(ours, **told, dtype="bfloat16")))
        found.append(("sftkit fp32 weights, fp32 stream", partial(ours, **told, wide=True)))
        found.append(("sftkit fp32 weights, small pieces", partial(ours, **told, small=True)))
        found.append(("sftkit bf16 weights, small pieces", partial(ours, **told, dtype="bfloat16", small=True)))
    found.append(("sftkit fp32 weights, products' inputs kept", partial(ours, **told, kept=True)))
    for name, tokens in (("within 40 GB", {"1.5b": 8_192}), ("larger passes", {"1.5b": 32_768, "0.5b": 65_536, "lora-0.6b": 65_536})):
        if large and shape in tokens:
            passes = {**told, "batch_tokens": tokens[shape]}
            found.append((f"sftkit fp32 weights {name}", partial(ours, **passes)))
            found.append((f"sftkit fp32 weights {name}, launched", partial(ours, **passes, launched=True)))
    found.append(("sftkit fp32 weights, launched", partial(ours, **told, launched=True)))
    found.append(("sftkit fp32 weights, varlen", partial(ours, **told, varlen=True)))
    found.append(("sftkit fp32 weights, flex", partial(ours, **told, flex=True)))
    found.append((f"sftkit fp32 weights, rows to {SHORT}", partial(short_rows, **told)))
    found.append(("sftkit fp32 weights, as it is", partial(ours, **{**told, "compiled": False})))
    return found


EXTRA = ("40 GB", "larger", "launched", "varlen", "stream", "pieces", "as it is", "flex", "rows to", "PEFT", "kept")  # where they are named


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chats")
    parser.add_argument("tokenizer")
    parser.add_argument("--shapes", default="135m,0.5b,lora-0.6b,1.5b")
    parser.add_argument("--out", default="train_speed.jsonl")
    parser.add_argument("--step-tokens", type=int, default=65_536)
    parser.add_argument("--seconds", type=float, default=8.0, help="that are counted of a variant")
    parser.add_argument("--variants", default="", help="words between semicolons, of which shape, name and a full stop hold one")
    parser.add_argument("--profile", action="store_true", help="write what two more steps spent their time on")
    parser.add_argument("--losses", action="store_true", help="compare the losses with TRL's plain path instead")
    parser.add_argument("--tiny", action="store_true", help="few tokens a step, for a CPU")
    arguments = parser.parse_args()
    chat = load_chat(resolve_model(arguments.tokenizer))
    rows = prepare(read_examples(arguments.chats), chat, TrainConfig(validation=0), context=8192).train
    card, peak = (torch.cuda.get_device_name(), measured_peak("cuda")) if DEVICE == "cuda" else ("CPU", 1e12)
    mean = sum(len(row.ids) for row in rows) / len(rows)
    longest = max(len(row.ids) for row in rows)
    print(f"{card}, {peak / 1e12:.0f} TFLOP/s in a matrix product; {len(rows):,} rows, {mean:.0f} tokens on average, {longest:,} at most",
          flush=True)  # fmt: skip
    large = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory > 100e9
    if "flex" in arguments.variants:
        check_blocks()
    table, begun = [], time.perf_counter()
    for shape in arguments.shapes.split(","):
        variants = variants_of(shape, step_tokens=512 if arguments.tiny else arguments.step_tokens, large=large)
        if arguments.losses:
            updates, size = (6, 4) if arguments.tiny else (60, 32)
            variants = [
                (name, lambda s, r, c, _, u=updates, n=size, w=wide: losses_beside_trl(s, r, c, updates=u, size=n, wide=w))
                for name, wide in (("losses beside TRL", False), ("losses beside TRL, fp32 stream", True))
            ]
        for name, measure in variants:
            wanted = arguments.variants.split(";") if arguments.variants else []
            if not any(word in f"{shape} {name}." for word in wanted) if wanted else any(word in name for word in EXTRA):
                continue
            gc.collect()
            torch._dynamo.reset()  # code is compiled for each, as in a process of its own
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            table_at = Path(f"{arguments.out}.{shape}.{name.replace(' ', '-')}.txt") if arguments.profile and "sftkit" in name else None
            clock = Clock(skip=3 if "sftkit" not in name else 4, seconds=arguments.seconds, profile=table_at)
            start = time.perf_counter()
            try:
                found = measure(shape, rows, chat, clock)
            except torch.OutOfMemoryError:
                found = {"error": "out of memory"}
            except Exception as error:  # noqa: BLE001  one variant's fault is told, and the others are still measured
                found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            found |= {
                "shape": shape, "variant": name, "card": card, "peak_tflops": round(peak / 1e12),
                "seconds": round(time.perf_counter() - start, 1),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE == "cuda" else 0.0,
            }  # fmt: skip
            if "tokens_per_second" in found:
                found["mfu"] = round(found["tokens_per_second"] * found.get("flops", 0) / peak, 3)
            table.append(found)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(found) + "\n")
            print(line_of(found), flush=True)
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    print("\n".join(line_of(found) for found in table))


def line_of(found: dict[str, Any]) -> str:
    """Write a result as a line of the table."""
    if "error" in found:
        told = found["error"]
    elif "updates" in found:
        told = (f"{found['updates']} updates: {found['sftkit at the end']:.4f} and {found['TRL at the end']:.4f} in the last quarter,"
                f" {found['off_at_the_end']:+.2%} (first {found['first']:+.3%}, at most {found['most_off']:+.2%})")  # fmt: skip
    else:
        told = f"{found['tokens_per_second']:10,.0f} tok/s  {found['memory_gb']:6.1f} GB  MFU {found['mfu']:.0%}"
    return f"{found['shape']:10} {found['variant']:36} {told}  ({found['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
