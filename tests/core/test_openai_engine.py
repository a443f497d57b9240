"""The engine for servers, against a real one in a thread: what is sent, retried, adapted, given up, and left behind."""

import email.utils
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai_server import Reply, Server, answer, fault
from sftkit.core.engines import openai_engine, servers
from sftkit.core.engines.base import NOT_FINITE, Completion, EngineConfig, Request, Sampling, ScoreRequest
from sftkit.core.engines.openai_engine import OpenAIEngine
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError

SECRET = "sk-very-secret"
TEXT = {"type": "text", "text": "hm"}
ODD = b'{"choices": [{"message": {"content": [{"type": "image_url"}]}, "finish_reason": "stop"}]}'
INFINITE = f"{NOT_FINITE} for one of its tokens, by the server's log-probabilities"
NO_NUMBER = "Out of range float values are not JSON compliant: nan"  # vLLM's
pytestmark = pytest.mark.usefixtures("hasty")


def engine(server: Server, concurrency: int = 4, model: str = "m") -> OpenAIEngine:
    return open_engine(model, EngineConfig(base_url=server.url, concurrency=concurrency))  # type: ignore[return-value]


def request(key: str, **sampling: Any) -> Request:
    wanted = Sampling(**{"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 20, **sampling})
    return Request(key=key, prompt_ids=(), messages=[{"role": "user", "content": key}], sampling=wanted, seed=2**40 + 7)


def answers(engine: OpenAIEngine, keys: list[str]) -> dict[str, Completion]:
    return {each.key: each for each in engine.generate(request(key) for key in keys)}


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "sftkit-openai"]


def test_an_answer_and_what_was_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    opened = engine(server)
    assert (opened.identity, opened.chat, opened.context_length) == (f"openai:{server.url}:m", None, 512)
    assert answers(opened, ["hi"]) == {"hi": Completion(key="hi", text="HI", finish_reason="stop", num_tokens=3, logprob=-1.5)}
    (asked,) = server.asked
    assert asked == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 20,
        "n": 1,
        "seed": 7,
        "logprobs": True,
    }
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == f"Bearer {SECRET}"
    assert threads() == []


def test_log_probabilities_are_asked_for_where_they_are_wanted(server: Server) -> None:
    """They cost a server a fifth of its throughput; a text is the same with and without."""
    (found,) = engine(server).generate([replace(request("hi"), logprob=False)])
    assert "logprobs" not in server.asked[-1]
    assert (found.text, found.num_tokens) == ("HI", 3)


def test_a_server_that_does_not_count_is_asked_for_log_probabilities_to_count_by(server: Server) -> None:
    server.reply = lambda body: answer("x", usage=None, **({} if body.get("logprobs") else {"logprobs": None}))
    found = list(engine(server, concurrency=1).generate(replace(request(key), logprob=False) for key in "abc"))
    assert [(each.text, each.num_tokens, each.error) for each in found] == [("x", 3, None)] * 3
    assert [body.get("logprobs", False) for body in server.asked] == [False, True, True, True]  # once in vain, then no more


def test_an_answer_without_a_token_fails_and_is_not_asked_for_again_and_again(server: Server) -> None:
    server.reply = lambda body: answer("", usage={"completion_tokens": 0}, logprobs=None) if len(server.asked) < 4 else fault(404)
    found = list(engine(server, concurrency=1).generate(replace(request(key), logprob=False) for key in "ab"))
    assert [each.error for each in found] == ["the server ended the answer before its first token"] * 2
    assert [body.get("logprobs", False) for body in server.asked] == [False, False]


def test_a_server_that_counts_no_token_of_what_it_said_does_not_count(server: Server) -> None:
    server.reply = lambda body: answer("x", usage={"completion_tokens": 0}, **({} if body.get("logprobs") else {"logprobs": None}))
    (found,) = engine(server).generate([replace(request("hi"), logprob=False)])
    assert (found.text, found.num_tokens, found.error) == ("x", 3, None)


def test_a_server_that_neither_counts_nor_tells_fails_row_by_row(server: Server) -> None:
    server.reply = lambda body: fault(400, "logprobs is not supported") if "logprobs" in body else answer("x", usage=None, logprobs=None)
    (found,) = engine(server).generate([replace(request("hi"), logprob=False)])
    assert found.error == "the server does not tell how many tokens the answer has (no usage, no log-probabilities)"
    assert len(server.asked) == 3


def test_stop_texts_are_the_servers_to_obey(server: Server) -> None:
    next(iter(engine(server).generate([request("hi", stop=("\nQuestion:", "x"))])))
    assert server.asked[-1]["stop"] == ["\nQuestion:", "x"]


def test_only_what_is_drawn_has_a_seed_and_each_sample_its_own(server: Server) -> None:
    """Without one, several servers of one kind, or one that is started again, would give the samples of a prompt twice."""
    opened = engine(server)
    list(opened.generate(replace(request("hi"), key=str(index), seed=2**40 + index) for index in range(8)))
    assert len({body["seed"] for body in server.asked}) == 8
    list(opened.generate([request("hi", temperature=0.0)]))
    assert "seed" not in server.asked[-1]


def test_no_key_no_header(server: Server) -> None:
    answers(engine(server), ["hi"])
    assert "authorization" not in {name.lower() for name in server.headers[0]}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (answer("x", finish_reason="length"), {"finish_reason": "length", "text": "x"}),
        (answer("x", logprobs=None), {"finish_reason": "stop", "logprob": None, "num_tokens": 3}),
        (answer("x", usage=None), {"num_tokens": 3, "logprob": -1.5}),
        (answer("x", logprobs={"content": [{"logprob": -0.1}, {"logprob": -9999.0}]}), {"finish_reason": "stop", "logprob": None}),
        (answer("x", message={"content": None}, finish_reason="length"), {"finish_reason": "length", "text": ""}),
        (answer("x", message={"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}), {"text": "in parts"}),
        (
            answer("x", message={"content": [{"type": "thinking", "thinking": [TEXT]}, {"type": "text", "text": "so"}]}),  # Mistral's
            {"text": "so", "reasoning": "hm"},
        ),
        (answer("x", finish_reason="content_filter"), {"finish_reason": "error", "error": "the server ended the answer with 'content_filter'"}),
        (answer("x", finish_reason=None), {"finish_reason": "error", "error": "the server ended the answer with None"}),
        (answer("x", message={"content": None, "refusal": "I will not."}), {"error": "the server refuses: I will not."}),
        (answer("x", logprobs={"content": [{"logprob": float("nan")}]}), {"error": INFINITE}),
        (answer("x", logprobs={"content": [{"logprob": float("-inf")}]}), {"error": INFINITE}),
        (answer("x", logprobs={"content": [{"logprob": None}]}), {"error": INFINITE}),
        (
            answer("x", usage=None, logprobs=None),
            {"error": "the server does not tell how many tokens the answer has (no usage, no log-probabilities)"},
        ),
        (fault(400, "This model's maximum context length is 512 tokens"), {"error": "400: This model's maximum context length is 512 tokens"}),
        (fault(400, NO_NUMBER), {"error": f"{NOT_FINITE} for one of its tokens; the server says 400: {NO_NUMBER}"}),
        (fault(500, NO_NUMBER), {"error": f"{NOT_FINITE} for one of its tokens; the server says 500: {NO_NUMBER}"}),
        (fault(413, "too large"), {"error": "413: too large"}),
    ],
)  # fmt: skip
def test_what_an_answer_says(server: Server, reply: Reply, expected: dict[str, Any]) -> None:
    server.reply = lambda body: reply
    found = answers(engine(server), ["a"])["a"]
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.error is None) == (found.finish_reason != "error")
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_asked_again(server: Server, status: int) -> None:
    replies = iter([fault(status), fault(status), answer("in the end")])
    server.reply = lambda body: next(replies)
    assert answers(engine(server), ["a"])["a"].text == "in the end"
    assert len(server.asked) == 3


@pytest.mark.parametrize("content", [b"<html>busy</html>", b'{"error": {"message": "upstream"}}', b'{"choices": []}', ODD])
def test_an_answer_that_is_none_is_asked_again(server: Server, content: bytes) -> None:
    replies = iter([(200, {}, content), answer("in the end")])
    server.reply = lambda body: next(replies)
    assert answers(engine(server), ["a"])["a"].text == "in the end"


def test_a_request_that_fails_for_good_fails_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 3)
    server.reply = lambda body: fault(500, "broken") if body["messages"][0]["content"] == "b" else answer("fine")
    found = answers(engine(server), ["a", "b", "c"])
    assert found["b"].error == "500: broken, after 3 attempts"
    assert [found[key].text for key in "ac"] == ["fine", "fine"]
    assert [body["messages"][0]["content"] for body in server.asked].count("b") == 3


def test_a_connection_that_breaks_is_made_again(server: Server) -> None:
    server.reply = lambda body: (
        (200, {"content-length": "1000", "connection": "close"}, b"cut") if len(server.asked) == 1 else answer("whole")
    )
    assert answers(engine(server), ["a"])["a"].text == "whole"


def test_an_answer_that_does_not_come_times_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "TIMEOUT", httpx.Timeout(0.2))
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 2)
    done = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "slow":
            done.wait(20)
        return answer("quick")

    server.reply = reply
    found = answers(engine(server), ["slow", "quick"])
    done.set()
    assert found["slow"].error == "ReadTimeout, after 2 attempts"
    assert found["quick"].text == "quick"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed_by_all(server: Server, form: str) -> None:
    """What a server asks of one request holds for those that come after it, too."""
    told: list[float] = []

    def reply(body: dict[str, Any]) -> Reply:
        if told:
            return answer("later")
        now = time.time()
        told.append(2.0 if form == "seconds" else int(now) + 3 - now)
        header = "2" if form == "seconds" else email.utils.formatdate(int(now) + 3, usegmt=True)
        return fault(429, headers={"retry-after": header})

    server.reply = reply
    found = answers(engine(server, concurrency=1), ["a", "b", "c"])
    assert {each.text for each in found.values()} == {"later"}
    first, *others = server.times
    assert len(others) == 3
    assert min(others) - first >= told[0] - 0.05


@pytest.mark.parametrize("header", ["36000", "inf"])
def test_a_server_that_wants_hours_is_not_waited_for(server: Server, header: str) -> None:
    server.reply = lambda body: fault(429, "daily limit", headers={"retry-after": header})
    found = answers(engine(server), ["a"])["a"]
    assert found.error is not None
    assert found.error.startswith("429: daily limit, and asks to be left alone for")
    assert len(server.asked) == 1


@pytest.mark.parametrize("header", ["soon", "-3", "nan"])
def test_a_retry_after_without_sense_is_no_reason_to_stop(server: Server, header: str) -> None:
    replies = iter([fault(429, headers={"retry-after": header}), answer("again")])
    server.reply = lambda body: next(replies)
    assert answers(engine(server), ["a"])["a"].text == "again"


def test_waits_grow_and_are_random() -> None:
    waits = [[openai_engine._wait(attempt) for _ in range(200)] for attempt in range(1, 12)]
    for attempt, found in enumerate(waits, start=1):
        limit = min(openai_engine.LONGEST_WAIT, openai_engine.FIRST_WAIT * 2 ** (attempt - 1))
        assert 0 <= min(found) < 0.1 * limit
        assert 0.9 * limit < max(found) <= limit


def test_no_more_than_concurrency_at_once_and_all_of_it(server: Server) -> None:
    gate = threading.Barrier(3, timeout=20)  # each answer waits for two others: fewer at once would break it

    def reply(body: dict[str, Any]) -> Reply:
        gate.wait()
        return answer()

    server.reply = reply
    assert len(answers(engine(server, concurrency=3), [str(number) for number in range(30)])) == 30
    assert server.most_under_way == 3


def test_requests_are_taken_as_they_are_needed_and_answers_given_as_they_come(server: Server) -> None:
    taken = 0
    held = threading.Event()

    def source() -> Iterator[Request]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield request(str(number))

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "0":
            held.wait(20)
        return answer()

    server.reply = reply
    seen = []
    for completion in engine(server, concurrency=4).generate(source()):
        seen.append(completion.key)
        assert taken <= len(seen) + 2 * 4
        if len(seen) == 50:  # the first request is still under way
            assert "0" not in seen
            held.set()
    assert sorted(seen, key=int) == [str(number) for number in range(100)]


def test_a_slow_source_does_not_hold_back_answers(server: Server) -> None:
    order: list[str] = []

    def source() -> Iterator[Request]:
        for key in "abcd":
            order.append(f"asked {key}")
            yield request(key)
            deadline = time.monotonic() + 20
            while not any(body["messages"][0]["content"] == key for body in server.asked) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.1)  # the answer is on its way

    for completion in engine(server).generate(source()):
        order.append(f"got {completion.key}")
    assert order.index("got a") < order.index("asked c")


def test_leaving_early_cancels_and_leaves_no_thread(server: Server) -> None:
    done = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        first = body["messages"][0]["content"] == "0"
        deadline = time.monotonic() + 20
        while (server.under_way < 8 if first else not done.is_set()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return answer()

    server.reply = reply
    stream = engine(server, concurrency=8).generate(request(str(number)) for number in range(100))
    assert next(stream).key == "0"
    assert threads() == ["sftkit-openai"]
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []
    assert server.under_way > 0  # nobody waited for those that hang
    done.set()
    assert len(server.asked) < 20


def test_an_interruption_of_the_caller_leaves_no_thread(server: Server) -> None:
    def consume() -> None:
        for _ in engine(server).generate(request(str(number)) for number in range(100)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert threads() == []


def test_a_fault_of_the_source_is_the_callers(server: Server) -> None:
    def source() -> Iterator[Request]:
        yield request("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine(server).generate(source()))
    assert threads() == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_ends_everything_and_is_not_shown(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    opened = engine(server)
    server.reply = lambda body: fault(status, f"Incorrect API key provided: {SECRET}")
    with pytest.raises(UserError, match=rf"answers {status}.*OPENAI_API_KEY") as caught:
        list(opened.generate(request(str(number)) for number in range(1000)))
    assert SECRET not in str(caught.value)
    assert len(server.asked) < 50
    server.models = fault(status, f"Incorrect API key provided: {SECRET}")
    with pytest.raises(UserError, match=rf"answers {status}.*OPENAI_API_KEY") as caught:
        engine(server)
    assert SECRET not in str(caught.value) + repr(openai_engine.Server("http://x/v1", SECRET))


def test_a_key_in_another_error_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda body: fault(400, f"bad request with Bearer {SECRET}")
    assert answers(engine(server), ["a"])["a"].error == "400: bad request with Bearer [key]"
    assert SECRET not in caplog.text


def test_a_key_that_is_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-broken\nover two lines")
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds characters") as caught:
        engine(server)
    assert "sk-broken" not in str(caught.value)


def test_a_quota_that_is_used_up_ends_everything(server: Server) -> None:
    server.reply = lambda body: fault(429, "You exceeded your current quota", code="insufficient_quota")
    with pytest.raises(UserError, match="answers 429: You exceeded your current quota"):
        list(engine(server).generate(request(str(number)) for number in range(1000)))


@pytest.mark.parametrize("status", [404, 501])
def test_a_model_that_went_away(server: Server, status: int) -> None:
    opened = engine(server)
    server.reply = lambda body: fault(status, "no such model")
    with pytest.raises(UserError, match=rf"answers {status} for the model 'm' \(no such model\); it serves m, other"):
        answers(opened, ["a"])
    assert len(server.asked) == 1  # asked again it would be no other


def test_a_server_that_stops_answering_ends_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one by one, each after minutes of waiting: more than twice the concurrency in a row is enough."""
    monkeypatch.setattr(openai_engine, "ATTEMPTS", 2)
    server.reply = lambda body: answer() if int(body["messages"][0]["content"]) < 20 else fault(503, "down")
    found: list[Completion] = []
    stream = engine(server, concurrency=4).generate(request(str(number)) for number in range(1000))
    with pytest.raises(UserError, match="has stopped answering: 9 requests in a row failed, the last with: 503: down, after 2 attempts"):
        found.extend(stream)
    assert sum(each.error is None for each in found) == 20
    assert len(server.asked) < 80


def test_prompts_that_the_server_refuses_never_end_the_run(server: Server) -> None:
    server.reply = lambda body: fault(400, "too long")
    found = answers(engine(server, concurrency=2), [str(number) for number in range(50)])
    assert [each.error for each in found.values()] == ["400: too long"] * 50


def test_what_a_server_does_not_take_is_left_out_once_for_all(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if "logprobs" in body:
            return fault(400, "You are not allowed to request logprobs from this model.", param="logprobs")
        if "seed" in body:
            return 422, {}, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
        if "max_tokens" in body:
            return fault(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        return answer(logprobs=None)

    server.reply = reply
    with caplog.at_level(logging.WARNING, logger="sftkit"):
        found = answers(engine(server, concurrency=2), [str(number) for number in range(10)])
    assert all(each.text == "hello" and each.logprob is None for each in found.values())
    assert set(server.asked[-1]) == {"model", "messages", "temperature", "top_p", "n", "max_completion_tokens"}
    assert [each.getMessage() for each in caplog.records] == [
        f"{server.url} does not take 'logprobs': answers have no log-probability",
        f"{server.url} does not take 'seed': an answer cannot be made a second time, and servers that begin with the same random numbers"
        " give the same answers",
    ]


def test_a_prompt_that_is_too_long_changes_nothing_for_the_others(server: Server) -> None:
    """vLLM's words for it name both parameters; only those of a server that does not know one may change the request."""
    message = "'max_tokens' or 'max_completion_tokens' is too large: 20. This model's maximum context length is 512 tokens"
    server.reply = lambda body: fault(400, message, param="max_tokens") if body["messages"][0]["content"] == "long" else answer()
    opened = engine(server, concurrency=1)
    found = answers(opened, ["long", "short"])
    assert found["long"].error == f"400: {message}"
    assert found["short"].error is None
    assert all("max_tokens" in body for body in server.asked)


def test_a_temperature_that_is_not_taken_is_the_users_to_change(server: Server) -> None:
    server.reply = lambda body: fault(400, "Unsupported value: 'temperature' does not support 0.7 with this model.", param="temperature")
    with pytest.raises(UserError, match=r"m does not take temperature 0.7: Unsupported value"):
        list(engine(server).generate(request(str(number)) for number in range(1000)))


def test_half_a_surrogate_pair_is_sent(server: Server) -> None:
    assert answers(engine(server), ["\ud83d"])["\ud83d"].error is None
    assert server.asked[0]["messages"][0]["content"] == "\ud83d"


def test_a_model_that_the_server_does_not_have(server: Server) -> None:
    with pytest.raises(UserError, match=r"unknown model 'othr': did you mean 'other'\? known are m, other"):
        engine(server, model="othr")


def test_of_many_models_the_nearest_are_named(server: Server) -> None:
    server.models = (200, {}, {"data": [{"id": f"family-{number}/model"} for number in range(400)]})
    with pytest.raises(UserError, match="did you mean 'family-123/model'") as caught:
        engine(server, model="family-123/modle")
    assert str(caught.value).count("family-") == 20 + 2


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_without_a_list_of_models(server: Server, status: int) -> None:
    server.models = fault(status)
    opened = engine(server, model="anything")
    assert opened.context_length is None
    assert answers(opened, ["a"])["a"].text == "A"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((200, {"content-type": "text/html"}, b"<html>hello</html>"), "is no OpenAI-compatible server: its list of models is text/html"),
        ((200, {}, {"models": []}), "is no OpenAI-compatible server"),
        ((302, {"location": "https://elsewhere/v1"}, b""), "answers 302 to https://elsewhere/v1"),
        ((500, {}, b"oops"), "answers 500 when asked for its models: oops"),
    ],
)
def test_something_else_that_answers(server: Server, models: Reply, message: str) -> None:
    server.models = models
    with pytest.raises(UserError, match=message):
        engine(server)


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        (None, "needs base_url"),
        ("localhost:8000/v1", "expected http:// or https://"),
        ("ftp://localhost/v1", "expected http:// or https://"),
        ("http://user:secret@localhost/v1", "holds a user name or password"),
        ("http://127.0.0.1:9/v1", r"http://127.0.0.1:9/v1: no server answers there \(ConnectError: .*refused"),
    ],
)
def test_an_address_that_leads_nowhere(base_url: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_engine("m", EngineConfig(engine="openai", base_url=base_url))
    assert "secret" not in str(caught.value)


def test_an_address_for_an_engine_that_asks_no_server() -> None:
    with pytest.raises(UserError, match="base_url: is the address of a server, which the engine openai asks, not vllm"):
        EngineConfig(engine="vllm", base_url="http://localhost:8000/v1")


def test_connections_have_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files are all open, a connection fails as if nobody listened, and waits."""
    limits = {"may": (1024, 4096)}
    monkeypatch.setattr(servers.resource, "getrlimit", lambda what: limits["may"])
    monkeypatch.setattr(servers.resource, "setrlimit", lambda what, wanted: limits.update(may=wanted))
    engine(server, concurrency=64)
    assert limits["may"] == (1024, 4096)
    engine(server, concurrency=2000)
    assert limits["may"] == (2256, 4096)
    with pytest.raises(UserError, match=r"concurrency: 4,000 connections at once need 4,256 open files, and this process may have 4,096"):
        engine(server, concurrency=4000)


def test_one_address_in_many_spellings() -> None:
    spellings = ["http://Host:80/v1/", " http://host/v1", "http://host", "http://host/", "http://host/v1/chat/completions?x=1#y"]
    assert {openai_engine.address_of(each) for each in spellings} == {"http://host/v1"}
    assert openai_engine.address_of("https://host/api/v2/") == "https://host/api/v2"


def test_with_a_revision_the_model_is_known_and_not_its_address(server: Server) -> None:
    other = Server()
    either = [f"{server.url},{other.url}", f"{other.url},{server.url}", other.url]
    with_revision = {open_engine("m", EngineConfig(base_url=each), revision="2026-11").identity for each in either}
    assert with_revision == {"openai:m@2026-11"}
    without = [open_engine("m", EngineConfig(base_url=each)).identity for each in either]
    assert without == [f"openai:{server.url}:m", f"openai:{other.url}:m", f"openai:{other.url}:m"]
    other.close()


def test_a_server_scores_no_text(server: Server) -> None:
    with pytest.raises(UserError, match="cannot score texts"):
        engine(server).logprobs([ScoreRequest(key="a", ids=(1, 2), start=1)])


def test_inside_a_running_event_loop(server: Server) -> None:
    """A notebook's cell runs in one."""
    import asyncio

    async def cell() -> dict[str, Completion]:
        return answers(engine(server), ["a"])

    assert asyncio.run(cell())["a"].text == "A"
