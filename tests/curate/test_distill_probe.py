"""A probe of fifty prompts: it tells in a dry run what is to come, and notices at once a format that is not kept."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sftkit.core import patterns
from sftkit.core.engines import transformers_engine
from sftkit.core.engines.base import Completion, Request
from sftkit.core.errors import UserError
from sftkit.core.text import counted
from sftkit.curate import distill as distill_module
from sftkit.curate import pace as pace_module
from sftkit.curate.config import format_pattern
from sftkit.curate.distill import distill
from sftkit.curate.estimate import estimate

from .teachers import Between, Server, data_set, prompts, stored


def test_a_dry_run_probes_fifty_prompts_and_wastes_nothing(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 100), tmp_path / "run"
    config = settings(k=2, max_new_tokens=40)
    found = estimate(path, run, config)
    assert (found.wanted, found.stored, found.probed, found.remaining, found.measured) == (200, 0, 50, 150, 50)
    numbers = [int(each.messages[-1]["content"].split()[2]) for each in between.asked]
    assert numbers == list(range(0, 100, 2))
    tokens = stored(run)["num_tokens"]
    assert found.new_tokens == pytest.approx(tokens.mean() * 150)
    assert found.standard_error == pytest.approx(tokens.std() / 50**0.5 * 150)
    assert found.seconds == pytest.approx(found.new_tokens / found.tokens_per_second)
    assert found.prompt_tokens == pytest.approx(len(between.asked[8].prompt_ids) * 150, rel=0.05)
    assert found.probe.cut == (stored(run)["finish_reason"] == "length").sum()
    assert len(found.probe.examples()) == 3

    between.asked = []
    result = distill(path, run, config)
    assert (len(between.asked), result.samples, result.new_samples) == (150, 200, 150)
    assert result.new_tokens == pytest.approx(found.new_tokens, rel=0.15)  # a tiny model, but its lengths vary as a real one's do
    distill(path, tmp_path / "whole", config)
    assert data_set(run) == data_set(tmp_path / "whole")
    after = estimate(path, run, config)
    assert (after.stored, after.probed, after.remaining, after.tokens_per_second) == (200, 0, 0, None)
    assert "to come: 0 samples" in after.summary()


def test_a_dry_run_of_much_work_takes_the_pace_of_a_full_engine(
    tmp_path: Path, settings: Any, between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_module, "SECONDS_OF_PACE", 0.05)
    monkeypatch.setattr(transformers_engine, "WINDOW", 32)  # requests that it takes at once
    path, run = prompts(tmp_path / "p.jsonl", 300), tmp_path / "run"
    config = settings(k=4, max_new_tokens=8, engine={"batch_tokens": 256})
    found = estimate(path, run, config)
    assert found.full
    assert 50 < found.probed == stored(run).height <= 50 + 1150 // 2
    assert found.remaining == 1200 - found.probed
    assert found.seconds > 0.9 * found.new_tokens / found.tokens_per_second  # at this rate, and until all is on disk
    assert found.seconds_between is not None
    assert found.seconds_between[0] < found.seconds < found.seconds_between[1]
    assert "that it ran at for a while, after" in found.summary()
    paced = Counter(each.messages[-1]["content"] for each in between.asked[50:])
    assert max(paced.values()) <= 4
    assert len(set(list(paced)[:20]) & {f"What is {number} plus {number}?" for number in range(20)}) < 20  # not what stands first
    result = distill(path, run, config)
    assert result.new_samples == found.remaining
    assert result.new_tokens == pytest.approx(found.new_tokens, rel=0.15)


def test_answers_without_the_wanted_format_are_noticed_at_once(
    tmp_path: Path, settings: Any, between: Between, caplog: pytest.LogCaptureFixture
) -> None:
    path = prompts(tmp_path / "p.jsonl", 60)
    with caplog.at_level(logging.INFO, logger="sftkit"):
        result = distill(path, tmp_path / "run", settings(want_format="####", engine={"batch_tokens": 256}))
    assert result.samples == 60
    assert result.matched == 0
    assert "0.0% in the wanted format" in result.summary()
    (warning,) = [each.message for each in caplog.records if "in the wanted format '####': ask for it" in each.message]
    assert "only 0.0% of the answers are" in warning
    assert caplog.text.count("prompt: What is") == 3
    assert "of 50 answers" in caplog.text

    between.asked = []
    with pytest.raises(UserError, match=r"stopped after a probe, as stop_below 0\.5 asks: .*'boxed'.*Its answers are kept"):
        distill(path, tmp_path / "stopped", settings(want_format="boxed", stop_below=0.5))
    assert len(between.asked) == stored(tmp_path / "stopped").height == 50
    anything = settings(want_format="(?s).*", stop_below=0.0)
    assert distill(path, tmp_path / "stopped", anything).matched == 60
    with pytest.raises(UserError, match=r"want_format \(by name known: ####, boxed\): '\(' is not a regular expression"):
        settings(want_format="(")


def test_answers_that_do_not_follow_the_schema_are_noticed_at_once(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that knows no schemas leaves them out of account without a word."""
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Server())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}, "json_schema": '{"type": "object"}'}
    path = prompts(tmp_path / "p.jsonl", 60)
    distill(path, tmp_path / "run", settings(**asked))
    assert "only 0.0% of the answers are as the JSON schema says: cut ones seldom are, and some servers do not hold" in caplog.text
    with pytest.raises(UserError, match=r"stop_below 0\.9 asks: only 0\.0% of the answers are as the JSON schema says"):
        distill(path, tmp_path / "stopped", settings(stop_below=0.9, **asked))
    caplog.clear()
    distill(path, tmp_path / "numbers", settings(**{**asked, "json_schema": '{"not": {"type": "number"}}'}))
    assert "JSON schema" in caplog.text, "an answer that is no JSON follows no schema"
    with pytest.raises(UserError, match=r"json schema: is not valid at \$\.type: 'objct'"):
        settings(json_schema='{"type": "objct"}')


@pytest.mark.parametrize(("count", "k"), [(1, 1), (12, 1), (2, 30)])
def test_few_answers_that_are_not_as_wanted_are_told_at_the_end(
    count: int, k: int, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Server())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}, "k": k}
    path = prompts(tmp_path / "p.jsonl", count)
    for name, wanted, told in (
        ("a", {"json_schema": '{"type": "object"}'}, "as the JSON schema says"),
        ("b", {"want_format": "####"}, "in the wanted format '####'"),
    ):
        caplog.clear()
        distill(path, tmp_path / name, settings(**asked, **wanted))
        (warning,) = [each.getMessage() for each in caplog.records]
        assert warning.startswith(f"warning: only 0.0% of the answers are {told}: ")
        assert warning.endswith(f"({counted(min(count * k, 50), 'answer')} looked at)")
    caplog.clear()
    distill(path, tmp_path / "c", settings(**asked, want_format="."))
    assert caplog.records == []


def test_a_wanted_format_that_would_backtrack_for_years_ends_and_costs_no_sample(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Long(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in super().generate(requests):
                yield replace(each, text="x" * 4000)

    server = Long()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    path, endless = prompts(tmp_path / "p.jsonl", 30), {"want_format": r"(x+x+)+y"}  # which tries all ways to part an answer
    told = r"want_format '.*': took longer than 0\.1 s to search for in a text of 4,000 characters; write it without repeats within"
    with caplog.at_level(logging.INFO, logger="sftkit"):
        result = distill(path, tmp_path / "run", settings(**asked, **endless))
    assert (result.samples, result.matched) == (30, None)
    assert "in the wanted format" not in result.summary()
    warnings = [each.getMessage() for each in caplog.records if re.search(told, each.getMessage())]
    assert [each.partition("want_format")[0] for each in warnings] == [
        "warning: ",
        "warning: the answers in the wanted format were not counted: ",
    ]
    with pytest.raises(UserError, match=rf"stopped after a probe, as stop_below 0 asks: {told}.*Its answers are kept"):
        distill(path, tmp_path / "probed", settings(**asked, **endless, stop_below=0.0))
    assert stored(tmp_path / "probed").height == 30
    assert distill(path, tmp_path / "probed", settings(**asked, want_format="x")).matched == 30
    assert len(server.asked) == 60


@pytest.mark.parametrize(
    ("wanted", "answer", "holds"),
    [
        ("####", "so it is\n#### 42", True),
        ("####", "#### The end", False),
        ("boxed", r"the answer is \boxed{42}", True),
        ("boxed", "42", False),
        (r"^Answer: \w+$", "first\nAnswer: B", True),
    ],
)
def test_what_a_format_is(wanted: str, answer: str, holds: bool) -> None:
    pattern = format_pattern(wanted)
    assert pattern is not None
    assert (pattern.search(answer) is not None) == holds
