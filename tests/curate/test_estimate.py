"""What a dry run says of a server: the rate of all its slots from a few answers, and no more asked where that may cost money."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Request
from sftkit.curate import distill as distill_module
from sftkit.curate import estimate as estimate_module
from sftkit.curate import pace as pace_module
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill
from sftkit.curate.estimate import Flow, estimate
from sftkit.curate.pace import Pace

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


def test_the_pace_is_looked_at_for_a_while_after_what_was_under_way_at_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [70.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pace_module, "SECONDS_OF_PACE", 5.0)
    pace = Pace(begin=70.0)
    for seconds, enough in [(1, False), (2, False), (3, False), (4, False), (7, False), (8, True), (9, True)]:
        clock[0] = 70.0 + seconds
        assert pace(Completion(key=str(seconds), num_tokens=10), 2) is enough
    assert (pace.passing, pace.times) == (2, [1, 2, 3, 4, 7, 8, 9])


def test_a_server_with_a_key_is_asked_no_more_than_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Served())
    monkeypatch.setattr(pace_module, "SECONDS_OF_PACE", 1e-9)
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
    assert f"besides: about {first.retries} cut answers to be asked for again (retry_truncated), up to" in first.summary()
    assert first.retry_cost is None
    priced = estimate(path, tmp_path / "priced", settings(**asked, retry_truncated=True, price_input=1e5, price_output=1e6))
    read = priced.prompt_tokens / priced.remaining * priced.retries
    assert priced.retry_cost == pytest.approx(priced.retry_tokens + read / 10, rel=0.01)
    assert f" and a cost of {priced.retry_cost:,.4f} more" in priced.summary()
    assert not estimate(path, tmp_path / "run", settings(**asked)).retries
    distill(path, tmp_path / "run", config)
    last = estimate(path, tmp_path / "run", config)
    assert (last.remaining, last.retries, last.probe.answers) == (0, 0, 50)
    assert last.probe.cut == cut  # although each of them has been asked again, and counts with its longer answer
