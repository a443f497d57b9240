"""Two processes train as one: the same losses, the same model, an adapter too, and a run that goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train.config import PreferenceConfig, TrainConfig
from sftkit.train.sft import train
from sftkit.train.trainer import last_checkpoint

SETTINGS: dict[str, Any] = {
    "epochs": 2.0, "validation": 0.1, "dtype": "float32", "learning_rate": 1e-3, "logging_steps": 1, "stop_check": 0, "batch_size": 8,
}  # fmt: skip


def metrics(run: Path, name: str) -> list[float]:
    return [line[name] for line in map(json.loads, (run / "train" / "metrics.jsonl").read_text().splitlines()) if name in line]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_processes_train_as_one(lora: bool, tmp_path, tiny_model, chats) -> None:
    data = chats(61)  # the last update is not full
    runs = {}
    for gpus in (1, 2):
        settings = TrainConfig(**{**SETTINGS, "lora": lora, "gpus": gpus, "learning_rate": 1e-2 if lora else 1e-3})
        runs[gpus] = train(data, str(tiny_model), tmp_path / str(gpus), settings).run
    for name in ("loss", "eval_loss", "grad_norm"):
        assert metrics(runs[2], name) == pytest.approx(metrics(runs[1], name), abs=1e-5, rel=1e-5)
    assert metrics(runs[2], "num_tokens") == metrics(runs[1], "num_tokens")
    one, two = (load_model(resolve_model(run)).state_dict() for run in runs.values())
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3
    assert (runs[2] / "train" / "adapter" / "adapter_model.safetensors").exists() == lora
    assert not (runs[2] / "train" / "processes").exists()


@pytest.mark.slow
def test_killed_and_gone_on_the_losses_are_those_of_a_run_in_one_piece(tmp_path, tiny_model, chats) -> None:
    data = chats(150)
    whole = train(data, str(tiny_model), tmp_path / "whole", TrainConfig(**SETTINGS)).run
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({**SETTINGS, "gpus": 2, "save_minutes": 0.0005}))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sftkit", "train", "sft", data, "--model", tiny_model, "-o", run, "--config", settings]
    process = subprocess.Popen([str(each) for each in command], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while (last := last_checkpoint(run / "train" / "checkpoints")) is None or int(last.name.split("-")[1]) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = subprocess.run([str(each) for each in command], cwd="/", capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "going on from step" in finished.stderr
    assert metrics(run, "loss") == pytest.approx(metrics(whole, "loss"), abs=1e-5)


def test_what_a_process_raises_is_raised_here(tmp_path, tiny_model, chats) -> None:
    wild = {**SETTINGS, "gpus": 2, "learning_rate": 1e30, "max_grad_norm": 1e30, "warmup": 0.0}
    with pytest.raises(UserError, match=r"step \d+: (loss|grad_norm) is not a finite number any more"):
        train(chats(60), str(tiny_model), tmp_path / "run", TrainConfig(**wild))
    with pytest.raises(UserError, match="on one GPU"):
        train(chats(20), str(tiny_model), tmp_path / "pairs", PreferenceConfig(gpus=2))
