"""A folder of LLaMA-Factory: `dataset_info.json` says which file holds a data set and what its columns and roles are called."""

from pathlib import Path
from typing import Any

from .errors import UserError
from .files import load_json

INFO = "dataset_info.json"
COLUMNS = {  # what it calls a column in its `columns`, and what that column is called here
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "messages",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
}
TAGS = {"role_tag": "from", "content_tag": "value"}
ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}


def data_sets(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files that the folder's dataset_info.json names, with what it says of each. Raises UserError where it names none there."""
    try:
        info = load_json(folder / INFO)
    except ValueError as error:
        raise UserError(f"{folder / INFO}: not valid JSON ({error})") from None
    entries = [entry for entry in (info.values() if isinstance(info, dict) else ()) if isinstance(entry, dict)]
    found = [(folder / str(entry["file_name"]), entry) for entry in entries if entry.get("file_name")]
    there = [(file, entry) for file, entry in found if file.exists()]
    if not there:
        raise UserError(f"{folder / INFO}: names no file that is there; expected an entry with file_name")
    return there


def renamed(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its columns and roles called as the rest of sftkit calls them."""
    names = {str(theirs): COLUMNS[ours] for ours, theirs in (entry.get("columns") or {}).items() if ours in COLUMNS}
    found = {names.get(name, name): value for name, value in row.items()}
    tags = {**TAGS, **(entry.get("tags") or {})}
    roles = {str(tags.get(tag, default)): role for tag, (default, role) in ROLES.items()}
    for name in ("messages", "conversations", "chosen", "rejected"):
        turns = found.get(name)
        if entry.get("formatting") == "sharegpt" and isinstance(turns, list | dict):
            found[name] = [_turn(turn, tags, roles) for turn in (turns if isinstance(turns, list) else [turns])]
    return found


def _turn(turn: Any, tags: dict[str, str], roles: dict[str, str]) -> Any:
    if not isinstance(turn, dict) or tags["role_tag"] not in turn:
        return turn
    role = turn[tags["role_tag"]]
    rest = {key: value for key, value in turn.items() if key not in (tags["role_tag"], tags["content_tag"])}
    return {"role": roles.get(str(role), role), "content": turn.get(tags["content_tag"]), **rest}
