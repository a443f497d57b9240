"""The engine for servers: any that speaks OpenAI's protocol, with a bounded number of requests under way."""

import asyncio
import contextlib
import difflib
import json
import logging
import math
import queue
import random
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from ..chat import Chat
from ..errors import UserError, unknown_name
from ..progress import duration
from .base import NOT_FINITE, Completion, EngineConfig, Request, ScoreRequest, TokenLogprobs
from .servers import (
    Names,
    Server,
    address_of,
    answer_of,
    count_of,
    error_of,
    key_of_servers,
    make_room,
    retry_after,
    text_and_thoughts,
    written_call,
)

log = logging.getLogger(__name__)

ATTEMPTS = 10  # of one request: with the waits below about a minute and a half in all, more where the server asks for it
PUT_OFF = 100  # times that a request waits, beside its attempts, for a server that has too many
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled after each failure, and of that a random part (full jitter)
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that wants more is not waited for
TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # an answer may stand in the server's queue for minutes
LONGEST_ANSWER = 1800.0  # seconds, for the whole of it: a server that sends a byte now and then never times out otherwise
PATIENCE = 600.0  # seconds for which nobody listens at an address before that counts as failing: a server starts anew in minutes
RETRIED = (408, 409, 425, 429)  # and 5xx but those of NOT_THERE
NOT_THERE = (404, 405, 501)  # what an address answers that is another's than a model server's, or has no such model
REASONS: dict[str, Literal["stop", "length"]] = {"stop": "stop", "eos": "stop", "length": "length", "max_tokens": "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's word for "not among the twenty most probable tokens": no number
DISPENSABLE = {  # what is left out from the first refusal on, and what is lost with it
    "logprobs": "answers have no log-probability",
    "seed": "an answer cannot be made a second time, and servers that begin with the same random numbers give the same answers",
    "n": "nothing is lost",
}
UNCOUNTED = "the server does not tell how many tokens the answer has (no count in usage that is a number from 0, no log-probabilities)"
NO_TOKEN = "the server ended the answer before its first token"
NO_PARSER = re.compile(r"auto\W{0,3}tool.choice|tool.call.parser")  # vLLM's words, started without
NO_NUMBER = "not JSON compliant"  # Python's word, and so that of vLLM's server, for a NaN among the log-probabilities
DECISIVE = ("temperature", "top_p", "response_format", "stop")
REFUSAL = re.compile(
    r"unsupported|not (?:be )?(?:supported|allowed|permitted|available|enabled|compatible)|do(?:es)?(?: not|n't) support"
    r"|unrecogni[sz]ed|unknown|unexpected|extra (?:input|field)|disabled|invalid parameter|cannot be (?:used|set)"
)


class OpenAIEngine:
    """Asks servers of the same model for answers, each time the one with the least to do. See `core.engines.base.Engine`.

    A server's weights cannot be hashed: samples stay valid when it changes what it serves under a name. Its identity is the model's
    name with the revision that the user says it is, wherever it is served; without one, the name at that address (of several, the
    first: one may be added without making samples stale). It renders the messages itself and has its own words for the
    log-probability: vLLM's is the model's own, before temperature and top-p; others may count otherwise, or not tell.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        *,
        models: Sequence[str],
        context_length: int | None,
        concurrency: int,
        revision: str | None = None,
    ) -> None:
        self.chat: Chat | None = None
        self.identity = f"openai:{model}@{revision}" if revision else f"openai:{servers[0].url}:{model}"
        self.context_length = context_length
        self._servers, self._model, self._models = servers, model, models
        self._concurrency = concurrency
        self._refused: set[str] = set()  # names of DISPENSABLE
        self._length = "max_tokens"
        self._counts = True  # tells how many tokens an answer has; where not, its log-probabilities do
        self._parses = True  # finds the calls in an answer of a model that was told of functions
        self._names = Names(model)
        self.steps = 0  # answers

    def close(self) -> None:
        """Do nothing: no connection outlives `generate`."""

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Raise UserError: the protocol has no way to score a given text."""
        raise UserError(f"{self._servers[0].url}: a server cannot score texts; use the engine transformers or vllm, with the model's files")

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; each completion is given as it comes. Twice what may be under way is taken ahead, so that no slot waits.

        A request that fails for good comes back with its error. Raises UserError where none can succeed: a key or a model
        that the server does not take, or a server that has stopped answering.
        """
        waiting: Iterator[Request] | None = iter(requests)
        under_way = failing = 0
        ahead = 2 * self._concurrency * len(self._servers)
        held: list[Completion] = []
        with _Connection(self._servers, self._concurrency) as connection:
            while True:
                while waiting is not None and under_way < ahead:
                    request = next(waiting, None)
                    if request is None:
                        waiting = None
                        break
                    connection.start(self._answer(connection, request))
                    under_way += 1
                    if connection.has_finished():  # a slow source must not hold back what is there
                        break
                if not under_way:
                    yield from held
                    return
                completion, exhausted = connection.next_finished()
                under_way -= 1
                self.steps += 1
                failing = failing + 1 if exhausted else 0
                if failing > ahead:
                    places = ", ".join(each.url for each in self._servers)
                    raise UserError(
                        f"{places}: has stopped answering: {failing} requests in a row failed, the last with: {completion.error};"
                        " what finished is kept, and the same command goes on from here"
                    )
                held.append(completion)
                if not self._names.in_doubt(self._servers):
                    yield from held
                    held.clear()

    async def _answer(self, connection: "_Connection", request: Request) -> tuple[Completion, bool]:
        """Return the completion, and whether all attempts failed for a fault of the servers."""
        async with connection.slots:
            attempt, put_off = 1, 0
            while True:
                server = await connection.least_busy()
                try:
                    found = await self._attempt(connection, server, request)
                finally:
                    await connection.release(server)
                if isinstance(found, Completion):
                    server.load.fared_well()
                    return found, False
                if found is None:  # it was asked for what it does not know, and is asked for less now
                    continue
                server.load.faults += 1
                server.tell_first(f"{found.told}; it is asked again")
                if attempt == ATTEMPTS or (found.asked or 0) > LONGEST_RETRY_AFTER:
                    ending = f"after {attempt} attempts" if attempt == ATTEMPTS else f"and asks to be left alone for {found.asked:.0f} s"
                    return Completion(key=request.key, finish_reason="error", error=f"{found.told}, {ending}"), True
                if found.asked is not None or found.of_all:
                    server.load.hold(_wait(server.load.faults) if found.asked is None else found.asked)
                if 0 < found.down < PATIENCE:  # it starts anew
                    continue
                if found.of_all and server.load.at_work(PATIENCE) and put_off < PUT_OFF:  # it is at its limit, and answers others
                    put_off += 1
                    continue
                if not found.of_all:
                    await asyncio.sleep(_wait(attempt))
                attempt += 1

    async def _attempt(self, connection: "_Connection", server: Server, request: Request) -> "Completion | _Fault | None":
        """Ask once; return the completion, what went wrong, or None where the next attempt asks for less."""
        body = self._body(request)
        try:
            async with asyncio.timeout(LONGEST_ANSWER):
                # with every character above ASCII escaped, half surrogate pairs too, which UTF-8 cannot hold
                async with connection.client(server) as client:
                    response = await client.post(f"{server.url}/chat/completions", content=json.dumps(body))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if server.load.down_since is None:
                server.load.told = True
                log.warning(
                    "%s: no server answers there any more (%s); asking again for up to %s", server.url, _named(error), duration(PATIENCE)
                )
            return _Fault(_named(error), of_all=True, down=max(server.load.down(), 1e-9))
        except httpx.RequestError as error:
            return _Fault(_named(error))
        except TimeoutError:
            return _Fault(f"no whole answer within {LONGEST_ANSWER:g} s")
        if response.is_success:
            answer = answer_of(response)
            found = self._read(request, answer)
            if found is None:
                kind, said = response.headers.get("content-type", "no type"), server.told(response)
                if server.load.is_no_model_server():
                    raise UserError(
                        f"{server.url}: is no OpenAI-compatible server: none of {server.load.odd:,} answers follows the protocol, the last"
                        f" ({kind}) is {said[:100]!r}; correct base_url. What finished is kept"
                    )
                server.tell_first(f"an answer is not of the protocol ({kind}) and is asked for again: {said!r:.100}")
                return _Fault(f"an answer that is not of the protocol: {said}")
            server.load.understood = True
            self._names.heed(server, answer.get("model"))
            uncounted = found.error == UNCOUNTED and not self._counts  # from now on log-probabilities are asked for, which can be counted
            return None if uncounted and "logprobs" not in {*body, *self._refused} else found
        if self._adapts(server, body, response):
            return None
        self._check(server, response)
        told = f"{response.status_code}: {server.told(response)}"
        if "logprobs" in body and NO_NUMBER in told:
            return Completion(key=request.key, finish_reason="error", error=f"{NOT_FINITE} for one of its tokens; the server says {told}")
        if response.status_code not in RETRIED and response.status_code < 500:
            return Completion(key=request.key, finish_reason="error", error=told)
        return _Fault(told, of_all=response.status_code == 429, asked=retry_after(response))

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": self._model,
            "messages": request.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._length: sampling.max_new_tokens,
            "n": 1,
        }
        if request.logprob or not self._counts:
            body["logprobs"] = True
        if sampling.temperature > 0:
            # vLLM's own numbers are those of its start: without a seed, another server, or this one started anew, says the same again
            body["seed"] = request.seed % 2**31  # some servers take no longer one
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": json.loads(sampling.json_schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if request.tools:
            body["tools"] = list(request.tools)
            if not self._parses:
                body["tool_choice"] = "none"
        return {name: value for name, value in body.items() if name not in self._refused}

    def _adapts(self, server: Server, body: dict[str, Any], response: httpx.Response) -> bool:
        """Leave out for good what a server refuses, if the answers stay the same without it; say whether to ask again."""
        if response.status_code not in (400, 422):
            return False
        said = response.text[:4000].lower()
        if "tools" in body and "tool_choice" not in body and NO_PARSER.search(said):
            # told so, vLLM writes the functions into the prompt all the same, and leaves calls in the text as the model writes them
            self._parses = False
            return True
        if not REFUSAL.search(said):
            return False
        if "max_tokens" in body and "max_completion_tokens" in said:
            self._length = "max_completion_tokens"
            return True
        for name, loss in DISPENSABLE.items():
            if name in body and re.search(rf"\b{name}\b", said):
                if name not in self._refused:
                    self._refused.add(name)
                    log.warning("%s does not take %r: %s", server.url, name, loss)
                return True
        for name in DECISIVE:
            if name in body and (error_of(response).get("param") == name or re.search(rf"['\"`]{name}['\"`]", said)):
                value = "with a JSON schema" if name == "response_format" else body[name]
                raise UserError(f"{server.url}: {self._model} does not take {name} {value}: {server.told(response)}; give what it takes")
        return False

    def _check(self, server: Server, response: httpx.Response) -> None:
        """Raise UserError for an answer that all requests would get."""
        refusal = server.refusal(response)
        if refusal:
            raise refusal
        if response.is_redirect:
            raise UserError(f"{server.url}: answers {response.status_code}, to {response.headers.get('location')}; correct base_url")
        if response.status_code in NOT_THERE:
            serves = f"it serves {', '.join(_nearest(self._model, self._models))}" if self._models else "it does not tell its models"
            raise UserError(
                f"{server.url}: answers {response.status_code} for the model {self._model!r} ({server.told(response)});"
                f" {serves}: check the teacher's name and the address"
            )

    def _read(self, request: Request, answer: Any) -> Completion | None:
        """Return the completion that an answer holds; None where it is not of the protocol."""
        try:
            choice = answer["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
            end = REASONS.get(reason)
            text, thoughts = text_and_thoughts(message.get("content"))
            calls = [written_call(each["function"]) for each in message.get("tool_calls") or []]
            listed = (choice.get("logprobs") or {}).get("content") or []
            logprobs = [math.nan if each["logprob"] is None else float(each["logprob"]) for each in listed]  # null: some servers' NaN
            usage = answer.get("usage") or {}
            counted, asked = count_of(usage.get("completion_tokens")), count_of(usage.get("prompt_tokens"))
            thoughts = message.get("reasoning_content") or message.get("reasoning") or thoughts
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
        if calls:
            text, end = "\n".join([text, *calls] if text else calls), "stop" if reason == "tool_calls" else end
        if counted == 0 and (text or thoughts):  # no count
            counted = None
        self._counts = self._counts and counted is not None
        num_tokens = len(logprobs) if counted is None else counted
        error = None
        if message.get("refusal"):
            error = f"the server refuses: {' '.join(str(message['refusal']).split())[:300]}"
        elif end is None:
            error = f"the server ended the answer with {reason!r}"
        elif not num_tokens:
            error = UNCOUNTED if counted is None else NO_TOKEN
        elif not all(math.isfinite(each) for each in logprobs):
            error = f"{NOT_FINITE} for one of its tokens, by the server's log-probabilities"
        if error or end is None:
            return Completion(key=request.key, finish_reason="error", error=error)
        known = logprobs and min(logprobs) > LEAST_LOGPROB
        return Completion(
            key=request.key,
            text=text,
            finish_reason=end,
            num_tokens=num_tokens,
            logprob=math.fsum(logprobs) / len(logprobs) if known else None,
            reasoning=thoughts if isinstance(thoughts, str) else None,
            prompt_tokens=asked,
        )


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why an attempt failed."""

    told: str
    of_all: bool = False  # every request would fare as this one did
    asked: float | None = None  # seconds that the server wants to be left alone
    down: float = 0.0  # seconds for which nobody has listened there


class _Connection:
    """Clients in an event loop in a thread of its own. Leaving it cancels what is under way and ends the thread.

    Our own loop, since the caller's thread may have one that runs (a notebook), and since answers must go on coming in while
    the caller is busy with one. Each request under way has a client with one connection: httpx's pool looks at every connection
    for every request, which with 256 of them takes several times as long as all the rest.
    """

    def __init__(self, servers: Sequence[Server], concurrency: int) -> None:
        total = concurrency * len(servers)
        self._trust = httpx.create_ssl_context()  # takes longer than all the rest of a client
        self._clients: list[httpx.AsyncClient] = []
        self._idle: dict[str, list[httpx.AsyncClient]] = {each.url: [] for each in servers}
        self.slots = asyncio.Semaphore(total)
        self._servers, self._concurrency = servers, concurrency
        self._changed = asyncio.Condition()
        self._finished: queue.SimpleQueue[Future[tuple[Completion, bool]]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sftkit-openai", daemon=True)

    def __enter__(self) -> "_Connection":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if sys.is_finalizing():  # the thread stands still for good, and would be waited for for ever
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients:
            await client.aclose()

    @contextlib.asynccontextmanager
    async def client(self, server: Server) -> AsyncIterator[httpx.AsyncClient]:
        """Lend a client for one request to a server: the one that came back last, so that few connections stay open."""
        idle = self._idle[server.url]
        if idle:
            client = idle.pop()
        else:
            limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
            client = httpx.AsyncClient(**server.options(), verify=self._trust, timeout=TIMEOUT, limits=limits)
            self._clients.append(client)
        try:
            yield client
        finally:
            idle.append(client)

    def start(self, work: Coroutine[Any, Any, tuple[Completion, bool]]) -> None:
        """Begin to answer a request."""
        asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(self._finished.put)

    def has_finished(self) -> bool:
        """Say whether `next_finished` would return at once."""
        return not self._finished.empty()

    def next_finished(self) -> tuple[Completion, bool]:
        """Wait for the next request to end, and return or raise what came of it."""
        return self._finished.get().result()

    async def least_busy(self) -> Server:
        """Wait until a server may be asked; return the one with the least under way, counted as having one more. Then `release` it."""
        async with self._changed:
            while True:
                now = time.monotonic()
                with_room = [each for each in self._servers if each.load.under_way < self._concurrency]
                free = [each for each in with_room if each.load.held_until <= now]
                if free:
                    server = min(free, key=lambda each: each.load.under_way)
                    server.load.under_way += 1
                    return server
                left = min((each.load.held_until - now for each in with_room), default=None)
                if left is not None:
                    left += random.uniform(0, min(left, FIRST_WAIT))  # not all at the same moment
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()

    async def release(self, server: Server) -> None:
        """Take note that a request to a server has ended."""
        server.load.under_way -= 1
        async with self._changed:
            self._changed.notify()


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> OpenAIEngine:
    """Look for a model at a server. Raises UserError for an address without server, or a server without the model.

    A server that has no list of models is taken at its word.
    """
    if not config.base_url:
        raise UserError("engine openai: needs base_url, the address of a server, as http://localhost:8000/v1")
    servers = [Server(address, key_of_servers()) for address in dict.fromkeys(map(address_of, config.base_url.split(",")))]
    make_room(config.concurrency * len(servers))
    contexts, names = [], []
    for server in servers:
        entries = _models(server)
        names = [str(each["id"]) for each in entries]
        if names and model not in names:
            raise unknown_name("model", model, _nearest(model, names), server.url)
        entry = next((each for each in entries if each["id"] == model), {})
        lengths = [entry.get(name) for name in ("max_model_len", "context_length", "context_window")]  # vLLM's name, and others'
        contexts += [each for each in lengths if isinstance(each, int)][:1]
    context = min(contexts, default=None)
    return OpenAIEngine(servers, model, models=names, context_length=context, concurrency=config.concurrency, revision=revision)


def _models(server: Server) -> list[dict[str, Any]]:
    """Return the models that a server lists, none if it has no list."""
    with httpx.Client(**server.options(), timeout=30.0) as client:
        for attempt in range(1, 4):
            try:
                response = client.get(f"{server.url}/models")
            except httpx.RequestError as error:
                raise UserError(f"{server.url}: no server answers there ({_named(error)}); start it, or correct base_url") from None
            if response.status_code not in RETRIED and response.status_code < 500:
                break
            if attempt < 3:
                time.sleep(min(retry_after(response) or _wait(attempt), LONGEST_WAIT))
    refusal = server.refusal(response)
    if refusal:
        raise refusal
    if response.status_code in NOT_THERE:
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


def _named(error: httpx.RequestError) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _wait(attempt: int) -> float:
    """Return the seconds to wait after a failed attempt: exponential, full jitter."""
    return random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
