"""The formats of the field, read without being told: messages, ShareGPT, Alpaca, prompts with or without answers, text, preferences.

A row becomes a conversation; whatever column is not part of it goes to `meta` unchanged. The format is found row by row,
from the columns that are there and not null.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .errors import UserError, unknown_name
from .example import ROLES, Example, Message, content_id
from .sources import Faulty, Row, iterate_rows, parse_json

ROLE_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    "developer": "system",
}
CALLERS = ("function_call", "tool_call")  # roles whose text is a call, as JSON
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
PROMPTS = ("prompt", "question", "query", "problem", "input", "text")  # the first that is there is taken
INPUTS = ("input", "context")
ANSWERS = ("completion", "response", "output", "solution", "answer")  # likewise
OWN = {"id", "example_id", "sample_index", "messages", "tools", "source", "meta", "extra"}  # columns of the files that sftkit writes
EXPECTED = (
    "messages or conversations; instruction, input, output; prompt or question, with or without completion, response or answer; "
    "text; chosen and rejected"
)
NAMED = "`sftkit curate import DATA -o RUN --prompt-column NAME --answer-column NAME` takes other names"


def read_examples(source: str | Path, *, format: str | None = None, revision: str | None = None, split: str = "train") -> list[Example]:
    """Return all rows of a source as examples, in order: see `iterate_examples`."""
    return list(iterate_examples(source, format=format, revision=revision, split=split))


def iterate_examples(
    source: str | Path,
    *,
    format: str | None = None,
    revision: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    faulty: Faulty | None = None,
) -> Iterator[Example]:
    """Yield the rows of a file, a folder, a run, standard input (`-`) or a Hub data set (ORG/NAME[:SUBSET]) as examples.

    `format` (a name in FORMATS) reads the rows as that and nothing else; the columns of a prompt and its answer can be named,
    where they have no usual names. Raises UserError, naming file and row, for a source without rows and for a row that is none of
    the formats or lacks a text where there must be one; of such rows `faulty` is told, where it is given, and they are left out.
    """
    if format is not None and format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    readers = dict(FORMATS)
    if prompt_column is not None or answer_column is not None:
        if format not in (None, "prompt"):
            raise UserError(f"format {format}: has columns of its own; those of a prompt and its answer are named without a format")
        format, answered = "prompt", answer_column is not None
        prompts, answers = (prompt_column,) if prompt_column else PROMPTS, (answer_column,) if answer_column else ANSWERS
        readers["prompt"] = partial(_question, prompts=prompts, answers=answers, answered=answered)
    found: dict[frozenset[str], str] = {}
    used: dict[str, int] = {}

    def example(row: Row, place: str) -> Example:
        if format is None and _is_own(row):
            return _own_example(row, place, used)
        # of a pair, a null one is a fault; where both are null, they are columns of other rows
        pair = row.get("chosen") is not None or row.get("rejected") is not None
        columns = frozenset(name for name, value in row.items() if value is not None or (pair and name in ("chosen", "rejected")))
        name = format or found.get(columns)
        if name is None:
            name = found[columns] = _format_of(row, columns, place)
        meta = dict(row)
        messages = with_system(meta, readers[name](meta, place))
        return Example(_unused(content_id(messages), used), messages, place, meta)

    for place, row in iterate_rows(source, revision=revision, split=split, faulty=faulty):
        try:
            read = example(row, place)
        except UserError as error:
            if faulty is None:
                raise
            faulty(place, error)
        else:
            yield read


def detect_format(columns: frozenset[str] | set[str], place: str = "") -> str:
    """Return the name of the format that a row with these columns (the null ones left out) is in."""
    if {"chosen", "rejected"} <= columns:
        return "preference"
    if columns.intersection(CONVERSATIONS):
        return "messages"
    if "instruction" in columns:
        return "alpaca"
    if columns.intersection(PROMPTS):
        return "text" if not columns.intersection((*PROMPTS[:-1], *ANSWERS)) else "prompt"
    raise UserError(f"{place}: found the columns {', '.join(sorted(columns)) or '(none)'}; expected {EXPECTED}; {NAMED}")


def _format_of(row: Row, columns: frozenset[str], place: str) -> str:
    try:
        return detect_format(columns, place)
    except UserError:
        null = next((name for name in (*CONVERSATIONS, "instruction", *PROMPTS) if name in row), None)
        if null is None:
            raise
        raise UserError(f"{place}: {null} is null; fill it in, or take the row out") from None


def split_prompt(example: Example) -> tuple[list[Message], str | None]:
    """Return the messages up to the last user turn, and the text of the final answer; None where the conversation has none."""
    messages = example.messages
    answer = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
    turns = [number for number, message in enumerate(messages) if message["role"] == "user"]
    end = turns[-1] + 1 if turns else len(messages) - (answer is not None)
    return messages[:end], answer


def _unused(wanted: str, used: dict[str, int]) -> str:
    """Return an id that no row before has: `wanted`, or it with ~2, ~3, …; `used` counts how often each was asked for."""
    name = wanted
    while name in used:
        used[wanted] += 1
        name = f"{wanted}~{used[wanted]}"
    used[name] = 1
    return name


def _is_own(row: Row) -> bool:
    return {"id", "messages", "source", "meta"} <= row.keys() <= OWN


def _own_example(row: Row, place: str, used: dict[str, int]) -> Example:
    """Read a row that sftkit wrote. Its id counts if it is one of these messages; that of a sample (ID/INDEX) goes to meta."""
    messages = _conversation({"messages": row.get("extra") or row["messages"]}, place)
    meta = row["meta"]
    if isinstance(meta, str):
        meta = _from_json(meta, place, "meta") if meta else {}
    if not isinstance(meta, dict | None):
        raise UserError(f"{place}: meta must be an object, found {str(meta)[:40]!r}")
    if row.get("tools") is not None:
        meta = {**(meta or {}), "tools": row["tools"]}
    source = row["source"] or place
    if not isinstance(source, str):  # a column of the user's own, of the same name
        source, meta = place, {**(meta or {}), "source": source}
    known, given = content_id(messages), str(row["id"])
    if given != known and not given.startswith(f"{known}~"):
        return Example(_unused(known, used), messages, source, {**(meta or {}), "id": given})
    return Example(_unused(given, used), messages, source, meta or {})


def _from_json(text: str, place: str, column: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{place}: {column} is a text that is no JSON ({error}); expected a list of {{role, content}}") from None


def _text(value: Any, place: str, what: str) -> str:
    """Return a text, or the joined texts of a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return "".join(_part(part, place, what) for part in value)
    found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    raise UserError(f"{place}: {what} is {found}; expected a text: write it, or take the row out")


def _part(part: Row, place: str, what: str) -> str:
    kind = part.get("type", "text")
    text = part["value"] if isinstance(part.get("value"), str) else part.get("text")
    if kind in ("text", "input_text", "output_text", "tool_call") and isinstance(text, str):
        return text
    raise UserError(f"{place}: {what} has a part of type {kind!r}; only texts are read: take out rows with images, sound or files")


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{place} is {type(turn).__name__} {str(turn)[:40]!r}; expected an object with role and content")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise UserError(f"{place}: found {', '.join(map(str, turn)) or 'nothing'}; expected role and content, or from and value")
    name = ROLE_NAMES.get(str(role).lower())
    if name is None:
        raise unknown_name("role", role, ROLE_NAMES, place)
    rest = {key: value for key, value in turn.items() if value is not None and key not in ("role", "from", "content", "value")}
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and name == "assistant":
        thoughts = [part for part in content if isinstance(part, dict) and part.get("type") in ("reasoning", "thinking")]
        if thoughts:
            content = [part for part in content if part not in thoughts]
            texts = [part.get("value", part.get("text", part.get("thinking"))) for part in thoughts]
            rest.setdefault("reasoning_content", "".join(_text(text, place, "the reasoning") for text in texts))
    if str(role).lower() in CALLERS and (calls := calls_of(content)):
        content = ""
        rest.setdefault("tool_calls", calls)
    if not content and name == "assistant" and turn.get("tool_calls"):
        content = ""
    return {"role": name, "content": _text(content, place, "the content"), **rest}


def calls_of(text: Any) -> list[Row]:
    """Return the calls, as `tool_calls` has them, that ShareGPT writes as the JSON text of a turn; none where it is another text."""
    try:
        value = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        return []
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) and each.keys() == {"name", "arguments"} for each in found):
        return []
    return [{"type": "function", "function": each} for each in found]


def _turns(value: Any, place: str, column: str) -> list[Message]:
    """Return a conversation: a list of messages, one message, or either as JSON text."""
    if isinstance(value, str):
        value = _from_json(value, place, column)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{place}: {column} is {type(value).__name__} {str(value)[:40]!r}; expected a list of {{role, content}}")
    if not value:
        raise UserError(f"{place}: {column} is empty; expected at least one message, or take the row out")
    return [_message(turn, f"{place}: {column}[{number}]") for number, turn in enumerate(value)]


def with_system(meta: Row, messages: list[Message]) -> list[Message]:
    """Put a row's column `system` before its messages, and take it out of the row."""
    name = next((name for name in SYSTEMS if isinstance(meta.get(name), str) and meta[name].strip()), None)
    if name is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": meta.pop(name)}, *messages]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _take(meta: Row, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """Take the first of the columns that is there out of a row, one that is not null before one that is."""
    present = [name for name in names if name in meta]
    name = next((name for name in present if meta[name] is not None), present[0] if present else None)
    return None if name is None else (name, meta.pop(name))


def _lacks(meta: Row, place: str, names: tuple[str, ...]) -> UserError:
    return UserError(f"{place}: found the columns {', '.join(meta)}; expected {' or '.join(names)}")


def _refuse_unwanted(meta: Row, place: str, column: str) -> None:
    """Raise UserError for an answer in unpaired preferences, TRL's and LLaMA-Factory's, that is marked as not wanted.

    A CSV file has texts. Beside messages, where it may be a class, `label` is a mark as a truth value only, and where no column has
    another answer.
    """
    beside = column in CONVERSATIONS and meta.get("label") is False and all(meta.get(name) is None for name in ANSWERS)
    for mark in ("kto_tag", "label") if column == "completion" or beside else ("kto_tag",):
        if str(meta.get(mark)).lower() == "false":
            raise UserError(
                f"{place}: {mark} is false: its answer, in {column}, is one that is not wanted; leave such rows out, or give that column"
                " another name if it says something else"
            )


# Each reader takes the columns that it uses out of the row; what it leaves is the example's meta.


def _conversation(meta: Row, place: str, *, answered: bool = True) -> list[Message]:
    """Read messages; unless `answered`, what they end with is not the answer that the row's other columns speak of."""
    taken = _take(meta, CONVERSATIONS)
    if taken is None:
        raise _lacks(meta, place, CONVERSATIONS)
    messages = _turns(taken[1], place, taken[0])
    if answered and messages[-1]["role"] == "assistant":
        _refuse_unwanted(meta, place, taken[0])
    return messages


def _question(
    meta: Row, place: str, *, prompts: tuple[str, ...] = PROMPTS, answers: tuple[str, ...] = ANSWERS, answered: bool = False
) -> list[Message]:
    taken = _take(meta, prompts)
    if taken is None:
        raise _lacks(meta, place, prompts)
    return [*_asked(meta, place, *taken), *_answer(meta, place, answers, required=answered)]


def _asked(meta: Row, place: str, name: str, value: Any) -> list[Message]:
    """Return a prompt, a text or messages, behind a column `history`, as ms-swift and ChatGLM have it.

    That is a list of pairs of texts, or of messages up to an answer; a history of anything else is a column like others.
    """
    history = meta.get("history")
    before: list[Message] = []
    if isinstance(history, list) and all(_is_pair(each) for each in history):
        before = _history(meta.pop("history"), place)
    elif isinstance(history, list) and all(_is_turn(each) for each in history):
        turns = _turns(history, place, "history")
        if turns[-1]["role"] == "assistant":
            before = turns
            meta.pop("history")
    return [*before, *(_turns(value, place, name) if isinstance(value, list) else [_user(_text(value, place, name))])]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("role")).lower() in ROLE_NAMES and isinstance(value.get("content"), str)


def _answer(meta: Row, place: str, names: tuple[str, ...] = ANSWERS, *, required: bool = False) -> list[Message]:
    """Take the answer out of a row: none, a text, messages, or a ranked list of texts whose first is the answer."""
    taken = _take(meta, names)
    if taken is None and required:
        raise _lacks(meta, place, names)
    if taken is None:
        return []
    name, value = taken
    _refuse_unwanted(meta, place, name)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        meta[f"other_{name}s"] = value[1:]
        value = value[0]
    if isinstance(value, list) and value and isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0]):
        return _turns(value, place, name)
    if value is None:
        raise UserError(f"{place}: {name} is null; give its text, or leave the column out where there is only a prompt")
    return [_assistant(_text(value, place, name))]


def _instruction(meta: Row, place: str, *, answered: bool = True) -> list[Message]:
    """Read Alpaca columns, with LLaMA-Factory's `history` of pairs and Self-Instruct's `instances`, whose first is taken."""
    if "instruction" not in meta:
        raise _lacks(meta, place, ("instruction",))
    instruction = _text(meta.pop("instruction"), place, "instruction")
    instances = meta.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict) and not {*INPUTS, *ANSWERS} & meta.keys():
        meta.pop("instances")
        meta.update({name: instances[0][name] for name in ("input", "output") if instances[0].get(name) is not None})
        if len(instances) > 1:
            meta["other_instances"] = instances[1:]
    taken = _take(meta, INPUTS)
    given = _text(taken[1], place, taken[0]) if taken and taken[1] is not None else ""
    messages = _history(meta.pop("history", None), place)
    messages.append(_user("\n\n".join(each for each in (instruction, given) if each.strip()) or instruction))
    return [*messages, *(_answer(meta, place) if answered else [])]


def _history(pairs: Any, place: str) -> list[Message]:
    if isinstance(pairs, str):
        pairs = _from_json(pairs, place, "history") if pairs else []
    if not isinstance(pairs, list | None) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs or []):
        raise UserError(f"{place}: history is {str(pairs)[:40]!r}; expected a list of [user, assistant] pairs")
    messages = []
    for asked, answered in pairs or []:
        messages += [_user(_text(asked, place, "history")), _assistant(_text(answered, place, "history"))]
    return messages


def _plain(meta: Row, place: str) -> list[Message]:
    if "text" not in meta:
        raise _lacks(meta, place, ("text",))
    return [_user(_text(meta.pop("text"), place, "text"))]


def _preference(meta: Row, place: str) -> list[Message]:
    """Read prompt + chosen as the conversation; the rejected answer's messages are meta["rejected"].

    Where chosen and rejected are whole conversations, what they begin with in common is the prompt.
    """
    if not {"chosen", "rejected"} <= meta.keys():
        raise _lacks(meta, place, ("chosen and rejected",))
    chosen, rejected = (_candidate(meta.pop(name), place, name) for name in ("chosen", "rejected"))
    if chosen[0]["role"] != "assistant":
        most = min(len(chosen), len(rejected)) - 1  # the last message is never part of the prompt
        same = next((n for n in range(most) if chosen[n] != rejected[n]), most)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    elif any(meta.get(name) is not None for name in CONVERSATIONS):
        prompt = _conversation(meta, place, answered=False)
    elif meta.get("instruction") is not None:
        prompt = _instruction(meta, place, answered=False)
    else:
        taken = _take(meta, PROMPTS)
        if taken is None:
            raise UserError(f"{place}: chosen is an answer without its prompt; expected also {', '.join((*PROMPTS, *CONVERSATIONS))}")
        prompt = _asked(meta, place, *taken)
    meta["rejected"] = rejected
    return [*prompt, *chosen]


def _candidate(value: Any, place: str, name: str) -> list[Message]:
    if value is None or isinstance(value, str):
        return [_assistant(_text(value, place, name))]
    return _turns(value, place, name)


FORMATS: dict[str, Callable[[Row, str], list[Message]]] = {
    "messages": _conversation,
    "sharegpt": _conversation,
    "alpaca": _instruction,
    "prompt": _question,
    "text": _plain,
    "preference": _preference,
}
