"""Many conversations rendered at once: what `Chat.render` gives, in a fraction of its time, on all processors.

`Chat.render` finds each answer by rendering the conversation again, several times a turn. Most templates only put pieces between what
people said: once these pieces are known, one rendering tells the places of all answers, and one pass of the tokenizer their tokens. Each
row is held against its template (what was put together must be what it writes), each begin of an answer against the tokens that a prompt
ends with, and some rows against `Chat.render` itself. Whatever differs goes the long way.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from typing import Any, NamedTuple

from ..core.chat import Chat, How, Rendered
from ..core.errors import UserError
from ..core.example import Message, Tool
from ..core.hardware import usable_cores
from ..core.parts import THINKING, thought_length

log = logging.getLogger(__name__)

PROBES = ("su", "u", "ua", "sua", "uau", "uaua", "suaua", "suau")  # roles of the conversations that pieces are learned from
ROLES = {"s": "system", "u": "user", "a": "assistant"}
CHUNK = 256  # rows that a process takes at once
PARALLEL = 1024  # rows from which a second process pays
AUDITED = 128  # one row of so many is rendered the long way too
MOST_PROCESSES = 16
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Span(NamedTuple):
    """Places of an answer in a text: where its header begins, it, what it says after a thought; its end."""

    header: int
    start: int
    said: int
    end: int


class Pieces:
    """What a template writes around contents; `usable` is False for one that does more than that."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.first: dict[str, str] = {}  # before the first message's content
        self.between: dict[tuple[str, str], str] = {}
        self.last: dict[str, str] = {}  # after the last one's
        self.asked: dict[str, str] = {}  # after it, where an answer is to begin
        self._headers: dict[str, tuple[int, list[int]] | None] = {}
        self.usable = bool(chat.tokenizer.is_fast) and not chat._in_parts and all(map(self._learn, PROBES))
        # tokens that are cut out of a text before all else: what stands on one side of them does not change the other's tokens
        self._cuts = {
            each.content
            for each in chat.tokenizer.added_tokens_decoder.values()
            if each.special and not (each.normalized or each.lstrip or each.rstrip or each.single_word)
        }

    def _learn(self, roles: str) -> bool:
        """Learn the pieces of one conversation; return False for what contradicts those known."""
        marks = [f"\ue000{place}\ue001" for place in range(len(roles))]
        messages: list[Message] = [{"role": ROLES[role], "content": mark} for role, mark in zip(roles, marks, strict=True)]
        for asked in (False, True) if roles[-1] == "u" else (False,):
            text = self.chat._try_text(messages, How(generation_prompt=asked))
            if text is None:
                if roles[0] == "s":
                    continue  # it takes no system message
                return False
            parts = [text]
            for mark in marks:
                *before, rest = parts
                here = rest.split(mark)
                if len(here) != 2:
                    return False
                parts = [*before, *here]
            names = [ROLES[role] for role in roles]
            known: list[tuple[dict[Any, str], Any, str]] = [(self.first, names[0], parts[0])]
            known += [(self.between, pair, piece) for pair, piece in zip(pairwise(names), parts[1:-1], strict=True)]
            known.append((self.asked if asked else self.last, names[-1], parts[-1]))
            if any(table.setdefault(key, piece) != piece for table, key, piece in known):
                return False
        return True

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]] | None:
        """Return a conversation as text, and where its answers stand; None where the long way is needed."""
        if not all(each.keys() <= {"role", "content"} and isinstance(each["content"], str) and each["content"] for each in messages):
            return None
        names = [each["role"] for each in messages]
        if names[0] == "assistant":
            return None
        try:
            pieces = [self.first[names[0]], *(self.between[pair] for pair in pairwise(names)), self.last[names[-1]]]
        except KeyError:
            return None
        parts = [pieces[0]]
        for message, piece in zip(messages, pieces[1:], strict=True):
            parts += [message["content"], piece]
        text = "".join(parts)
        if text != self.chat._try_text(messages, How()):
            return None
        found, place, before = [], len(pieces[0]), 0
        for number, message in enumerate(messages):
            end = place + len(message["content"])
            if message["role"] == "assistant":
                asked = self.asked.get(names[number - 1])
                if asked is None or not text.startswith(asked, before):
                    return None
                start = before + len(asked)
                said = max(start, place + thought) if (thought := thought_length(message["content"])) else start
                found.append(Span(before, start, said, self._ending(text, max(start, end))))
            before, place = end, end + len(pieces[number + 1])
        return text, found

    def _ending(self, text: str, end: int) -> int:
        """Return where a turn's end-of-turn token ends."""
        begin = end
        while begin < len(text) and text[begin].isspace():
            begin += 1
        written = next((each for each in self.chat._endings if text.startswith(each, begin)), None)
        return begin + len(written) if written else end

    def header(self, text: str) -> tuple[int, list[int]] | None:
        """Return the last cutting token's place in the text before an answer, and the ids from there; None without one."""
        if text not in self._headers:
            place = max((text.rfind(each) for each in self._cuts), default=-1)
            self._headers[text] = None if place < 0 else (place, self.chat._tokenize(text[place:])[0])
        return self._headers[text]

    def render(
        self,
        text: str,
        spans: Sequence[Span],
        ids: list[int],
        offsets: Sequence[tuple[int, int]],
        wanted: str,
        leave_out: Sequence[str] = (),
    ) -> Rendered | None:
        """Return ids and mask of the answers; None where a token stands across an edge, or a prompt would be cut otherwise."""
        begin = self.chat.tokenizer.bos_token_id
        if begin is not None and len(ids) > 1 and ids[0] == begin == ids[1]:
            return None
        ends = [each[1] for each in offsets]
        mask, written = [False] * len(ids), [False] * len(ids)
        for span in spans:
            header = self.header(text[span.header : span.start])
            first, last = bisect_right(ends, span.start), bisect_right(ends, span.end)
            across = [
                place for place in (first, last) if place < len(ids) and offsets[place][0] < (span.start if place == first else span.end)
            ]
            if (
                header is None
                or across
                or ids[first - len(header[1]) : first] != header[1]
                or offsets[first - len(header[1])][0] != span.header + header[0]
            ):
                return None
            if wanted == "all" or span == spans[-1]:
                written[first:last] = [True] * (last - first)
                first = bisect_right(ends, min(span.said, span.end)) if THINKING in leave_out else first
                mask[first:last] = [True] * (last - first)
        return Rendered(ids, mask, None if mask == written else written)


def render_many(
    conversations: Sequence[Sequence[Message]],
    chat: Chat,
    pieces: Pieces,
    train_on: str,
    tools: Sequence[Sequence[Tool]] = (),
    leave_out: Sequence[str] = (),
) -> list[Rendered | UserError]:
    """Render conversations as `chat.render` does, one by one or all at once; in the place of one that is refused stands the error.

    `tools` has for each conversation the functions that can be called in it; left out, there are none.
    """
    tools = tools or [()] * len(conversations)
    found: list[Rendered | UserError | None] = [None] * len(conversations)
    if pieces.usable:
        plain = ((place, each) for place, each in enumerate(conversations) if not tools[place])
        told = [(place, whole) for place, each in plain if (whole := pieces.spans(each)) is not None]
        if told:
            texts = [text for _, (text, _) in told]
            coded = chat.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
            for (place, (text, spans)), ids, offsets in zip(told, coded["input_ids"], coded["offset_mapping"], strict=True):
                found[place] = pieces.render(text, spans, ids, offsets, train_on, leave_out)
        for place in range(0, len(conversations), AUDITED):
            quick = found[place]
            if quick is not None and quick != _render(conversations[place], (), chat, train_on, leave_out):
                log.warning("%s: its template is more than pieces around what was said; its rows are rendered one by one", chat.name)
                pieces.usable = False
                return render_many(conversations, chat, pieces, train_on, tools, leave_out)
    asked = zip(conversations, tools, found, strict=True)
    return [_render(messages, callable_, chat, train_on, leave_out) if each is None else each for messages, callable_, each in asked]


def _render(
    messages: Sequence[Message], tools: Sequence[Tool], chat: Chat, train_on: str, leave_out: Sequence[str]
) -> Rendered | UserError:
    try:
        return chat.render(messages, tools=tools, train_on=train_on, leave_out=leave_out)
    except UserError as error:
        return error


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process sent a signal when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


_work: Callable[[int, int], list[Any]] | None = None  # what the processes of a pool do: they are copies of this one, made by fork


def _do(bounds: tuple[int, int]) -> list[Any]:
    assert _work is not None
    return _work(*bounds)


def in_chunks(count: int, work: Callable[[int, int], list[Any]], enough: Callable[[list[Any]], bool]) -> list[Any]:
    """Return what `work(first, last)` gives for 0 to `count`, in order, on all processors; stop early once `enough` of it is there."""
    global _work
    chunks = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    found: list[Any] = []
    processes = min(usable_cores(), MOST_PROCESSES)
    if count < PARALLEL or processes < 2:
        for chunk in chunks:
            found += work(*chunk)
            if enough(found):
                break
        return found
    _work = work
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=end_with_parent, initargs=(signal.SIGKILL,))
        try:
            for part in pool.map(_do, chunks):
                found += part
                if enough(found):
                    break
        except BrokenProcessPool:
            raise UserError("a process that renders rows was killed, for want of memory as a rule: make room, or give fewer rows") from None
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        _work = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return found
