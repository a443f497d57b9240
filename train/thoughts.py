"""The thoughts of a row that its chat template leaves out: some write none, some only those after the last question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.chat import Chat
from ..core.errors import UserError
from ..core.example import Example, Message, tools_of
from ..core.parts import THOUGHT_FIELDS
from ..core.reasoning import CLOSE, OPEN, split_reasoning

IN_TEXT = f"{OPEN} in the text"

Shape = tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Thoughts of a row that are not in what is trained on: how they stand in it, and whether the last answer has its own."""

    kind: str
    earlier: bool


class Thoughts:
    """Tells what is lost of rows. A template is asked once for each order of turns and thoughts: what they say does not matter to it."""

    def __init__(self, chat: Chat, train_on: str) -> None:
        self._chat, self._last_alone = chat, train_on == "last"
        self._known: dict[tuple[Shape, bool], set[Lost]] = {}

    def lost(self, example: Example) -> set[Lost]:
        """Return what is lost of a row's thoughts, of those of the answers that are trained on."""
        kinds = [_kind(each) for each in example.messages]
        if not any(kinds):
            return set()
        shape = tuple((each["role"], kind, bool(each.get("tool_calls"))) for each, kind in zip(example.messages, kinds, strict=True))
        key = shape, bool(tools_of(example.meta))
        if key not in self._known:
            self._known[key] = self._try(example, kinds)
        return self._known[key]

    def _try(self, example: Example, kinds: Sequence[str]) -> set[Lost]:
        marks = [f"thought{place}end" if kind else "" for place, kind in enumerate(kinds)]
        marked = [_marked(each, kind, mark) for each, kind, mark in zip(example.messages, kinds, marks, strict=True)]
        try:
            text = self._chat.decode(self._chat.render(marked, tools=tools_of(example.meta)).ids)
        except UserError:  # it takes the row with its own thoughts, and not with these
            return set()
        last = max(place for place, each in enumerate(example.messages) if each["role"] == "assistant")
        asked = [place for place, kind in enumerate(kinds) if kind and (place == last or not self._last_alone)]
        return {Lost(kinds[place], earlier=place != last) for place in asked if marks[place] not in text}


def _kind(message: Message) -> str:
    """Return how a turn has thoughts; nothing where it has none."""
    if message["role"] != "assistant":
        return ""
    named = next((name for name in THOUGHT_FIELDS if str(message.get(name) or "").strip()), "")
    content = message.get("content")
    return named or (IN_TEXT if isinstance(content, str) and CLOSE in content and split_reasoning(content)[0] else "")


def _marked(message: Message, kind: str, mark: str) -> dict[str, Any]:
    if kind == IN_TEXT:
        return {**message, "content": f"{OPEN}\n{mark}\n{CLOSE}\n\n{split_reasoning(str(message['content']))[1]}"}
    return {**message, kind: mark} if kind else dict(message)
