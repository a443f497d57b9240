"""The engine for servers, against a real one in a thread: what is sent, what an answer says, and how requests and answers flow."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai_client import SECRET, answers, engine, request, threads
from openai_server import Reply, Server, answer, fault
from sftkit.core.engines.base import NOT_FINITE, Completion, Request, ScoreRequest
from sftkit.core.errors import UserError

TEXT = {"type": "text", "text": "hm"}
INFINITE = f"{NOT_FINITE} for one of its tokens, by the server's log-probabilities"
UNCOUNTED = "the server does not tell how many tokens the answer has (no count in usage that is a number from 0, no log-probabilities)"
NO_NUMBER = "Out of range float values are not JSON compliant: nan"  # vLLM's
pytestmark = pytest.mark.usefixtures("hasty")


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


@pytest.mark.parametrize("count", [-7, "seven", True, None])
def test_what_is_no_count_is_not_taken_for_one(server: Server, count: object) -> None:
    """A budget of tokens would never be used up."""
    usage = {"completion_tokens": count, "prompt_tokens": count}
    server.reply = lambda body: answer("x", usage=usage, **({} if body.get("logprobs") else {"logprobs": None}))
    (found,) = engine(server).generate([replace(request("hi"), logprob=False)])
    assert (found.text, found.num_tokens, found.prompt_tokens) == ("x", 3, None)
    server.reply = lambda body: answer("x", usage=usage, logprobs=None)
    (found,) = engine(server).generate([request("hi")])
    assert found.error == UNCOUNTED


def test_a_server_that_neither_counts_nor_tells_fails_row_by_row(server: Server) -> None:
    server.reply = lambda body: fault(400, "logprobs is not supported") if "logprobs" in body else answer("x", usage=None, logprobs=None)
    (found,) = engine(server).generate([replace(request("hi"), logprob=False)])
    assert found.error == UNCOUNTED
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
            {"error": UNCOUNTED},
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


LEFT = """
import sys
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
engine = open_engine("m", EngineConfig(base_url=sys.argv[1]))
asked = [Request(key=str(each), prompt_ids=(), messages=[{"role": "user", "content": "hi"}], sampling=Sampling(), seed=1) for each in range(9)]
stream = engine.generate(asked)
print(next(stream).text)
"""


def test_answers_that_nobody_takes_do_not_hold_up_the_end_of_a_program(server: Server) -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT, server.url], timeout=120, capture_output=True, text=True, check=True)
    assert ended.stdout == "HI\n"


def test_a_fault_of_the_source_is_the_callers(server: Server) -> None:
    def source() -> Iterator[Request]:
        yield request("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine(server).generate(source()))
    assert threads() == []


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


def test_a_server_scores_no_text(server: Server) -> None:
    with pytest.raises(UserError, match="cannot score texts"):
        engine(server).logprobs([ScoreRequest(key="a", ids=(1, 2), start=1)])


def test_inside_a_running_event_loop(server: Server) -> None:
    """A notebook's cell runs in one."""
    import asyncio

    async def cell() -> dict[str, Completion]:
        return answers(engine(server), ["a"])

    assert asyncio.run(cell())["a"].text == "A"
