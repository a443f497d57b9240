"""One process of a training that `two_gpus.py` measures: it does the tasks of an order, one after another.

python benchmarks/training_process.py ORDER     by itself, or started twice by torchrun
"""

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from sftkit.core.chat import Chat, load_chat
from sftkit.core.files import read_json_lines
from sftkit.core.formats import read_examples
from sftkit.core.models import resolve_model
from sftkit.train.account import prepare
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from train_speed import build
from transformers import TrainerCallback

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SKIPPED = 4  # steps
FILLED = 0.95  # of the passes: the rows of a step differ, and one too long for two passes would be done in three smaller ones


class Clock(TrainerCallback):  # type: ignore[misc]
    """Takes the time, once the device is done, after the first steps and after the last; between them nothing waits for it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (SKIPPED, state.max_steps):
            if GPU:
                torch.cuda.synchronize()
                if not self.times:
                    torch.cuda.reset_peak_memory_stats()  # here the model began on the card, whole; in a real run on the CPU
            self.times.append(time.perf_counter())


def rows_of(chats: str, chat: Chat) -> list[Row]:
    return prepare(read_examples(chats), chat, TrainConfig(validation=0), context=8192).train


def trained(rows: list[Row], chat: Chat, task: dict[str, Any], parallel: str) -> dict[str, Any]:
    """Train in this process; return rates, peak memory, losses."""
    from sftkit.train.adapters import adapter_config
    from sftkit.train.sharded import sharing
    from sftkit.train.trainer import Trainer, make_trainer
    from sftkit.train.watch import Watch

    gpus, lora, shape = task["gpus"], task["lora"], task["shape"]
    mean = sum(len(row) for row in rows) / len(rows)
    size = round(FILLED * task["step_tokens"] * (gpus if task["weak"] else 1) / mean)  # weak: as many tokens for each process as for one
    chosen = rows[: size * task["steps"]]
    config = TrainConfig(
        batch_size=size, validation=0, logging_steps=1 if task["losses"] else 1000, lora=lora, warmup=0.0, gpus=gpus,
        compile=task["compile"], parallel=parallel,
    )  # fmt: skip
    half = torch.bfloat16 if task["half"] and GPU else None
    model = build(shape, torch.bfloat16 if lora and half else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        watch, clock = Watch(metrics, chat, save_minutes=1e9), Clock()
        trainer = make_trainer(
            model, chat, chosen, [], config, checkpoints=Path(folder), device=DEVICE, half=half, batch_tokens=task["batch_tokens"],
            watch=watch, peft_config=adapter_config(config) if lora else None, kind=sharing(Trainer) if parallel == "fsdp" else Trainer,
        )  # fmt: skip
        trainer.add_callback(clock)
        parts = trainer.packs.parts
        sizes = [sum(len(chosen[row]) for row in pack) for pack in trainer.packs.rows()]
        tokens = [sum(sizes[start : start + parts]) for start in range(0, len(sizes), parts)]
        if GPU:
            torch.cuda.empty_cache()
        trainer.train()
        watch.close()
        losses = [line["loss"] for line in read_json_lines(metrics) if "loss" in line] if int(os.environ.get("RANK", 0)) == 0 else []
    found = {"rate": sum(tokens[SKIPPED:]) / (clock.times[1] - clock.times[0]), "losses": losses, "parts": parts, "tokens": tokens[0]}
    return found | {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if GPU else 0.0}


def work(order: Path) -> None:
    """Do all tasks of an order in this process, and write what came out."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    told = json.loads(order.read_text())
    rank = int(os.environ.get("RANK", 0))
    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if GPU else "gloo")
    chat = load_chat(resolve_model(told["tokenizer"]))
    rows = rows_of(told["chats"], chat)
    with open(told["out"], "a", encoding="utf-8") as file:
        for task in told["tasks"]:
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            try:
                found = trained(rows, chat, task, task["way"] if task["way"] != "one" else "ddp")
            except Exception as error:  # noqa: BLE001  what one task died of is told, and the others are still measured
                found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                traceback.print_exc()
            if rank == 0:
                line = json.dumps({**task, **found, "seconds": round(time.perf_counter() - began, 1)})
                print(line, flush=True)  # where the stage is cut off, this is what is known of it
                file.write(line + "\n")
                file.flush()
            if "error" in found and task["gpus"] > 1:  # the other process may be waiting for this one
                os._exit(1)
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
