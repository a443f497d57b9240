"""The engine for servers when everything between goes wrong: storms of 429, cut and dripping answers, restarts; several servers."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest
from faulty_proxy import FAULTS, FaultyProxy, storm
from openai_client import request
from openai_server import Reply, Server, answer, fault
from sftkit.core.engines import openai_engine
from sftkit.core.engines.base import Completion, EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError

pytestmark = pytest.mark.usefixtures("hasty")
Proxied = Callable[..., FaultyProxy]


@pytest.fixture
def proxied(server: Server) -> Iterator[Proxied]:
    made: list[FaultyProxy] = []

    def make(schedule: Callable[[], str | None] = lambda: None) -> FaultyProxy:
        made.append(FaultyProxy(server.url, schedule))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def answers(proxies: list[FaultyProxy], count: int, concurrency: int = 8) -> dict[str, Completion]:
    """Ask through proxies; return every answer, which must come exactly once."""
    urls = ",".join(each.url for each in proxies)
    engine = open_engine("m", EngineConfig(base_url=urls, concurrency=concurrency))
    found = list(engine.generate(request(f"prompt {number}") for number in range(count)))
    assert sorted(each.key for each in found) == sorted(f"prompt {number}" for number in range(count))
    return {each.key: each for each in found}


def assert_right(found: dict[str, Completion]) -> None:
    assert {key: each.text for key, each in found.items() if not each.error} == {key: key.upper() for key in found}


def test_every_prompt_is_accounted_for_in_a_storm(server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "LONGEST_ANSWER", 4.0)
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 40)  # with ten, one of 150 fails by chance every hundredth time
    proxy = proxied(storm(0.4, seed=1))
    assert_right(answers([proxy], 150))
    assert set(proxy.done) == {*FAULTS, "passed"}
    assert len(server.asked) > 150  # some answers were lost on their way: asked again, they are the same samples
    assert len({(body["messages"][0]["content"], body["seed"]) for body in server.asked}) == 150


def test_a_storm_of_429_for_longer_than_the_attempts_fails_nothing_while_others_are_answered(
    proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 3)
    monkeypatch.setattr(openai_engine, "PATIENCE", 60.0)
    proxy = proxied(storm(0.7, seed=2, faults=("429",)))
    assert_right(answers([proxy], 60))  # with three attempts each, a third of them would fail
    assert proxy.done["429"] > proxy.done["passed"] == 60


def test_a_request_that_is_always_put_off_fails_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 3)
    monkeypatch.setattr(openai_engine, "PUT_OFF", 5)
    monkeypatch.setattr(openai_engine, "PATIENCE", 60.0)
    server.reply = lambda body: fault(429, "too large") if body["messages"][0]["content"] == "b" else answer("fine")
    engine = open_engine("m", EngineConfig(base_url=server.url, concurrency=1))
    found = {each.key: each.error for each in engine.generate(map(request, "abc"))}
    assert found == {"a": None, "b": "429: too large, after 3 attempts", "c": None}
    assert len(server.asked) == 1 + 5 + 3 + 1


def test_a_dripping_answer_is_not_waited_for(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "LONGEST_ANSWER", 4.0)
    drips = chain(["drip"] * 4, repeat(None))
    assert_right(answers([proxied(lambda: next(drips))], 20))


def test_an_answer_that_always_drips_fails_by_name(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "LONGEST_ANSWER", 0.2)
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 2)
    found = answers([proxied(lambda: "drip")], 1)
    assert found["prompt 0"].error == "no whole answer within 0.2 s, after 2 attempts"


def test_a_server_that_starts_anew_is_waited_for(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than the attempts would last."""
    monkeypatch.setattr(openai_engine, "PATIENCE", 60.0)
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 5)
    proxy = proxied()
    passed = 0

    def schedule() -> str | None:
        nonlocal passed
        passed += 1
        if passed == 20:
            threading.Thread(target=go_away).start()
        return None

    def go_away() -> None:
        proxy.stop()
        threading.Event().wait(1.0)
        proxy.restart()

    proxy.fault = schedule
    assert_right(answers([proxy], 200))


def test_several_servers_share_the_work_by_load(server: Server, proxied: Proxied) -> None:
    """One is held up: the other one takes what it cannot."""
    slow, quick = proxied(), proxied()
    held = threading.Event()

    def wait() -> None:
        held.wait(120)

    slow.fault = wait  # its four slots are taken, and no more is sent to it
    engine = open_engine("m", EngineConfig(base_url=f"{slow.url},{quick.url}", concurrency=4))
    assert engine.identity == f"openai:{slow.url}:m"
    seen = []
    for completion in engine.generate(request(f"prompt {number}") for number in range(60)):
        seen.append(completion.key)
        if len(seen) == 50:
            assert quick.done["passed"] >= 50
            held.set()
    assert len(set(seen)) == 60
    assert slow.done["passed"] <= 4 + 10


def test_a_server_that_is_gone_leaves_its_work_to_the_others(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "PATIENCE", 60.0)
    gone, there = proxied(), proxied()
    passed = 0

    def schedule() -> str | None:
        nonlocal passed
        passed += 1
        if passed == 10:
            threading.Thread(target=gone.stop).start()
        return None

    gone.fault = schedule
    assert_right(answers([gone, there], 120))
    assert there.done["passed"] > 60
    gone.restart()


def test_all_servers_must_serve_the_model(server: Server, proxied: Proxied) -> None:
    other = Server()
    other.models = (200, {}, {"data": [{"id": "another"}]})
    with pytest.raises(UserError, match=rf"{other.url}: unknown model 'm'.*known are another"):
        open_engine("m", EngineConfig(base_url=f"{server.url}, {other.url}"))
    other.models = (200, {}, {"data": [{"id": "m", "max_model_len": 100}]})
    assert open_engine("m", EngineConfig(base_url=f"{server.url}, {other.url}")).context_length == 100
    other.close()


def in_name(name: str, text: str = "hello") -> Reply:
    """Return an answer in a model's name."""
    status, headers, content = answer(text)
    return status, headers, {**content, "model": name}


@pytest.mark.parametrize("late", ["m", "imposter"])
def test_servers_that_answer_in_different_names_are_not_mixed(server: Server, late: str) -> None:
    """Whichever answers first, nothing of the wrong one is given."""
    other = Server()

    def replying(name: str) -> Callable[[dict[str, Any]], Reply]:
        def reply(body: dict[str, Any]) -> Reply:
            threading.Event().wait(0.3 * (name == late))
            return in_name(name, name)

        return reply

    server.reply, other.reply = replying("m"), replying("imposter")
    engine = open_engine("m", EngineConfig(base_url=f"{server.url},{other.url}", concurrency=4))
    given: list[str] = []
    with pytest.raises(UserError) as error:
        given.extend(each.text for each in engine.generate(request(f"prompt {number}") for number in range(1000)))
    other.close()
    names = sorted([(server.url, "m"), (other.url, "imposter")], key=lambda each: each[1] == late)
    (first, its), (second, anothers) = names
    assert f"{first} answers in the name of {its!r}, and {second} in that of {anothers!r}" in str(error.value)
    assert "imposter" not in given


@pytest.mark.parametrize(("first", "then"), [("m", "imposter"), ("m-2026-01-01", "m"), ("", "imposter")])
def test_a_server_that_changes_its_name_is_not_mixed_in(server: Server, first: str, then: str) -> None:
    server.reply = lambda body: in_name(first if len(server.asked) <= 5 else then, str(len(server.asked)))
    given: list[str] = []
    with pytest.raises(UserError, match=f"{server.url}: answered in the name of '{first or 'm'}', and now in that of '{then}': .* is kept"):
        given.extend(
            each.text for each in open_engine("m", EngineConfig(base_url=server.url, concurrency=1)).generate(map(request, "abcdefghi"))
        )
    assert given == list("12345")


def test_another_name_than_was_asked_for_is_told_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.reply = lambda body: in_name("m-2026-01-01")
    assert len(list(open_engine("m", EngineConfig(base_url=server.url)).generate(request(str(number)) for number in range(9)))) == 9
    (told,) = caplog.records
    assert told.getMessage() == f"{server.url} answers in the name of 'm-2026-01-01'; make sure that it is 'm', which was asked for"


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "臺北"}}\n</tool_call>'


def test_a_server_is_told_of_functions_and_its_calls_are_text(server: Server) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "臺北"}'}}]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    server.reply = lambda body: answer(message=said, finish_reason="tool_calls") if "tools" in body else answer("none")
    engine = open_engine("m", EngineConfig(base_url=server.url))
    (found,) = engine.generate([replace(request("Weather?"), tools=(TOOL,))])
    assert (found.text, found.finish_reason, server.asked[-1]["tools"]) == (CALLED, "stop", [TOOL])
    (found,) = engine.generate([request("Weather?")])
    assert found.text == "none"
    said["content"], calls[0]["function"]["arguments"] = "Let me look.", "{no JSON"
    (found,) = engine.generate([replace(request("Weather?"), tools=(TOOL,))])
    assert found.text == 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": "{no JSON"}\n</tool_call>'


def test_a_server_that_does_not_look_for_calls_leaves_them_in_the_text(server: Server) -> None:
    refusal = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'  # vLLM's
    server.reply = lambda body: answer(CALLED) if body.get("tool_choice") == "none" else fault(400, refusal)
    engine = open_engine("m", EngineConfig(base_url=server.url, concurrency=1))
    found = list(engine.generate(replace(request(f"Weather {number}?"), tools=(TOOL,)) for number in range(3)))
    assert [each.text for each in found] == [CALLED] * 3
    assert len(server.asked) == 4


def test_a_schema_is_sent_and_its_refusal_ends_the_run(server: Server) -> None:
    engine = open_engine("m", EngineConfig(base_url=server.url))
    schema = '{"properties": {"n": {"type": "integer"}}, "type": "object"}'
    list(engine.generate([request("a", json_schema=schema)]))
    expected = {"name": "answer", "schema": {"properties": {"n": {"type": "integer"}}, "type": "object"}, "strict": True}
    assert server.asked[0]["response_format"] == {"type": "json_schema", "json_schema": expected}
    server.reply = lambda body: fault(400, "'response_format' is not supported by this model")
    with pytest.raises(UserError, match="m does not take response_format with a JSON schema: 'response_format' is not supported"):
        list(engine.generate([request("b", json_schema=schema)]))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_a_server_keeps_apart_stay_apart(server: Server, name: str) -> None:
    usage = {"completion_tokens": 9, "prompt_tokens": 7}
    server.reply = lambda body: answer(message={"content": "42", name: "Let me see."}, usage=usage)
    (found,) = open_engine("m", EngineConfig(base_url=server.url)).generate([request("a")])
    assert (found.text, found.reasoning, found.num_tokens, found.prompt_tokens) == ("42", "Let me see.", 9, 7)
