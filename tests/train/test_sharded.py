"""Shares of a model compute what the whole model computes, to the last bit, in 16 bits, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.files import read_json_lines
from sftkit.core.models import load_model, resolve_model
from sftkit.train.adapters import adapter_config
from sftkit.train.config import TrainConfig
from sftkit.train.sharded import sharing
from sftkit.train.trainer import Trainer, make_trainer, unwrapped
from sftkit.train.watch import Watch
from torch.distributed.tensor import DTensor

from .test_trainer import row


@pytest.mark.parametrize(("dtype", "lora"), [("float32", False), ("bfloat16", True), ("bfloat16", False)])
def test_shares_compute_what_the_whole_model_computes_in_16_bits(
    tiny_model: Path, tmp_path: Path, dtype: str, lora: bool, alone: None
) -> None:
    rows, ref = [row(20 + place % 30, place) for place in range(96)], resolve_model(str(tiny_model))
    config = TrainConfig(batch_size=16, logging_steps=1, warmup=0.0, lora=lora, learning_rate=1e-2)
    found: list[Any] = []
    for shares in (False, True):
        torch.manual_seed(0)
        chat, place = load_chat(ref), tmp_path / str(shares)
        watch = Watch(place / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            load_model(ref, dtype=dtype), chat, rows, [], config, checkpoints=place, device="cpu",
            half=torch.bfloat16 if lora or dtype == "float32" else None, batch_tokens=256, watch=watch, peft_config=adapter_config(config) if lora else None, kind=sharing(Trainer) if shares else Trainer,
        )  # fmt: skip
        trainer.train()
        watch.close()
        found.append([line["loss"] for line in read_json_lines(place / "metrics.jsonl") if "loss" in line])
    assert found[0] == found[1]
    shared = {name: isinstance(weight, DTensor) for name, weight in trainer.model.named_parameters()}
    assert any(shared.values())
    assert not any(each for name, each in shared.items() if "lora" in name or (dtype == "float32" and ("norm" in name or "bias" in name)))
    unwrapped(trainer)
