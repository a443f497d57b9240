"""What a dry run says of a server: the rate of all its slots from a few answers, and no more asked where that may cost money."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Request
from sftkit.curate import distill as distill_module
from sftkit.curate import estimate as estimate_module
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill
from sftkit.curate.estimate import Flow, estimate

from .teachers import prompts


class Served:
    """An engine that renders for itself, as a server does."""

    identity, chat, context_length, steps = "openai:m", None, None, 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            yield Completion(key=request.key, text="yes", num_tokens=2)

    def close(self) -> None:
        pass


def test_the_rate_of_a_server_is_reckoned_for_all_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few answers fewer and fewer are under way, so that their tokens through the seconds would say too little."""
    clock = [0.0]
    monkeypatch.setattr(estimate_module.time, "monotonic", lambda: clock[0])
    few, many = Flow(slots=4), Flow(slots=2)
    for seconds, under_way in [(1, 2), (2, 1), (3, 0)]:  # three at once
        clock[0] = float(seconds)
        assert few(Completion(key="k", num_tokens=10), under_way) is False
    assert few.rate == pytest.approx(4 * 30 / (3 + 2 + 1))
    many.last = 3.0
    for seconds, under_way in [(4, 2), (4, 1), (5, 0)]:  # three, of which the third had to wait
        clock[0] = float(seconds)
        many(Completion(key="k", num_tokens=10), under_way)
    assert many.rate == pytest.approx(2 * 30 / (2 + 0 + 1))
    assert Flow(slots=4).rate is None


def test_the_pace_is_that_of_an_engine_which_has_all_the_work_that_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = estimate_module.Pace()  # long answers come last: the first ones that come are not the pace
    clock = [0.0]
    monkeypatch.setattr(estimate_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(estimate_module, "SECONDS_OF_PACE", 5.0)
    for seconds, tokens, enough in [
        (1, 1, False),
        (2, 1, False),
        (3, 10, False),
        (4, 10, False),
        (7, 10, False),
        (8, 10, True),
        (9, 3, True),
    ]:
        clock[0] = float(seconds)
        assert pace(Completion(key="k", num_tokens=tokens), 2) is enough
    assert pace.rate == pytest.approx(30 / 5)

    pace = estimate_module.Pace()  # one at a time: no answer is let go by, and there is no beginning to count from
    for number in range(4):
        clock[0] = 70.0 + number
        pace(Completion(key="k", num_tokens=6), 0)
    assert pace.rate is None
    clock[0] = 75.0
    pace(Completion(key="k", num_tokens=6), 0)
    assert pace.rate == pytest.approx(4 * 6 / 5)


def test_what_the_beginning_and_the_end_take_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(estimate_module.time, "monotonic", lambda: clock[0])

    def generate(first: list[Any], label: str, enough: Any) -> tuple[int, int, float]:
        """Give waves of 100 answers of 6 tokens: the first after 9 s, the others after 2 s each; 200 are under way at a time."""
        for number in range(len(first)):
            clock[0] = 9.0 + 2 * (number // 100)
            enough(Completion(key="k", num_tokens=6), 200)
        clock[0] += 1  # until what was stored last is on disk
        return len(first), 6 * len(first), clock[0]

    missing: list[Any] = [SimpleNamespace(key=str(number), row=(str(number // 2), number % 2)) for number in range(2000)]
    work: Any = SimpleNamespace(store=SimpleNamespace(keys=set), teacher=SimpleNamespace(engine=object()), generate=generate)
    monkeypatch.setattr(estimate_module, "SECONDS_OF_PACE", 6.0)
    rate, made, besides = estimate_module._pace(work, missing)
    assert (rate, made) == (pytest.approx(300), 1000)  # 100 answers of 6 tokens in 2 s
    assert besides == pytest.approx(28 - 1000 * 6 / 300)  # so the other 1000 are said to take 28 s, as these did
    monkeypatch.setattr(estimate_module, "SECONDS_OF_PACE", 100.0)  # they are over before the pace is known
    assert estimate_module._pace(work, missing) == (pytest.approx(6000 / 28), 1000, pytest.approx(0))


def test_a_server_with_a_key_is_asked_no_more_than_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Served())
    monkeypatch.setattr(estimate_module, "SECONDS_OF_PACE", 1e-9)
    monkeypatch.setattr(estimate_module, "FEWEST_FOR_PACE", 50)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(200)))
    engine = {"engine": "openai", "base_url": "http://localhost:1/v1,http://localhost:2/v1", "concurrency": 8}
    config = load_config(DistillConfig, {"teacher": "m", "engine": engine})
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key")
    found = estimate(path, tmp_path / "with", config)
    assert (found.probed, found.full, found.slots) == (50, False, 16)
    assert "of 16 requests at once, if each is answered as fast as the probe's were" in found.summary()
    monkeypatch.delenv("OPENAI_API_KEY")
    found = estimate(path, tmp_path / "without", config)
    assert found.probed > 50
    assert (found.full, found.slots) == (True, None)


def test_answers_that_are_unlike_in_length_are_looked_at_in_greater_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlike(Served):
        """An eighth of the answers is fifty times as long: 50 of them do not tell the mean."""

        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for request in requests:
                number = int(str(request.messages[-1]["content"]).split()[-1].strip("?"))
                yield Completion(key=request.key, text="yes", num_tokens=100 if random.Random(number).random() < 1 / 8 else 2)

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Unlike())
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(600)))
    config = load_config(DistillConfig, {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}})
    found = estimate(path, tmp_path / "run", config)
    assert (found.probed, found.measured, found.remaining) == (250, 250, 350)
    assert found.new_tokens == pytest.approx(350 * (100 + 7 * 2) / 8, rel=0.3)
    assert estimate(path, tmp_path / "run", config).probed == 50  # of 300 prompts: no more than the limit


def test_answers_that_are_cut_and_asked_again_are_told_of(tmp_path: Path, settings: Callable[..., DistillConfig]) -> None:
    path = prompts(tmp_path / "prompts.jsonl", 60)
    asked = {"k": 2, "max_new_tokens": 6, "stop": ["e", "o"]}
    config = settings(**asked, retry_truncated=True)
    first = estimate(path, tmp_path / "run", config)
    cut = first.probe.cut
    assert 0 < cut < first.probe.answers == 50
    assert (first.remaining, first.retries) == (70, cut + round(70 * cut / 50))
    assert first.retry_tokens == 12 * first.retries
    assert f"besides: about {first.retries} cut answers that are asked again (retry_truncated), up to" in first.summary()
    assert not estimate(path, tmp_path / "run", settings(**asked)).retries
    distill(path, tmp_path / "run", config)
    last = estimate(path, tmp_path / "run", config)
    assert (last.remaining, last.retries, last.probe.answers) == (0, 0, 50)
    assert last.probe.cut == cut  # although each of them has been asked again, and counts with its longer answer
