"""Recorded passes, on a stand-in for CUDA's graphs: what is recorded reads the next inputs, adds to the same gradients, and is dropped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.files import read_json_lines
from sftkit.core.models import load_model, resolve_model
from sftkit.train.config import TrainConfig
from sftkit.train.recorded import Recorded
from sftkit.train.sharded import sharing
from sftkit.train.trainer import Trainer, make_trainer, unwrapped
from sftkit.train.watch import Watch

from .test_trainer import row


class Graphs:
    """Stands in for torch.cuda: what is computed while it records leaves nothing but the places it computes in, and is computed at a replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recordings = self.replays = 0
        self.error: BaseException | None = None  # while recording
        self.recorded: Any = None
        self.learned: Any = list  # returns weights that an optimizer changes
        self.on = stream()
        self.underway: list[Any] = []  # pools that memory is taken from
        self.pools: list[Any] = []  # that hold memory
        self.draws = SimpleNamespace(clone_state=lambda: "clean", graphsafe_set_state=lambda state: setattr(self, "generator", state))
        self.generator = "clean"
        for name, stand_in in {
            "Stream": stream, "current_stream": lambda: self.on, "stream": self.onto, "empty_cache": lambda: None,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay, pool=self.pool), "graph": self.record, "graph_pool_handle": object,
            "current_device": lambda: 0, "default_generators": [self.draws],
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.underway.remove(pool))
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.pools.remove(pool))

    @contextmanager
    def onto(self, stream: Any) -> Iterator[None]:
        before, self.on = self.on, stream
        try:
            yield
        finally:
            self.on = before

    def pool(self) -> None:
        if self.underway:
            raise RuntimeError("not recorded")

    @contextmanager
    def record(self, _graph: Any, pool: Any, stream: Any, **_: Any) -> Iterator[None]:
        before, self.on = self.on, stream
        places = [(each, each.grad, each.grad.clone()) for each in self.recorded._parameters if each.grad is not None]
        had = [(each, each.grad) for each in self.learned()]
        self.underway.append(pool)
        self.pools.append(pool)
        self.generator = "recording"
        yield
        assert all(each.grad is grad for each, grad in had), "a replay adds to a gradient that no one sees"
        self.recordings += 1
        for parameter, place, value in places:
            assert parameter.grad is place, "a gradient has moved"
            place.copy_(value)
        if self.error:  # which leaves all as it is
            at_the_end = RuntimeError("the capture is not valid")
            at_the_end.__context__ = self.error
            raise at_the_end
        self.underway.remove(pool)
        self.generator, self.on = "clean", before
        self.recorded._loss.fill_(float("nan"))

    def replay(self) -> None:
        self.replays += 1
        self.recorded._loss.copy_(self.recorded._step(self.recorded._inputs, self.recorded._count))


def stream() -> Any:
    return SimpleNamespace(wait_stream=lambda other: None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(monkeypatch)


def recorded(graphs: Graphs, weight: torch.nn.Parameter) -> Recorded:
    def step(inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        loss = (weight * inputs["x"]).sum() / count
        loss.backward()
        return loss.detach()

    graphs.recorded = Recorded(step, [weight, torch.nn.Parameter(torch.zeros(1))])  # the second one is not used
    return graphs.recorded


def test_gradients_are_those_of_the_inputs_of_each_call(graphs: Graphs) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    passes = recorded(graphs, weight)
    for update in range(5):
        wanted = torch.zeros(3)
        for part in range(2):
            x, count = torch.randn(3), torch.tensor(2.0 + update)
            wanted += x / count
            loss = passes({"x": x, "num_tokens": part}, count)
            torch.testing.assert_close(loss, x.sum() / count)
        torch.testing.assert_close(weight.grad, wanted)
        weight.grad = None  # as zero_grad does
        assert (graphs.recordings, graphs.replays) == [(0, 0), (1, 2), (1, 4), (1, 4), (2, 6)][update]
        if update == 2:
            passes.drop()


def test_what_cannot_be_recorded_goes_on_as_it_is(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    passes, graphs.error = recorded(graphs, weight), ValueError("it waits for the device")
    for _ in range(4):
        weight.grad = None
        passes({"x": torch.ones(3)}, torch.tensor(1.0))
        passes({"x": torch.ones(3)}, torch.tensor(1.0))
        torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))
    assert graphs.recordings == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "it waits for the device" in caplog.text


def test_a_recording_that_fails_leaves_nothing_behind(graphs: Graphs) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    passes, ours, graphs.error = recorded(graphs, weight), graphs.on, ValueError("it waits for the device")
    for _ in range(2):
        weight.grad = None
        passes({"x": torch.ones(3)}, torch.tensor(1.0))
    assert graphs.recordings == 1
    assert graphs.on is ours
    assert (graphs.underway, graphs.pools, graphs.generator) == ([], [], "clean")


def test_ctrl_c_while_recording_is_not_taken_for_what_cannot_be_recorded(graphs: Graphs) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    passes, graphs.error = recorded(graphs, weight), KeyboardInterrupt()
    passes({"x": torch.ones(3)}, torch.tensor(1.0))
    weight.grad = None
    with pytest.raises(KeyboardInterrupt):
        passes({"x": torch.ones(3)}, torch.tensor(1.0))


def test_weights_that_learn_later_than_in_the_first_pass_are_not_recorded(graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]

    def step(inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        loss = sum((weight * inputs["x"]).sum() for weight in weights[: 1 if passes == 0 else 2]) / count
        loss.backward()
        return loss.detach()

    graphs.recorded = Recorded(step, weights)
    for passes in range(6):
        graphs.recorded({"x": torch.ones(3)}, torch.tensor(1.0))
        if passes % 2:
            torch.testing.assert_close(weights[1].grad, torch.full((3,), 1.0 if passes == 1 else 2.0))
            for weight in weights:
                weight.grad = None
    assert (graphs.recordings, graphs.replays) == (1, 0)
    assert "weights without a gradient in the first pass" in caplog.text


def test_memory_that_runs_out_while_recording_is_told_as_anywhere(graphs: Graphs) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    passes, graphs.error = recorded(graphs, weight), torch.OutOfMemoryError("no room")
    passes({"x": torch.ones(3)}, torch.tensor(1.0))
    weight.grad = None
    with pytest.raises(torch.OutOfMemoryError):
        passes({"x": torch.ones(3)}, torch.tensor(1.0))


@pytest.mark.parametrize(("lora", "shards"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_run_from_recordings_learns_what_a_run_learns(
    tiny_model: Path,
    tmp_path: Path,
    graphs: Graphs,
    lora: bool,
    shards: bool,
    half: torch.dtype | None,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sftkit.train.adapters import adapter_config

    rows, ref = [row(20 + place % 30, place) for place in range(96)], resolve_model(str(tiny_model))
    config = TrainConfig(batch_size=16, batch_tokens=256, eval_steps=3, logging_steps=1, warmup=0.0, lora=lora, learning_rate=1e-2)

    def kept(*told: Any) -> Recorded:
        graphs.recorded = Recorded(*told)
        return graphs.recorded

    monkeypatch.setattr("sftkit.train.trainer.Recorded", kept)
    found = []
    for records in (False, True):
        torch.manual_seed(0)
        chat, place = load_chat(ref), tmp_path / str(records)
        watch = Watch(place / "metrics.jsonl", chat, save_minutes=1e9)
        trainer = make_trainer(
            load_model(ref, dtype="float32"), chat, rows[:80], rows[80:], config, checkpoints=place, device="cpu", half=half,
            batch_tokens=256, watch=watch, peft_config=adapter_config(config) if lora else None, kind=sharing(Trainer) if shards else Trainer,
        )  # fmt: skip
        assert trainer.records is False  # on a CPU
        shape = tuple(map(max, zip(trainer.packs.largest_shape(), trainer.validation.largest_shape(), strict=True)))
        trainer.packs.pad_to(shape)  # type: ignore[arg-type]  # as packs that code is compiled for
        trainer.records = records
        graphs.learned = trainer.learned
        trainer.train()
        watch.close()
        lines = read_json_lines(place / "metrics.jsonl")
        told = ("step", "loss", "grad_norm", "eval_loss", "num_tokens")
        found.append([{name: line[name] for name in told if name in line} for line in lines])
        unwrapped(trainer)
    assert found[0] == found[1]
    assert trainer.packs.parts > 1
    assert graphs.replays > graphs.recordings == 2  # before and after the evaluation on the way
