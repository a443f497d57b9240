"""A run in this process: the model that it begins with, and the trainer, from the last checkpoint to the end."""

import logging
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..core.chat import Chat
from ..core.hardware import half_precision, measured_peak
from ..core.models import ModelRef, load_model
from ..core.run import is_done
from .adapters import adapter_config
from .checkpoints import clear_after, last_checkpoint
from .collective import over_processes
from .config import PreferenceConfig, TrainConfig
from .data import TrainingData
from .disk import room_on_disk
from .plan import rated_flops
from .preference import PreferenceTrainer
from .sampling import Sampler
from .sharded import sharing
from .trainer import Trainer, make_trainer
from .watch import Watch

log = logging.getLogger(__name__)


def load_start(start: ModelRef, config: TrainConfig, own: Any, device: str) -> tuple[Any, Any]:
    """Return the model that training begins with, and the 16-bit format that its forward pass computes in (None: its weights')."""
    weights, half = formats(config, own, device)
    return (_load_quantised(start, half, device) if config.qlora else load_model(start, dtype=str(weights).removeprefix("torch."))), half


def run_trainer(
    room: Path, start: ModelRef, chat: Chat, data: TrainingData, config: TrainConfig, device: str, own: Any, tokens: int,
    deadline: float | None,
) -> Any:  # fmt: skip
    """Train in this process, from the last checkpoint if there is one; return the trainer."""
    model, half = load_start(start, config, own, device)
    watch = Watch(
        room / "metrics.jsonl", chat, save_minutes=config.save_minutes, peak=measured_peak(device),
        rated=0.0 if device == "cpu" else rated_flops(torch.cuda.get_device_name()), deadline=deadline,
    )  # fmt: skip
    told = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = told or str(room / "tensorboard")  # where transformers looks, once
    kind = PreferenceTrainer if isinstance(config, PreferenceConfig) else Trainer
    trainer = make_trainer(
        model, chat, data.train, data.validation, config, checkpoints=room / "checkpoints", device=device, half=half,
        batch_tokens=tokens, watch=watch, peft_config=adapter_config(config, model) if config.adapter else None,
        kind=sharing(kind) if config.gpus > 1 and config.parallel == "fsdp" else kind,
    )  # fmt: skip
    if not told:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    watch.rows_of = lambda step: [data.train[row].source for row in trainer.update(step - 1)]
    if config.samples and data.validation:
        trainer.add_callback(Sampler(room / "samples.jsonl", chat, data.validation, config.samples))
    checkpoint = last_checkpoint(room / "checkpoints")
    if checkpoint:
        log.info("going on from step %s", checkpoint.name.rpartition("-")[2])
    over_processes(0)  # all have looked
    if trainer.args.process_index == 0:
        clear_after(room / "checkpoints", checkpoint)
    try:
        with room_on_disk(room / "checkpoints"), redirect_stdout(sys.stderr):  # where trackers talk; results alone go to stdout
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        watch.close()
        trainer.drop_recording()
    if watch.late and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(
            f"The {config.max_hours:g} hours of max_hours are over at step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; a"
            " checkpoint is saved: the same command goes on from here."
        )
    stands = is_done(room / "checkpoints" / f"checkpoint-{trainer.state.global_step}")
    stopped, stands = map(bool, over_processes(watch.stopped, stands))
    if stopped and stands:
        raise KeyboardInterrupt
    trainer.asked_to_stop = stopped  # after the last step, which is in no checkpoint: the model is saved first
    return trainer


def formats(config: TrainConfig, own: Any, device: str) -> tuple[Any, Any]:
    """Return the number format of the weights, and the 16-bit one that the forward pass computes in (None: that of the weights).

    Weights that are trained are float32 unless bfloat16 is asked for, whose 8 bits keep small steps on average alone (train.rounding).
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype), None
    return own if config.adapter else torch.float32, half_precision(device)


def _load_quantised(ref: ModelRef, half: Any, device: str) -> Any:
    name, arguments = ref.pretrained()
    kind = half or torch.float32
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind)
    place = {"": "cpu" if device == "cpu" else torch.cuda.current_device()}
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=packed, device_map=place, dtype=kind, **arguments)
