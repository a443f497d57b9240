"""A teacher behind a server: sent messages, functions and schemas, keyed by them, its thoughts kept apart."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.engines.base import Completion, Request
from sftkit.core.errors import TooManyFailures, UserError
from sftkit.core.run import Run
from sftkit.core.store import SampleWriter, sample_key
from sftkit.curate import distill as distill_module
from sftkit.curate.decide_config import FilterConfig
from sftkit.curate.distill import distill
from sftkit.curate.filters import filter_rows
from sftkit.curate.rows import load_rows

from .teachers import Server, data_set, ledger, prompts, stored


def test_a_server_is_sent_messages_and_keyed_by_them(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    path = prompts(tmp_path / "p.jsonl", 3)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    distill(path, tmp_path / "run", settings(k=2, system="Be brief.", **asked))
    assert [each.messages[0] for each in server.asked] == [{"role": "system", "content": "Be brief."}] * 6
    assert len({each.seed for each in server.asked}) == len({each.key for each in server.asked}) == 6
    assert distill(path, tmp_path / "run", settings(k=2, system="Be brief.", **asked)).new_samples == 0
    distill(path, tmp_path / "other", settings(k=2, **asked))
    assert set(stored(tmp_path / "run")["key"]).isdisjoint(stored(tmp_path / "other")["key"])
    with pytest.raises(UserError, match="thinking: a server renders for itself"):
        distill(path, tmp_path / "thinking", settings(thinking=True, **asked))


def test_a_server_is_told_of_functions_which_decide_the_answer(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"prompt": "What is 1 plus 1?", **more} for more in ({}, {"tools": json.dumps([tool["function"]])}, {"tools": [tool]})]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    assert distill(path, tmp_path / "run", settings(**asked)).rejected == {"duplicate_prompt": 1}
    plain, told = server.asked
    assert (plain.tools, told.tools) == ((), (tool,))
    assert plain.key != told.key
    keyed = sample_key(prompt=plain.messages, model_identity=server.identity, sampling=plain.sampling, index=0)
    assert keyed == plain.key, "samples of prompts without functions are known as before there were any"


def test_thoughts_are_kept_apart_and_put_before_the_answer_when_asked(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replies = {
        0: {"text": "<think>\nTwo.\n</think>\n\nIt is 2."},
        1: {"text": "It is 2.", "reasoning": "Two."},  # the server keeps them apart
        2: {"text": "It is 2."},
        3: {"text": "Two.</think>It is 2."},  # the template wrote the opening tag
    }

    class Thinking(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for number, request in enumerate(requests):
                yield Completion(key=request.key, num_tokens=9, prompt_tokens=7, **replies[number])

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Thinking())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}, "k": 4}
    path, run = prompts(tmp_path / "p.jsonl", 1), tmp_path / "run"
    distill(path, run, settings(**asked))
    samples = stored(run)
    assert samples["text"].to_list() == ["It is 2."] * 4
    assert samples["reasoning"].to_list() == ["Two.", "Two.", None, "Two."]
    assert samples["prompt_tokens"].to_list() == [7] * 4
    assert [each["messages"][-1]["content"] for each in data_set(run)] == ["It is 2."] * 4
    assert distill(path, run, settings(**asked, reasoning="inline")).new_samples == 0
    inline = "<think>\nTwo.\n</think>\n\nIt is 2."
    assert [each["messages"][-1]["content"] for each in data_set(run)] == [inline, inline, "It is 2.", inline]
    rows = load_rows(Run.open(run), columns=["response"])
    assert rows["response"].to_list() == ["It is 2."] * 4  # scores are of the answer
    with Run.create(run) as again:
        filter_rows(again, FilterConfig(min_words=1))
    assert distill(path, run, settings(**asked, reasoning="inline")).new_samples == 0
    assert Run.open(run).ledger.stages() == ["prompts", "distill", "filter"]
    with caplog.at_level("INFO", logger="sftkit"):
        distill(path, run, settings(**asked))
    assert "thoughts are to stand elsewhere than last time (reasoning); void and to be run again: filter" in caplog.text
    assert Run.open(run).ledger.stages() == ["prompts", "distill"]
    assert [each["messages"][-1]["content"] for each in data_set(run)] == ["It is 2."] * 4


def test_a_schema_decides_and_the_transformers_engine_refuses_it(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object",\n "properties": {"n": {"type": "integer"}}}')
    config = settings(json_schema=str(path))
    assert config.json_schema == settings(json_schema='{"properties": {"n": {"type": "integer"}}, "type": "object"}').json_schema
    assert sample_key(prompt=[1], model_identity="m", sampling=config.sampling, index=0) != sample_key(
        prompt=[1], model_identity="m", sampling=settings().sampling, index=0
    )
    with pytest.raises(UserError, match=r"json_schema: the transformers engine cannot hold an answer to a schema; take the engine vllm or"):
        distill(prompts(tmp_path / "p.jsonl", 2), tmp_path / "run", config)
    for given, message in [("[1]", "cannot be read"), (str(tmp_path / "none.json"), "cannot be read: No such file"), ("{", "is no JSON")]:
        with pytest.raises(UserError, match=message):
            settings(json_schema=given)


def test_an_engine_that_swallows_a_request_fails_it_by_name(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from list(super().generate(requests))[1:]

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Forgetful())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    with pytest.raises(TooManyFailures, match=r"1 of 3 samples failed.*the engine gave no answer"):
        distill(prompts(tmp_path / "p.jsonl", 3), tmp_path / "run", settings(**asked))
    assert stored(tmp_path / "run").height == 2


def test_an_answer_without_a_word_is_left_out_by_name(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["", " \n", "<think>Hm.</think>", "4"]

    class Silent(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from (replace(each, text=text) for each, text in zip(super().generate(requests), said, strict=True))

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Silent())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    result = distill(prompts(tmp_path / "p.jsonl", 1), tmp_path / "run", settings(k=4, **asked))
    assert (result.samples, result.empty, result.failed) == (4, 3, {})
    assert "left out: 3 answers without a word (empty_answer)" in result.summary()
    decided = ledger(tmp_path / "run", "distill").select("sample_index", "action", "rule").rows()
    assert decided == [(index, "rejected", "empty_answer") for index in range(3)] + [(3, "kept", "")]
    assert [each["messages"][-1]["content"] for each in data_set(tmp_path / "run")] == ["4"]


def test_an_error_of_the_store_leaves_nothing_under_way(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the error is told, whose traceback holds the stream: at the interpreter's exit its thread can no longer be ended."""
    under_way: list[str] = []

    class Open(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            under_way.append("a connection")
            try:
                yield from super().generate(requests)
            finally:
                under_way.clear()

    def full(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Open())
    monkeypatch.setattr(SampleWriter, "put", full)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    with pytest.raises(UserError, match="the disk is full") as error:
        distill(prompts(tmp_path / "p.jsonl", 3), tmp_path / "run", settings(**asked))
    assert error.tb is not None
    assert under_way == []


def test_a_store_that_lost_its_bytes_is_not_filled_anew(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    path, run = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run"
    distill(path, run, settings(**asked))
    store = run / "curate" / "samples.sqlite"
    store.write_bytes(b"")
    with pytest.raises(UserError, match=r"samples.sqlite: is damaged \(it holds no byte\).*Move it away"):
        load_rows(Run.open(run), columns=["response"])
    with pytest.raises(UserError, match=r"samples.sqlite: is damaged \(it holds no byte\).*Move it away"):
        distill(path, run, settings(**asked))
    assert (len(server.asked), store.stat().st_size) == (3, 0)
    store.unlink()
    assert distill(path, run, settings(**asked)).new_samples == 3
