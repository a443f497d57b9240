"""Two processes train as one, each with the whole model or a share of it: the same losses and models, and runs that go on after a kill."""

import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train import processes
from sftkit.train.checkpoints import last_checkpoint
from sftkit.train.config import PreferenceConfig, TrainConfig
from sftkit.train.sft import train
from sftkit.train.watch import Watch

log = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {
    "epochs": 2.0, "validation": 0.1, "dtype": "float32", "learning_rate": 1e-3, "logging_steps": 1, "stop_check": 0, "batch_size": 8,
}  # fmt: skip


def metrics(run: Path, name: str) -> list[float]:
    return [line[name] for line in map(json.loads, (run / "train" / "metrics.jsonl").read_text().splitlines()) if name in line]


def pair(number: int) -> str:
    turns = {
        "prompt": f"Calculate {number}+{number}.",
        "chosen": f"The answer is {2 * number}.",
        "rejected": "I do not know." * (number % 4),
    }
    return json.dumps({**turns, "rejected": turns["rejected"] or "No."}) + "\n"


class Put(Exception):
    """A job was put down instead of done."""


def test_two_processes_train_as_one_in_every_way_and_one_goes_on_from_their_checkpoints(tmp_path, tiny_model, chats, monkeypatch) -> None:
    """All ways share one start of the processes: it takes longer than what is tested."""
    rows = chats(61)  # the last update is not full
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(map(pair, range(29))))
    ways = [*itertools.product((False,), (False, True), ("ddp", "fsdp")), (True, True, "ddp"), (True, False, "fsdp")]

    def train_(folder: Path, preferring: bool, lora: bool, **more: Any) -> Path:
        told = {**SETTINGS, "lora": lora, "learning_rate": 1e-2 if lora else 1e-3, **more}
        data, kind = (pairs, PreferenceConfig) if preferring else (rows, TrainConfig)
        return train(data, str(tiny_model), folder, kind(**told)).run

    def place(way: tuple[bool, bool, str]) -> Path:
        return tmp_path / "-".join(map(str, way))

    def run(way: tuple[bool, bool, str], do: Any) -> None:
        monkeypatch.setattr(processes, "train_on_processes", do)
        train_(place(way), way[0], way[1], gpus=2, parallel=way[2], save_minutes=1e-6)

    def put(job: processes.Job) -> None:
        (folder := job.room / "processes").mkdir()
        (folder / processes.JOB).write_bytes(pickle.dumps(job))
        raise Put

    def take(job: processes.Job) -> tuple[Any, bool]:
        return processes.outcome(job), False

    def diverge(do: Any) -> None:
        monkeypatch.setattr("sftkit.train.config.MOST_RATE", math.inf)
        monkeypatch.setattr(processes, "train_on_processes", do)
        train_(tmp_path / "wild", False, False, gpus=2, learning_rate=1e30, max_grad_norm=1e30, warmup=0.0)

    whole = {kind: train_(tmp_path / f"one-{kind}", *kind) for kind in {way[:2] for way in ways}}
    for way in ways:
        with pytest.raises(Put):
            run(way, put)
    with pytest.raises(Put):
        diverge(put)
    folders = [each / "train" / "processes" for each in (*map(place, ways), tmp_path / "wild")]  # the last one ends the processes
    assert not processes.run_together(2, folders)
    with pytest.raises(UserError, match=r"step \d+: (loss|grad_norm) is not a finite number any more"):
        diverge(take)
    for way in ways:
        preferring, lora, _ = way
        one, two = whole[way[:2]], place(way)
        for name in ("loss", "eval_loss", *(("rewards/accuracies", "eval_rewards/margins") if preferring else ())):
            assert metrics(two, name) == pytest.approx(metrics(one, name), abs=1e-5), (way, name)
        assert metrics(two, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-5), way
        assert metrics(two, "num_tokens") == metrics(one, "num_tokens")
        copy = tmp_path / f"{two.name}-gone-on"
        shutil.copytree(two, copy)
        run(way, take)
        # one process goes on from the last checkpoint but one of the two
        last = last_checkpoint(copy / "train" / "checkpoints")
        assert last is not None
        if lora:
            adapter = (two / "train" / "adapter" / "adapter_model.safetensors").stat().st_size
            assert (last / "adapter_model.safetensors").stat().st_size <= 2 * adapter
        shutil.rmtree(last)
        again = train_(copy, preferring, lora)
        assert metrics(again, "loss") == pytest.approx(metrics(one, "loss"), abs=1e-5), way
        first, *others = (load_model(resolve_model(each)).state_dict() for each in (one, two, again))
        for other in others:
            assert max(float((first[name] - other[name]).abs().max()) for name in first) < 1e-3, way
        assert (two / "train" / "adapter" / "adapter_model.safetensors").exists() == lora
        assert not (two / "train" / "processes").exists()


CHILD = """
import os, signal, subprocess, sys, time
folder, rank = sys.argv[1], os.environ["RANK"]
if len(sys.argv) > 2 and rank == "1":
    if sys.argv[2] == "ends well":
        sys.exit()
    sys.exit(3) if sys.argv[2] == "ends" else os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "is killed" else time.sleep(600)
signal.signal(signal.SIGTERM, lambda *_: open(f"{folder}/came-{rank}", "w"))
own = subprocess.Popen(["sleep", "600"])
open(f"{folder}/begun-{rank}", "w").write(str(own.pid))
os.rename(f"{folder}/begun-{rank}", f"{folder}/runs-{rank}")
while True:
    time.sleep(0.05)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, *told: object) -> None:
    """Let a program that waits for another, which would take seconds to begin, stand in the place of a process that trains."""
    start = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda _, **more: start([sys.executable, "-c", CHILD, *map(str, told)], **more))


def test_a_stop_goes_to_all_processes_and_a_second_one_kills_them_with_what_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes before the processes are there is not lost either."""

    def ask() -> None:
        for each in ("runs-0", "runs-1"):
            wait_for(tmp_path / each)
        os.kill(os.getpid(), signal.SIGINT)
        for each in ("came-0", "came-1"):
            wait_for(tmp_path / each)
        os.kill(os.getpid(), signal.SIGTERM)

    stand_in(monkeypatch, tmp_path)
    (asking := threading.Thread(target=ask)).start()
    assert processes.run_together(2, [])
    asking.join()
    for each in ("runs-0", "runs-1"):
        started = int((tmp_path / each).read_text())
        wait_for(lambda pid=started: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or Ends())
    assert processes.run_together(2, [])
    assert Ends.asked == 1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


class Ends:
    """A process that ends when it is asked to."""

    asked = 0
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        assert self.returncode == -signal.SIGTERM
        return self.returncode

    def terminate(self) -> None:
        Ends.asked += 1
        self.returncode = -signal.SIGTERM


@pytest.mark.parametrize(
    ("how", "known", "told"),
    [
        ("ends", "done", "as process 1 did, with exit code 3"),
        ("is killed", "stopped", "as process 1 did, by SIGKILL"),
        ("hangs while it ends", "memory", "as process 0 did, by SIGKILL"),
        ("ends well", "done", "as process 0 did, by SIGKILL"),  # which hangs after all was done
    ],
)
def test_where_one_process_is_gone_the_others_do_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, known: str, told: str
) -> None:
    """They would for an hour, at the next number on which all have to agree."""
    monkeypatch.setattr(processes, "GRACE", 0.2)
    monkeypatch.setattr(processes, "LEAVING", 0.2)
    stand_in(monkeypatch, tmp_path, how)
    (before := tmp_path / "before").mkdir()
    (before / processes.STATUS).write_text(json.dumps({"ended": known}))
    assert not processes.run_together(2, [before, tmp_path])
    assert json.loads((tmp_path / processes.STATUS).read_text()) == {"ended": told}
    assert json.loads((before / processes.STATUS).read_text()) == {"ended": known}


def test_processes_whose_parent_was_killed_stop_by_themselves_and_end_where_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was killed before they knew of it."""
    did: list[object] = []
    monkeypatch.setattr("os.getppid", lambda: 7 if len(did) < 2 else 1)
    monkeypatch.setattr("time.sleep", did.append)
    monkeypatch.setattr("os.kill", lambda *told: did.append(told))
    monkeypatch.setattr("os._exit", did.append)
    processes._stop_with(7)
    assert did == [0.5, 0.5, (os.getpid(), signal.SIGTERM), processes.ORPHANED, 1]


def wait_for(what: Path | Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not (what.exists() if isinstance(what, Path) else what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_asked_to_stop_after_the_last_step_the_parent_saves_the_model_and_stops(tmp_path, tiny_model, chats, monkeypatch, caplog) -> None:
    rows, start = chats(30), resolve_model(tiny_model)

    def train_(asked: bool) -> Any:
        monkeypatch.setattr(processes, "train_on_processes", lambda job: (load_model(start), asked))
        monkeypatch.setattr("sftkit.train.sft._results", lambda *_: pytest.fail("went on") if asked else {"validation": None})
        return train(rows, str(tiny_model), tmp_path / "run", TrainConfig(**SETTINGS, gpus=2))

    with pytest.raises(KeyboardInterrupt):
        train_(asked=True)
    assert (tmp_path / "run" / "train" / "saved.json").exists()
    job = processes.Job(room=tmp_path, start=start, data=None, config=TrainConfig(gpus=2), device="cpu", own=None, tokens=1, deadline=None)
    (tmp_path / "processes").mkdir()
    for said, error in (({}, UserError), ({"ended": "memory", "said": ""}, torch.OutOfMemoryError)):
        if said:
            (tmp_path / "processes" / processes.STATUS).write_text(json.dumps(said))
        with pytest.raises(error):
            processes.outcome(job)
        with pytest.raises(KeyboardInterrupt):  # memory, too: who has asked wants no second try
            processes.outcome(job, asked=True)


def test_of_processes_that_end_together_the_one_with_the_reason_is_heard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where memory runs out on one, the others lose their connection to it: a traceback of theirs told of a network."""
    job = processes.Job(room=tmp_path, start=None, data=None, config=TrainConfig(gpus=2), device="cpu", own=None, tokens=1, deadline=None)

    def end(rank: int, error: Exception) -> None:
        def run_trainer(*_: Any) -> None:
            raise error

        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        monkeypatch.setattr("sftkit.train.local.run_trainer", run_trainer)
        monkeypatch.setattr(processes, "load_chat", lambda _: None)
        processes._do(job, tmp_path)

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("os._exit", sys.exit)  # at once, as the end may wait for the others
    lost = RuntimeError("Connection closed by peer")
    for error in (lost, ValueError("a fault of ours")):  # nothing else says why
        with pytest.raises(SystemExit):
            end(0, error)
        assert f"{type(error).__name__}: {error}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        end(1, torch.OutOfMemoryError("no room"))
    with pytest.raises(SystemExit):
        end(0, lost)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / processes.STATUS).read_text()) == {"ended": "memory", "said": "no room"}


def test_a_stop_that_comes_while_the_others_are_waited_for_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(tmp_path / "metrics.jsonl", None, save_minutes=1e9)
    state = SimpleNamespace(global_step=3, max_steps=9)
    ends = []
    for late in (True, False):  # for this step
        told: list[Any] = []

        def wait(*numbers: float, late: bool = late, told: list[Any] = told) -> tuple[float, ...]:
            if late and not told:
                watch._stop(signal.SIGTERM, None)
            told.append(numbers)
            return numbers

        monkeypatch.setattr("sftkit.train.watch.over_processes", wait)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        watch.on_step_end(None, state, control)
        assert control.should_save == control.should_training_stop
        ends.append(control.should_training_stop)
    assert ends == [False, True]  # all processes have to stop at the same step: at the next one, of which they are told


@pytest.mark.slow
def test_killed_and_gone_on_the_losses_are_those_of_a_run_in_one_piece(tmp_path, tiny_model, chats, capfd) -> None:
    data = chats(150)
    whole = train(data, str(tiny_model), tmp_path / "whole", TrainConfig(**SETTINGS)).run
    settings = TrainConfig(**{**SETTINGS, "gpus": 2, "parallel": "fsdp", "save_minutes": 0.0005})
    run = tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sftkit.train.sft", "sftkit.train.trainer"])  # imported once
    seed = random.SystemRandom().randrange(10**6)
    log.warning("seed %d", seed)  # shown where the test fails
    drawn = random.Random(seed)
    for kill, first, last, code in ((kill_parent, 1, 6, -signal.SIGKILL), (kill_one, 10, 16, 1), (kill_all, 20, 26, -signal.SIGKILL)):
        step = drawn.randint(first, last)
        process = context.Process(target=train, args=(data, str(tiny_model), run, settings))
        process.start()
        deadline = time.monotonic() + 200
        while (saved := last_checkpoint(run / "train" / "checkpoints")) is None or int(saved.name.split("-")[1]) < step:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        others = psutil.Process(process.pid).children(recursive=True)
        assert len(others) >= 2
        kill(process.pid, others)
        process.join()
        assert process.exitcode == code
    assert "training on 2 processes ended as process 1 did, by SIGKILL" in capfd.readouterr().err
    train(data, str(tiny_model), run, TrainConfig(**SETTINGS))  # to the end on one: it starts sooner
    assert metrics(run, "loss") == pytest.approx(metrics(whole, "loss"), abs=1e-5)
    assert metrics(run, "eval_loss") == pytest.approx(metrics(whole, "eval_loss"), abs=1e-5)


def kill_parent(parent: int, others: list[psutil.Process]) -> None:
    """As kill -9 of the command does: its processes still write a checkpoint, which the next call waits for."""
    os.kill(parent, signal.SIGKILL)


def kill_one(parent: int, others: list[psutil.Process]) -> None:
    """As the kernel does when memory runs out: the command ends with an error, of itself."""
    (one,) = [each for each in others if each.environ().get("RANK") == "1"]
    one.kill()


def kill_all(parent: int, others: list[psutil.Process]) -> None:
    """As a cluster does, or a container that is out of memory: all at one instant, in the middle of a step or of a checkpoint."""
    for each in (together := [psutil.Process(parent), *others]):
        each.suspend()
    for each in together:
        each.kill()
    assert not psutil.wait_procs(others, timeout=30)[1]
