"""Servers that speak OpenAI's protocol: their addresses, the key for them, what they say, and how much each has to do."""

import contextlib
import email.utils
import json
import logging
import math
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

import httpx

from ..errors import UserError

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
OTHER_FILES = 256  # that a process has open beside its connections, amply
LEAST_ODD, SECONDS_ODD = 5, 3.0  # answers that are not of the protocol, and for how long, before a server counts as another's
SECONDS_IN_DOUBT = 60.0  # for which answers are held back until each server has told in which model's name it answers


@dataclass(slots=True)
class Load:
    """What a server has to do, and how it has fared."""

    under_way: int = 0
    answered_at: float = field(default_factory=time.monotonic)  # the last time, or when it was found
    faults: int = 0  # in a row
    held_until: float = 0.0  # by time.monotonic: nothing is sent before
    told: bool = False  # its first fault has been told
    understood: bool = False  # has given an answer of the protocol
    odd: int = 0  # answers that are not of the protocol, and when the first of them came
    odd_since: float = math.inf
    down_since: float | None = None  # nobody has listened there since

    def hold(self, seconds: float) -> None:
        """Send nothing for so long: what a server asks of one request it asks of all."""
        self.held_until = max(self.held_until, time.monotonic() + seconds)

    def fared_well(self) -> None:
        """Take note of an answer."""
        self.answered_at = time.monotonic()
        self.faults, self.down_since = 0, None

    def is_no_model_server(self) -> bool:
        """Take note of an answer that is not of the protocol; say whether so many came, and not one that is, that no more is waited for.

        More than twice as many as are under way: what breaks an answer now and then has the others still to come.
        """
        self.odd, self.odd_since = self.odd + 1, min(self.odd_since, time.monotonic())
        enough = self.odd >= LEAST_ODD and self.odd > 2 * self.under_way and time.monotonic() - self.odd_since >= SECONDS_ODD
        return enough and not self.understood

    def at_work(self, seconds: float) -> bool:
        """Say whether it has answered anything for so long."""
        return time.monotonic() - self.answered_at < seconds

    def down(self) -> float:
        """Take note that nobody listens; return for how many seconds that has been so."""
        now = time.monotonic()
        self.down_since = now if self.down_since is None else self.down_since
        return now - self.down_since


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server, and the key for it, which goes into the header of a request and nowhere else."""

    url: str
    key: str | None = field(repr=False)
    load: Load = field(default_factory=Load, compare=False)

    def options(self) -> dict[str, Any]:
        """Return what a client of this server is made with."""
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        return {"headers": headers}

    def tell_first(self, fault: str) -> None:
        """Warn of its first fault: it is asked again for a minute and more before a request fails."""
        if not self.load.told:
            self.load.told = True
            log.warning("%s: %s", self.url, fault)

    def told(self, response: httpx.Response) -> str:
        """Return what a server says about an error: one line, without the key, which some servers repeat."""
        said = error_of(response).get("message")
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
        if status == 402 or error_of(response).get("code") == "insufficient_quota":
            return UserError(f"{self.url}: answers {status}: {self.told(response)}; what finished is kept, the same command goes on")
        return None


class Names:
    """In which model's name each of some servers answers."""

    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._found: dict[str, str] = {}  # by address
        self._told = {asked}
        self._since: float | None = None  # when the doubt began

    def heed(self, server: Server, name: object) -> None:
        """Take note of the name in an answer, which without one is that asked for. Raises UserError for two, of one server or several.

        Another name than was asked for is told alone: many servers have a longer one, with the model's version.
        """
        name = name if isinstance(name, str) and name else self._asked
        before = self._found.setdefault(server.url, name)
        if before != name:
            raise UserError(
                f"{server.url}: answered in the name of {before!r}, and now in that of {name!r}: its samples would be of two models; let it"
                " serve one, and run the same command again. What finished is kept"
            )
        for url, other in self._found.items():
            if other != name:
                raise UserError(
                    f"base_url: {url} answers in the name of {other!r}, and {server.url} in that of {name!r}: several addresses are for one"
                    " and the same model; leave out the one that serves another. What finished is kept"
                )
        if name not in self._told:
            self._told.add(name)
            log.warning("%s answers in the name of %r; make sure that it is %r, which was asked for", server.url, name, self._asked)

    def in_doubt(self, servers: Sequence[Server]) -> bool:
        """Say whether answers come in another name than was asked for while a server that works has not answered, for a while at most."""
        if all(each == self._asked for each in list(self._found.values())):
            return False
        self._since = time.monotonic() if self._since is None else self._since
        late = any(each.url not in self._found and not each.load.faults for each in servers)
        return late and time.monotonic() - self._since < SECONDS_IN_DOUBT


def make_room(connections: int) -> None:
    """Let this process have so many connections open at once. Raises UserError where it may not.

    Without the room each one more fails as if nobody listened, and is tried again and again.
    """
    needed = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"concurrency: {connections:,} connections at once need {needed:,} open files, and this process may have {hard:,}"
            " (`ulimit -Hn`); lower the concurrency, or raise that limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def address_of(text: str) -> str:
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


def key_of_servers() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{KEY}: holds characters that no key has; set it again (its value is not shown here)")
    return key or None


def answer_of(response: httpx.Response) -> Any:
    """Return what an answer holds; None where it is no JSON."""
    try:
        return response.json()
    except ValueError:
        return None


def count_of(found: object) -> int | None:
    """Return a number of tokens that a server tells; None for what is none: with numbers below 0 no budget would ever be used up."""
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def text_and_thoughts(content: Any) -> tuple[str, str | None]:
    """Return the text and the thoughts of a message's content: a text, or a list of parts, of which some may be thoughts.

    Raises TypeError or KeyError for what is neither.
    """
    if content is None:  # nothing was said, or only thought
        return "", None
    if isinstance(content, str):
        return content, None
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        found = part[part["type"]]
        texts[part["type"]].append(found if isinstance(found, str) else text_and_thoughts(found)[0])
    return "".join(texts["text"]), "".join(texts["thinking"]) or None


def written_call(function: dict[str, Any]) -> str:
    """Return a call as text, as models of Qwen's and Hermes' kind write it: the server has taken it out of the text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # the model's own mistake, which stands as it was made
            arguments = json.loads(arguments)
    return f"<tool_call>\n{json.dumps({'name': function['name'], 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error object of an answer: OpenAI's `{"error": {"message", "code", "param"}}`, or what looks like one."""
    found = answer_of(response)
    if isinstance(found, dict):
        inner = found.get("error", found)
        return inner if isinstance(inner, dict) else {"message": inner}
    return {}


def retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a Retry-After header asks for, which gives seconds or a date; None without one, or for no number."""
    text = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())
