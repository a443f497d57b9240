"""The parts of an assistant's turn, found by rendering it otherwise: its thought, what it says, the calls beside that."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from .example import Message
from .reasoning import CLOSE, OPEN

SENTINEL = "\ue000sftkit\ue001"  # private-use characters: no template and no answer holds them
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # what a template may know a turn's thought as
THINKING, TOOL_CALLS = "thinking", "tool_calls"  # what can be left out of a mask

Write = Callable[[Sequence[Message]], str | None]


def thought_length(content: str) -> int:
    """Return where a text's answer begins: after the thought that it begins with; 0 without one.

    The thought stands in `<think>` marks, of which the prompt may have had the first (DeepSeek-R1, Qwen3-Thinking).
    """
    before, closed, _ = content.partition(CLOSE)
    if not closed or (OPEN in before and not before.lstrip().startswith(OPEN)):
        return 0
    end = content.index(CLOSE) + len(CLOSE)
    return end + len(content[end:]) - len(content[end:].lstrip())


def calls_left_out(answers: Iterable[Message], written: Iterable[bool]) -> bool:
    """Say whether a template wrote only the end of an answer that is nothing but tool calls. `written`: the answers' tokens, of a row's."""
    if not any(each.get("tool_calls") and not (each.get("content") or "").strip() for each in answers):
        return False
    turns = [len(list(run)) for here, run in groupby(written) if here]
    return not turns or min(turns) < 2


def trained_part(
    messages: Sequence[Message], turn: int, text: str, span: tuple[int, int], write: Write, leave_out: Sequence[str]
) -> tuple[int, int]:
    """Return which part of an assistant turn's `span` in `text` is trained on when its thought or its calls are left out.

    The thought goes from the turn's begin to where what it says begins, or its calls; where a template does not write it, nothing
    changes. The calls go from the end of what is said before them to the end of the turn, its end-of-turn token too: of a turn that
    only calls, the thought alone stays. `write` gives a conversation as text, None where the template refuses it.
    """
    message, (start, end) = messages[turn], span
    inline = thought_length(message["content"])
    thinks = bool(inline) or any(_thought(message, name) for name in THOUGHT_FIELDS)
    thinks = thinks and write(_with(messages, turn, _thinking(message, SENTINEL))) != text
    calls = bool(message.get("tool_calls"))
    masks_calls = calls and TOOL_CALLS in leave_out and write(_with(messages, turn, _without_calls(message))) != text
    if not masks_calls and not (thinks and THINKING in leave_out):
        return span

    def before(message: Message) -> str | None:
        """Return the text before what the turn says."""
        marked = {**message, "content": message["content"][: thought_length(message["content"])] + SENTINEL}
        return _until(write(_with(messages, turn, marked)))

    known = before(message)
    # some templates leave out what is said beside calls, and some write it behind them
    talks = known is not None and (not calls or known == before(_calling_others(message)))
    if not talks:
        message = _without_calls(message)
        known = before(message)
    said = end if known is None else min(max(start, common_prefix(known, text)), end)
    if thinks and not talks:  # some write a thought beside calls alone: what stands behind it stands there without it, too
        plain = write(_with(messages, turn, _thinking(messages[turn], ""))) or ""
        said = max(said, min(len(text) - common_suffix(plain, text), end))
    first, last = (said if thinks and THINKING in leave_out else start), end
    if masks_calls:
        answer = message["content"][inline:] if talks else ""
        found = next((each for each in (answer, answer.rstrip(), answer.strip()) if each.strip() and text.startswith(each, said)), "")
        last = said + len(found) if found or thinks else first
    return first, max(first, last)


def _until(text: str | None) -> str | None:
    """Return what stands before the sentinel; None where it is not written."""
    before, found, _ = (text or "").partition(SENTINEL)
    return before if found else None


def _thought(message: Message, name: str) -> str:
    return str(message.get(name) or "").strip()


def _thinking(message: Message, thought: str) -> Message:
    """Return a turn with another thought in the place of its own."""
    content = message["content"]
    fields = {name: thought for name in THOUGHT_FIELDS if _thought(message, name)}
    if thought_length(content):
        close = content.index(CLOSE)
        begin = content.index(OPEN) + len(OPEN) if OPEN in content[:close] else 0
        content = content[:begin] + thought + content[close:]
    return {**message, **fields, "content": content}


def _calling_others(message: Message) -> Message:
    """Return a turn that calls functions of other names."""

    def other(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        return {**call, "name": f"{call['name']}_"} if "name" in call else {**call, "function": other(call.get("function"))}

    return {**message, "tool_calls": [other(each) for each in message["tool_calls"]]}


def _with(messages: Sequence[Message], turn: int, message: Message) -> list[Message]:
    return [*messages[:turn], message, *messages[turn + 1 :]]


def _without_calls(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tool_calls"}


def common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    length = min(len(one), len(other))
    for position in range(length):
        if one[position] != other[position]:
            return position
    return length


def common_suffix(one: str, other: str) -> int:
    """Return how many characters two texts end with alike."""
    return len(one) if other.endswith(one) else common_prefix(one[::-1], other[::-1])
