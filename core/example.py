"""The four records that flow through every room: an example, a sample of a teacher, a score, a decision."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Tool = dict[str, Any]  # {"type": "function", "function": {"name": ..., "parameters": ...}}: one that can be called
Message = dict[str, Any]  # {"role": ..., "content": ...}, and what a format adds (tool_calls, name, ...)
T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation. Its id is `content_id(messages)`; a repeated row gets `~2`, `~3`, … so that ids are unique in a set."""

    id: str
    messages: list[Message]
    source: str = ""  # where it came from: file:row
    meta: dict[str, Any] = field(default_factory=dict)  # every other column of the row, unchanged


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a teacher. `logprob` is the mean over its tokens, in nats; None where the engine does not tell."""

    example_id: str
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    logprob: float | None
    model: str
    sampling_key: str
    reasoning: str | None = None  # what a thinking teacher thought before the text; its tokens count
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A number attached to a row. `value` None means it could not be scored; it is never replaced by a number."""

    example_id: str
    sample_index: int | None
    name: str
    value: float | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one stage did with one row, and why. `witness_id` is the kept row that stands for a removed one."""

    example_id: str
    sample_index: int | None
    stage: str
    action: Literal["kept", "rejected", "failed"]
    rule: str = ""
    score: float | None = None
    threshold: float | None = None
    witness_id: str | None = None


def content_id(messages: Sequence[Message]) -> str:
    """Return 16 hex digits (64 bits) of the SHA-256 of the canonical JSON of the messages."""
    canonical = json.dumps(list(messages), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def row_id(example_id: str, sample_index: int | None) -> str:
    """Return how a row is written for people and in `witness_id`: `ID`, or `ID/INDEX` for a sample of a teacher."""
    return example_id if sample_index is None else f"{example_id}/{sample_index}"


def evenly_spaced(rows: Sequence[T], most: int) -> list[T]:
    """Return up to `most` of the rows, evenly spaced and in their order; the same ones each time."""
    count = min(len(rows), most)
    return [rows[place * len(rows) // count] for place in range(count)]


def sent(messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return what decides an answer where a server renders: the messages, and the functions where there are any."""
    return [*messages, {"tools": list(tools)}] if tools else messages


def tools_of(meta: Mapping[str, Any]) -> tuple[Tool, ...]:
    """Return the functions that a row says can be called, in its column `tools`: a list or JSON text, also of each; else none.

    Each is {"type": "function", "function": …}, as chat templates expect it, where it was given bare, too.
    """
    found = _parsed(meta.get("tools"))
    found = [_parsed(each) for each in found] if isinstance(found, list) else []
    if not all(isinstance(each, dict) and ("function" in each or "name" in each) for each in found):
        return ()
    return tuple(each if "function" in each else {"type": "function", "function": each} for each in found)


def _parsed(value: Any) -> Any:
    """Return what a JSON text holds, None for another text; what is no text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None
