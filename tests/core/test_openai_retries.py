"""The engine for servers when a request fails: asked again after a wait that grows or is told, or given up, alone or with all others."""

import email.utils
import threading
import time
from typing import Any

import httpx
import pytest
from openai_client import SECRET, answers, engine, request
from openai_server import Reply, Server, answer, fault
from sftkit.core.engines import openai_engine, servers
from sftkit.core.engines.base import Completion
from sftkit.core.errors import UserError

LISTED = b'{"choices": [{"message": {"content": "x"}, "finish_reason": ["stop"]}]}'
ODD = b'{"choices": [{"message": {"content": [{"type": "image_url"}]}, "finish_reason": "stop"}]}'
pytestmark = pytest.mark.usefixtures("hasty")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_asked_again(server: Server, status: int) -> None:
    replies = iter([fault(status), fault(status), answer("in the end")])
    server.reply = lambda body: next(replies)
    assert answers(engine(server), ["a"])["a"].text == "in the end"
    assert len(server.asked) == 3


@pytest.mark.parametrize("content", [b"<html>busy</html>", b'{"error": {"message": "upstream"}}', b'{"choices": []}', LISTED, ODD])
def test_an_answer_that_is_none_is_asked_again(server: Server, content: bytes) -> None:
    replies = iter([(200, {}, content), answer("in the end")])
    server.reply = lambda body: next(replies)
    assert answers(engine(server), ["a"])["a"].text == "in the end"


def test_the_first_answer_that_is_none_is_told_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    page = f"<html>\n{SECRET} {'log in ' * 30}</html>".encode()
    server.reply = lambda body: (200, {"content-type": "text/html"}, page) if len(server.asked) < 5 else answer()
    assert len(answers(engine(server, concurrency=2), list("abc"))) == 3
    (told,) = [each.getMessage() for each in caplog.records]
    before, _, shown = told.partition(": '")
    assert before == f"{server.url}: an answer is not of the protocol (text/html) and is asked for again"
    assert shown.startswith("<html> [key] log in log in ")
    assert 90 <= len(shown) <= 100


def test_a_server_that_gives_pages_alone_ends_the_run_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each request after minutes of asking: behind the address is something else."""
    monkeypatch.setattr(servers, "SECONDS_ODD", 0.0)
    server.reply = lambda body: (200, {"content-type": "text/html"}, b"<html>Welcome</html>")
    told = (
        rf"{server.url}: is no OpenAI-compatible server: none of 5 answers follows the protocol, the last \(text/html\) is '<html>Welcome"
    )
    with pytest.raises(UserError, match=told):
        answers(engine(server, concurrency=1), ["a"])
    assert len(server.asked) == 5


@pytest.mark.parametrize(("before", "keys", "pages"), [(["fine"], ["odd"], 7), ([], ["a", "b", "c", "odd"], 8)])
def test_pages_between_answers_end_no_run(
    server: Server, before: list[str], keys: list[str], pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks an answer now and then is quicker than a model: one that came, or those still to come, tell that there is one."""
    monkeypatch.setattr(servers, "SECONDS_ODD", 0.0)
    given: list[str] = []
    over = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "odd":
            if len(given) < pages:
                given.append("page")
                return 200, {"content-type": "text/html"}, b"<html>busy</html>"
            over.set()
        elif not before:
            over.wait(20)
        return answer("whole")

    server.reply = reply
    opened = engine(server, concurrency=8)
    answers(opened, before)
    assert {each.text for each in answers(opened, keys).values()} == {"whole"}
    assert len(given) == pages


def test_a_server_elsewhere_is_told(server: Server) -> None:
    server.reply = lambda body: (302, {"location": "/login"}, b"")
    with pytest.raises(UserError, match=rf"{server.url}: answers 302, to /login; correct base_url"):
        answers(engine(server), ["a"])


def test_what_fails_is_told_once_and_not_for_minutes_later(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.reply = lambda body: fault(502, "Bad Gateway") if len(server.asked) < 5 else answer()
    answers(engine(server, concurrency=2), list("abc"))
    assert [each.getMessage() for each in caplog.records] == [f"{server.url}: 502: Bad Gateway; it is asked again"]


def test_a_server_that_goes_away_is_told_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    opened = engine(server)
    answers(opened, ["a"])
    server.close()
    assert all("ConnectError" in str(each.error) for each in answers(opened, ["b", "c"]).values())
    (told,) = [each.getMessage() for each in caplog.records]
    assert told.startswith(f"{server.url}: no server answers there any more (ConnectError: ")


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


def test_a_server_that_wants_hours_is_not_waited_for(server: Server) -> None:
    server.reply = lambda body: fault(429, "daily limit", headers={"retry-after": "36000"})
    found = answers(engine(server), ["a"])["a"]
    assert found.error is not None
    assert found.error.startswith("429: daily limit, and asks to be left alone for")
    assert len(server.asked) == 1


@pytest.mark.parametrize("header", ["soon", "-3", "nan", "inf", "-inf", "1e999"])
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
