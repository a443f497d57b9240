"""What a run will take, by the pace of a short one: engines on a clock of their own, whose times are known."""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Request
from sftkit.curate import distill as distill_module
from sftkit.curate import estimate as estimate_module
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill
from sftkit.curate.estimate import Estimate, estimate
from sftkit.curate.pace import Pace, count_steps, fit

PER_STEP, PER_TOKEN = 0.02, 1e-4  # seconds


class Clock:
    """The seconds of a simulation."""

    now = 0.0


class Slots:
    """An engine with so many slots, with a queue of as many before it; its first engine compiles, later ones find that on the disk."""

    identity, chat, context_length, steps = "vllm:slots", None, None, 0

    def __init__(self, clock: Clock, slots: int, length: Callable[[Request], int], cold: float) -> None:
        self._clock, self._slots, self._length, self._cold = clock, slots, length, cold

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source, queue, running = iter(requests), list[Request](), list[list[Any]]()
        while True:
            queue += islice(source, 2 * self._slots - len(queue) - len(running))
            while queue and len(running) < self._slots:
                request = queue.pop(0)
                running.append([self._length(request), request])
            if not running:
                return
            if len(running) > 50:  # a batch larger than the probe
                self._clock.now, self._cold = self._clock.now + self._cold, 0.0
            self._clock.now += PER_STEP + PER_TOKEN * len(running)
            for each in running:
                each[0] -= 1
            ended = [request for left, request in running if not left]
            running = [each for each in running if each[0]]
            for request in ended:
                yield Completion(key=request.key, text="yes", num_tokens=self._length(request))

    def close(self) -> None:
        pass


def equal(request: Request) -> int:
    return 128


def unlike(request: Request) -> int:
    return random.Random(request.seed).randint(20, 236)


def mostly_short(request: Request) -> int:
    return 256 if request.seed % 8 == 0 else 40


def cut(request: Request) -> int:
    return min(200, 1 + int(random.Random(request.seed).expovariate(1 / 120)))


@pytest.fixture
def dry_and_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Estimate, float]]:
    """Return what a dry run says, and the seconds that the run after it takes, in a process of its own."""

    def make(slots: int, length: Callable[[Request], int], prompts: int, k: int, colds: tuple[float, float]) -> tuple[Estimate, float]:
        clock = Clock()
        later = iter(colds)
        monkeypatch.setattr(distill_module, "open_engine", lambda *_, **__: Slots(clock, slots, length, next(later)))
        monkeypatch.setattr(estimate_module, "choose", lambda config: "vllm")
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(prompts)))
        engine = {"engine": "openai", "base_url": "http://localhost:1/v1"}
        config = load_config(DistillConfig, {"teacher": "m", "k": k, "engine": engine})
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda: clock.now)
            dry = estimate(path, tmp_path / "run", config)
            return dry, distill(path, tmp_path / "run", config).seconds

    return make


@pytest.mark.parametrize(
    ("slots", "length", "prompts", "k"),
    [
        (128, equal, 600, 2),  # five waves before and five after, of which the last ones are not whole
        (128, unlike, 1300, 1),
        (128, mostly_short, 400, 4),
        (96, cut, 1600, 1),
        (32, equal, 2000, 1),
    ],
)
def test_a_dry_run_says_what_a_run_takes_whose_engine_finds_its_kernels_compiled(
    slots: int, length: Callable[[Request], int], prompts: int, k: int, dry_and_real: Callable[..., tuple[Estimate, float]]
) -> None:
    """Of the 3 s and more that the first full batch took, the run pays a little: counted whole, they were up to a third of it."""
    dry, seconds = dry_and_real(slots, length, prompts, k, (4.0, 0.5))
    assert dry.full
    assert dry.seconds == pytest.approx(seconds, rel=0.15)
    assert dry.seconds_between is not None
    least, most = dry.seconds_between  # of an even pace, so that they are not far apart
    assert 0.99 * least <= seconds <= 1.01 * most
    assert dry.tokens_per_second == pytest.approx(slots / (PER_STEP + PER_TOKEN * slots), rel=0.1)


@pytest.mark.parametrize("cold", [0.0, 2.0])
def test_a_beginning_that_is_as_cold_again_is_within_what_is_said(cold: float, dry_and_real: Callable[..., tuple[Estimate, float]]) -> None:
    dry, seconds = dry_and_real(128, unlike, 1300, 1, (cold, cold))
    assert dry.seconds == pytest.approx(seconds, rel=0.15)
    assert dry.seconds_between is not None
    assert 0.98 * dry.seconds_between[0] <= seconds <= 1.02 * dry.seconds_between[1]


def test_a_run_too_short_to_tell_is_said_to_be_so(dry_and_real: Callable[..., tuple[Estimate, float]]) -> None:
    """All answers are one wave, so that nothing tells slow first steps from slow steps."""
    dry, seconds = dry_and_real(1024, equal, 1100, 1, (4.0, 0.5))
    assert dry.vague
    assert dry.seconds_between is not None
    assert dry.seconds_between[0] <= seconds <= dry.seconds_between[1]
    assert "that is not known within 15%: the run is too short" in dry.summary()
    assert ", between " in dry.summary()
    few, _ = dry_and_real(1024, equal, 1100 + 900, 1, (0.0, 0.0))  # 900 more in the same folder: no more than the probe
    assert not few.full
    assert few.seconds is not None
    assert few.seconds_between is not None
    assert few.seconds_between[0] < 0.2 * few.seconds < few.seconds_between[1]
    assert few.vague


def test_steps_are_counted_by_the_lengths_and_the_slots() -> None:
    steps, tokens = count_steps([3, 1, 2, 5], 2)  # the third begins after the second, the fourth with it and the first both over
    assert steps.tolist() == [1, 3, 3, 8]
    assert tokens.tolist() == [2, 6, 6, 11]
    steps, tokens = count_steps([4, 2], 8)
    assert (steps.tolist(), tokens.tolist()) == ([2, 4], [4, 6])


@pytest.mark.parametrize("slots", [1, 7, 64, 300])
@pytest.mark.parametrize("same", [True, False])
def test_slots_and_times_are_found_again(slots: int, same: bool) -> None:
    draw = random.Random(slots)
    lengths = [100 if same else draw.randint(1, 200) for _ in range(4 * slots + 90)]
    steps, tokens = count_steps(lengths, slots)
    found = fit(lengths, 2.5 + 0.02 * steps + 1e-4 * tokens, 2 * slots + 64)
    assert found.cold == pytest.approx(2.5, rel=0.1)
    assert found.rate == pytest.approx(slots / (0.02 + 1e-4 * slots), rel=0.02)
    if slots > 1:
        assert found.slots == pytest.approx(slots, rel=0.02)
    others = [100 if same else draw.randint(1, 200) for _ in range(10 * slots + 1)]
    steps, tokens = count_steps(others, slots)
    assert found.seconds(others) == pytest.approx(0.02 * steps[-1] + 1e-4 * tokens[-1], rel=0.05)


def test_an_engine_that_works_in_batches_has_a_rate_and_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    pace, draw = Pace(begin=0.0), random.Random(0)
    asked = [(str(number), draw.randint(1, 100)) for number in range(640)]
    for first in range(0, len(asked), 64):  # each batch takes as long as its longest answer
        for key, length in sorted(asked[first : first + 64], key=lambda each: each[1]):
            clock.now = first / 64 * 10 + length / 10
            pace(Completion(key=key, num_tokens=length), 63)
    mean = np.mean([length for _, length in asked])
    found = pace.forecast([key for key, _ in asked], [50] * 512, 0.5, in_batches=True)
    assert found.seconds == pytest.approx(100 * 512 * 50 / (640 * mean) + 0.5, rel=0.02)
    assert found.least == found.most == found.seconds
    assert found.unlike < 0.15
    assert pace.forecast([key for key, _ in asked[:100]], [50], 0.0, in_batches=True).unlike > 0
    at_once = Pace(begin=0.0, times=[8.0] * 200, tokens={str(number): number for number in range(200)}, passing=0)
    found = at_once.forecast([str(number) for number in range(200)], [100] * 398, 0.0, in_batches=False)
    assert found.seconds == pytest.approx(16)
    assert found.unlike == 0.15
