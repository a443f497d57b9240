"""How the engine for servers finds its server: addresses, keys and models, before the first request and after."""

import pytest
from openai_client import SECRET, answers, engine, request
from openai_server import Reply, Server, fault
from sftkit.core.engines import openai_engine, servers
from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError

pytestmark = pytest.mark.usefixtures("hasty")


def test_no_key_no_header(server: Server) -> None:
    answers(engine(server), ["hi"])
    assert "authorization" not in {name.lower() for name in server.headers[0]}


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
