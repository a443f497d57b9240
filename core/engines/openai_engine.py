"""The engine for servers: any that speaks OpenAI's protocol, with a bounded number of requests under way."""

import asyncio
import difflib
import email.utils
import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any, Literal

import httpx

from ..chat import Chat
from ..errors import UserError, unknown_name
from .base import Completion, EngineConfig, Request, ScoreRequest, TokenLogprobs

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
ATTEMPTS = 10  # of one request: with the waits below about a minute and a half in all, more where the server asks for it
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled after each failure, and of that a random part (full jitter)
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that wants more is not waited for
TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # an answer may stand in the server's queue for minutes
RETRIED = (408, 409, 425, 429)  # and 5xx
REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "eos": "stop", "length": "length", "max_tokens": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's word for "not among the twenty most probable tokens": no number
DISPENSABLE = {  # what is left out from the first refusal on, and what is lost with it
    "logprobs": "answers have no log-probability",
    "seed": "an answer cannot be made a second time",
    "n": "nothing is lost",
}
DECISIVE = ("temperature", "top_p")
REFUSAL = re.compile(
    r"unsupported|not (?:be )?(?:supported|allowed|permitted|available|enabled|compatible)|do(?:es)?(?: not|n't) support"
    r"|unrecogni[sz]ed|unknown|unexpected|extra (?:input|field)|disabled|invalid parameter|cannot be (?:used|set)"
)


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server, and the key for it, which goes into the header of a request and nowhere else."""

    url: str
    key: str | None = field(repr=False)

    def options(self) -> dict[str, Any]:
        """Return what a client of this server is made with."""
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        return {"base_url": f"{self.url}/", "headers": headers, "timeout": TIMEOUT}

    def told(self, response: httpx.Response) -> str:
        """Return what a server says about an error: one line, without the key, which some servers repeat."""
        said = _error_of(response).get("message")
        text = " ".join(str(said or response.text).split()) or response.reason_phrase
        if self.key:
            text = text.replace(self.key, "[key]")
        return text if len(text) <= 300 else text[:299] + "…"

    def refusal(self, response: httpx.Response) -> UserError | None:
        """Return the error of an answer that no other request will fare better with."""
        status = response.status_code
        if status in (401, 403):
            state = "is not accepted by this server, or not for this model" if self.key else "is not set"
            return UserError(f"{self.url}: answers {status}: the key in {KEY} {state}; set {KEY} to a key of this server")
        if status == 402 or _error_of(response).get("code") == "insufficient_quota":
            return UserError(f"{self.url}: answers {status}: {self.told(response)}; what finished is kept, the same command goes on")
        return None


class OpenAIEngine:
    """Asks a server for answers. See `core.engines.base.Engine`.

    A server's weights cannot be hashed: its identity is its address and the model's name there, so samples stay valid when
    the server changes what it serves under that name. It renders the messages itself and has its own words for the
    log-probability: vLLM's is the model's own, before temperature and top-p; others may count otherwise, or not tell.
    """

    def __init__(self, server: Server, model: str, *, models: Sequence[str], context_length: int | None, concurrency: int) -> None:
        self.chat: Chat | None = None
        self.identity = f"openai:{server.url}:{model}"
        self.context_length = context_length
        self._server, self._model, self._models = server, model, models
        self._concurrency = concurrency
        self._refused: set[str] = set()  # names of DISPENSABLE
        self._length = "max_tokens"
        self.steps = 0  # answers

    def close(self) -> None:
        """Do nothing: no connection outlives `generate`."""

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Raise UserError: the protocol has no way to score a given text."""
        raise UserError(f"{self._server.url}: a server cannot score texts; use the engine transformers or vllm, with the model's files")

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; each completion is given as it comes. Twice `concurrency` are taken ahead, so that no slot waits.

        A request that fails for good comes back with its error. Raises UserError where none can succeed: a key or a model
        that the server does not take, or a server that has stopped answering.
        """
        waiting: Iterator[Request] | None = iter(requests)
        under_way = failing = 0
        with _Connection(self._server, self._concurrency) as connection:
            while True:
                while waiting is not None and under_way < 2 * self._concurrency:
                    request = next(waiting, None)
                    if request is None:
                        waiting = None
                        break
                    connection.start(self._answer(connection, request))
                    under_way += 1
                    if connection.has_finished():  # a slow source must not hold back what is there
                        break
                if not under_way:
                    return
                completion, exhausted = connection.next_finished()
                under_way -= 1
                self.steps += 1
                failing = failing + 1 if exhausted else 0
                if failing > 2 * self._concurrency:
                    raise UserError(
                        f"{self._server.url}: has stopped answering: {failing} requests in a row failed, the last with: {completion.error};"
                        " what finished is kept, and the same command goes on from here"
                    )
                yield completion

    async def _answer(self, connection: "_Connection", request: Request) -> tuple[Completion, bool]:
        """Return the completion, and whether all attempts failed for a fault of the server."""
        async with connection.slots:
            attempt = 1
            while True:
                await connection.held()
                body = self._body(request)
                asked = None  # seconds that the server wants to be left alone
                try:
                    # with every character above ASCII escaped, half surrogate pairs too, which UTF-8 cannot hold
                    response = await connection.client.post("chat/completions", content=json.dumps(body))
                except httpx.RequestError as error:
                    fault = _named(error)
                else:
                    if response.is_success:
                        completion = self._read(request, response)
                        if completion is not None:
                            return completion, False
                        fault = f"an answer that is not of the protocol: {self._server.told(response)}"
                    else:
                        if self._adapts(body, response):
                            continue
                        self._check(response)
                        fault = f"{response.status_code}: {self._server.told(response)}"
                        if response.status_code not in RETRIED and response.status_code < 500:
                            return Completion(key=request.key, finish_reason="error", error=fault), False
                        asked = _retry_after(response)
                if attempt == ATTEMPTS or (asked or 0) > LONGEST_RETRY_AFTER:
                    ending = f"after {attempt} attempts" if attempt == ATTEMPTS else f"and asks to be left alone for {asked:.0f} s"
                    return Completion(key=request.key, finish_reason="error", error=f"{fault}, {ending}"), True
                if asked is not None:
                    connection.hold(asked)
                await asyncio.sleep(_wait(attempt))
                attempt += 1

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": self._model,
            "messages": request.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._length: sampling.max_new_tokens,
            "n": 1,
            "seed": request.seed % 2**31,  # some servers take no longer one
            "logprobs": True,
        }
        return {name: value for name, value in body.items() if name not in self._refused}

    def _adapts(self, body: dict[str, Any], response: httpx.Response) -> bool:
        """Leave out for good what a server refuses, if the answers stay the same without it; say whether to ask again."""
        if response.status_code not in (400, 422):
            return False
        said = response.text[:4000].lower()
        if not REFUSAL.search(said):
            return False
        if "max_tokens" in body and "max_completion_tokens" in said:
            self._length = "max_completion_tokens"
            return True
        for name, loss in DISPENSABLE.items():
            if name in body and re.search(rf"\b{name}\b", said):
                if name not in self._refused:
                    self._refused.add(name)
                    log.warning("%s does not take %r: %s", self._server.url, name, loss)
                return True
        for name in DECISIVE:
            if _error_of(response).get("param") == name or re.search(rf"['\"`]{name}['\"`]", said):
                told = self._server.told(response)
                raise UserError(f"{self._server.url}: {self._model} does not take {name} {body[name]}: {told}; give what it takes")
        return False

    def _check(self, response: httpx.Response) -> None:
        """Raise UserError for an answer that all requests would get."""
        refusal = self._server.refusal(response)
        if refusal:
            raise refusal
        if response.status_code in (404, 405):
            serves = f"it serves {', '.join(_nearest(self._model, self._models))}" if self._models else "it does not tell its models"
            raise UserError(
                f"{self._server.url}: answers {response.status_code} for the model {self._model!r} ({self._server.told(response)});"
                f" {serves}: check the teacher's name and the address"
            )

    def _read(self, request: Request, response: httpx.Response) -> Completion | None:
        """Return the completion that an answer holds; None where it is not of the protocol."""
        try:
            answer = response.json()
            choice = answer["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
            text = message.get("content")
            listed = (choice.get("logprobs") or {}).get("content") or []
            logprobs = [float(each["logprob"]) for each in listed]
            counted = (answer.get("usage") or {}).get("completion_tokens")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
        num_tokens = counted if isinstance(counted, int) else len(logprobs)
        error = None
        if message.get("refusal"):
            error = f"the server refuses: {' '.join(str(message['refusal']).split())[:300]}"
        elif reason not in REASONS:
            error = f"the server ended the answer with {reason!r}"
        elif not num_tokens:
            error = "the server does not tell how many tokens the answer has (no usage, no log-probabilities)"
        elif not all(math.isfinite(each) for each in logprobs):
            error = "the server gave a log-probability that is not finite"
        if error:
            return Completion(key=request.key, finish_reason="error", error=error)
        known = logprobs and min(logprobs) > LEAST_LOGPROB
        return Completion(
            key=request.key,
            text=text or "",  # None where nothing was said, or only thought
            finish_reason=REASONS[reason],
            num_tokens=num_tokens,
            logprob=math.fsum(logprobs) / len(logprobs) if known else None,
        )


class _Connection:
    """A client in an event loop in a thread of its own. Leaving it cancels what is under way and ends the thread.

    Our own loop, since the caller's thread may have one that runs (a notebook), and since answers must go on coming in while
    the caller is busy with one.
    """

    def __init__(self, server: Server, concurrency: int) -> None:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.client = httpx.AsyncClient(**server.options(), limits=limits)
        self.slots = asyncio.Semaphore(concurrency)
        self._held_until = 0.0
        self._finished: queue.SimpleQueue[Future[tuple[Completion, bool]]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sftkit-openai", daemon=True)

    def __enter__(self) -> "_Connection":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()

    def start(self, work: Coroutine[Any, Any, tuple[Completion, bool]]) -> None:
        """Begin to answer a request."""
        asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(self._finished.put)

    def has_finished(self) -> bool:
        """Say whether `next_finished` would return at once."""
        return not self._finished.empty()

    def next_finished(self) -> tuple[Completion, bool]:
        """Wait for the next request to end, and return or raise what came of it."""
        return self._finished.get().result()

    def hold(self, seconds: float) -> None:
        """Let no request begin for so long: what a server asks of one it asks of all."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    async def held(self) -> None:
        """Wait until requests may begin."""
        while (left := self._held_until - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, min(left, FIRST_WAIT)))  # not all at the same moment


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> OpenAIEngine:
    """Look for a model at a server. Raises UserError for an address without server, or a server without the model.

    A server that has no list of models is taken at its word.
    """
    if not config.base_url:
        raise UserError("engine openai: needs base_url, the address of a server, as http://localhost:8000/v1")
    if revision is not None:
        raise UserError(f"revision {revision}: a server chooses what it serves; leave the revision out")
    if config.concurrency < 1:
        raise UserError(f"concurrency: expected 1 or more, found {config.concurrency}")
    server = Server(_address(config.base_url), _key())
    entries = _models(server)
    names = [str(each["id"]) for each in entries]
    if names and model not in names:
        raise unknown_name("model", model, _nearest(model, names), server.url)
    entry = next((each for each in entries if each["id"] == model), {})
    lengths = [entry.get(name) for name in ("max_model_len", "context_length", "context_window")]  # vLLM's name, and others'
    context = next((each for each in lengths if isinstance(each, int)), None)
    return OpenAIEngine(server, model, models=names, context_length=context, concurrency=config.concurrency)


def _address(text: str) -> str:
    """Return the canonical form of a server's address, by which its samples are known."""
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise UserError(f"base_url {text!r}: is no address ({error}); give one like http://localhost:8000/v1") from None
    if url.userinfo:
        raise UserError(f"base_url: holds a user name or password, which would be written down; take it out and set {KEY}")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"base_url {text!r}: expected http:// or https:// and a server, as http://localhost:8000/v1")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return str(url.copy_with(path=path or "/v1", query=None, fragment=None))


def _key() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{KEY}: holds characters that no key has; set it again (its value is not shown here)")
    return key or None


def _models(server: Server) -> list[dict[str, Any]]:
    """Return the models that a server lists, none if it has no list."""
    with httpx.Client(**{**server.options(), "timeout": 30.0}) as client:
        for attempt in range(1, 4):
            try:
                response = client.get("models")
            except httpx.RequestError as error:
                raise UserError(f"{server.url}: no server answers there ({_named(error)}); start it, or correct base_url") from None
            if response.status_code not in RETRIED and response.status_code < 500:
                break
            if attempt < 3:
                time.sleep(min(_retry_after(response) or _wait(attempt), LONGEST_WAIT))
    refusal = server.refusal(response)
    if refusal:
        raise refusal
    if response.status_code in (404, 405, 501):
        log.info("%s does not list its models", server.url)
        return []
    if not response.is_success:
        where = f" to {response.headers['location']}" if "location" in response.headers else ""
        raise UserError(f"{server.url}: answers {response.status_code}{where} when asked for its models: {server.told(response)}")
    try:
        listed = response.json()["data"]
        return [each for each in listed if isinstance(each["id"], str)]
    except (ValueError, KeyError, TypeError):
        kind = response.headers.get("content-type", "no type")
        raise UserError(f"{server.url}: is no OpenAI-compatible server: its list of models is {kind}; correct base_url") from None


def _nearest(name: str, names: Sequence[str], most: int = 20) -> list[str]:
    """Return all names, or those most like `name` where they are many."""
    if len(names) <= most:
        return list(names)
    return difflib.get_close_matches(name, names, n=most, cutoff=0.0)


def _error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error object of an answer: OpenAI's `{"error": {"message", "code", "param"}}`, or what looks like one."""
    try:
        found = response.json()
    except ValueError:
        return {}
    if isinstance(found, dict):
        inner = found.get("error", found)
        return inner if isinstance(inner, dict) else {"message": inner}
    return {}


def _named(error: httpx.RequestError) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _wait(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt: exponential, full jitter."""
    return random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a Retry-After header asks for, which gives seconds or a date; None without one."""
    text = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())
