"""What vLLM is started with on a card that others use too, and which models are refused before that takes a minute."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sftkit.core import hardware
from sftkit.core.engines import vllm_engine
from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.transformers_engine import check_room
from sftkit.core.engines.vllm_engine import fit_memory
from sftkit.core.errors import UserError
from sftkit.core.models import ModelRef, load_model, resolve_model


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an nvidia-smi on the path that tells of a card: (free, total) MiB by its name."""

    def make(**cards: tuple[int, int]) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        lines = "\n".join(f'case "$*" in *--id={name[1:]}) echo "{free}, {total}";; esac' for name, (free, total) in cards.items())
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))
        monkeypatch.setattr(vllm_engine, "visible_gpus", lambda: [name[1:] for name in cards])

    return make


@pytest.fixture
def model(tiny_model: Path) -> ModelRef:
    return resolve_model(str(tiny_model))


def test_a_free_card_is_taken_as_asked(card: Callable[..., None], model: ModelRef) -> None:
    card(_0=(80_000, 81_920))
    assert hardware.gpu_memory("0") == (80_000 / 1024, 80.0)
    assert fit_memory(model, EngineConfig()) == EngineConfig()


def test_on_a_shared_card_less_is_taken_and_said(card: Callable[..., None], model: ModelRef, caplog: pytest.LogCaptureFixture) -> None:
    card(_0=(40_960, 81_920))
    with caplog.at_level(logging.INFO, logger="sftkit"):
        assert fit_memory(model, EngineConfig()).gpu_memory_utilization == 0.49
    assert "40.0 of the card's 80.0 GiB are free: vLLM takes 0.49 of it instead of 0.90" in caplog.text
    assert fit_memory(model, EngineConfig(gpu_memory_utilization=0.4)).gpu_memory_utilization == 0.4
    card(_0=(80_000, 81_920), _1=(20_480, 81_920))
    assert fit_memory(model, EngineConfig(tensor_parallel_size=2)).gpu_memory_utilization == 0.24  # the fuller one decides


def test_weights_that_do_not_fit_are_refused_with_what_is_missing(card: Callable[..., None], tmp_path: Path) -> None:
    card(_0=(10_240, 16_384), _1=(10_240, 16_384))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(14 * 2**30)  # no bytes on the disk
    large = ModelRef(name="org/large", path=tmp_path)
    with pytest.raises(
        UserError, match=r"org/large: its weights take 14.0 GiB, and 10.0 of the card's 16.0 GiB are free; .* 6.5 GiB are missing"
    ):
        fit_memory(large, EngineConfig())
    assert fit_memory(large, EngineConfig(tensor_parallel_size=2)).gpu_memory_utilization == 0.59


def test_a_full_card_is_refused_as_what_it_is(card: Callable[..., None], model: ModelRef) -> None:
    card(_0=(400, 81_920))
    with pytest.raises(UserError, match=r"0\.4 of the card's 80\.0 GiB are free, too few for vLLM to start on it"):
        fit_memory(model, EngineConfig())


def test_without_a_card_nothing_is_known(model: ModelRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_engine, "visible_gpus", lambda: ["0"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert hardware.gpu_memory("0") is None
    assert fit_memory(model, EngineConfig()) == EngineConfig()


def test_transformers_refuses_weights_that_the_card_cannot_hold(model: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(model, dtype="float32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    check_room(loaded, "cuda", "tiny")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**31))
    check_room(loaded, "cpu", "tiny")
    with pytest.raises(UserError, match=r"tiny: its weights take .* of the card's 2.0 GiB are free; .* are missing. Free the card, take"):
        check_room(loaded, "cuda:0", "tiny")


def test_how_busy_the_cards_are_is_asked_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    answer = f'if [ -e {asked} ]; then echo "[N/A]"; else echo 90; echo 70; fi'
    program.write_text(f'#!/bin/sh\n{answer}\necho "$*" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware, "SECONDS_BETWEEN_LOOKS", 0.01)
    with hardware.GpuBusy() as nothing:
        pass
    assert nothing.share is None
    busy = hardware.GpuBusy(["0", "1"])
    for _ in range(2):  # the second time it is known that they do not tell
        with busy:
            busy._thread.join(10 if busy._told else 0)
    assert busy.share == pytest.approx(0.8)
    assert "--id=0,1" in asked.read_text().splitlines()[0]
    assert len(asked.read_text().splitlines()) == 2
