"""Write a run's data set in the formats that other tools read; what a format cannot hold is refused by row and counted by reason."""

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import polars as pl

from ..core.errors import UserError
from ..core.example import Message, tools_of
from ..core.files import clear_temporaries, hold_folder, scan_parquet, write_atomically, write_json, write_text
from ..core.formats import calls_of
from ..core.hub import is_of_network
from ..core.run import Run
from .config import ExportConfig
from .rows import DATASET, EXPORTED, KEY, load_rows, row_ids, scan_rows, write_dataset
from .scored import columns_for, score_values

log = logging.getLogger(__name__)

Row = dict[str, Any]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation", "function_call": "function_call"}
PLAIN_KEYS = {"role", "content"}
LOCK = ".export.lock"
NO_PAIRS = "a pair is made of a row with a column rejected, or of several answers to a prompt (`distill -k 4`) that have a score"
ARRAY = ("llama-factory",)  # formats whose file is one JSON list
FILES = ("train.jsonl", "train.json", "train.parquet", "refused.jsonl", "dataset_info.json")  # that one format has and another has not


class CannotHold(ValueError):
    """A format has no place for a part of a conversation; the message is the reason, one word or two joined by `_`."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote and what it refused: rows in = written + refused."""

    folder: Path
    num_input: int
    num_written: int
    refused: dict[str, int]  # by reason, most first
    address: str | None = None  # on the Hub, where it was pushed

    def summary(self) -> str:
        """Write it for people."""
        told = "".join(f"; {reason} {count:,}" for reason, count in self.refused.items())
        refused = self.num_input - self.num_written
        written = f"{self.num_written:,} of {self.num_input:,} rows in {self.folder}" + (f", {refused:,} refused{told}" if refused else "")
        return written if self.address is None else f"{written}\npushed to {self.address}"


def export(run: Run, out: Path, config: ExportConfig) -> Exported:
    """Write the rows that a run keeps to the folder `out`, with a card and export.json; refused.jsonl names what is refused.

    Raises UserError for a folder that holds something else or cannot be written, for a run without pairs where pairs are asked for,
    and where no row can be held.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for the export")
    if out.exists() and any(each.name != LOCK for each in out.iterdir()) and not (out / "export.json").exists():
        raise UserError(f"{out}: is not empty and no export of sftkit; give a new folder")
    with hold_folder(out, LOCK, "exporting into it"):
        try:
            return _export(run, out, config)
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _export(run: Run, out: Path, config: ExportConfig) -> Exported:
    told: dict[str, Any] = {"run": run.path.name, "format": config.format}
    if not (out / "export.json").exists():
        write_json(out / "export.json", told)  # killed from here on, the folder is still an export; the counts are written last
    for name in DATASET:  # of a Parquet export that was killed
        (out / name).unlink(missing_ok=True)
    clear_temporaries(out)
    name = f"train.{'parquet' if config.format == 'parquet' else 'json' if config.format in ARRAY else 'jsonl'}"
    with write_atomically(out / name) as temporary:
        if config.format == "parquet":
            found, refused, columns = _parquet(run, out, temporary), list[tuple[str, str]](), set[str]()
        else:
            rows = _pairs(run, config) if config.format == "preference" else _conversations(run, WRITERS[config.format])
            with open(temporary, "w", encoding="utf-8") as file:
                found, refused, columns = _write(rows, file, "[]" if config.format in ARRAY else "")
        counts = Counter(reason for _, reason in refused)
        if not found:  # an earlier export stays
            reasons = ", ".join(f"{r} {n:,}" for r, n in counts.items()) or "no row is left"
            cure = f"; {NO_PAIRS}" if "no_rejected_answer" in counts else ""
            raise UserError(f"{run.path}: no row can be written as {config.format}: {reasons}{cure}")
        write_json(out / "export.json", told)
        for other in FILES:
            (out / other).unlink(missing_ok=True)
    result = Exported(out, found + len(refused), found, dict(counts.most_common()))
    if config.format == "llama-factory":
        named = {name: name for name in ("messages", "tools") if name in columns}
        write_json(out / "dataset_info.json", {run.path.name: {**LLAMA_FACTORY, "columns": named}})
    if refused:
        lines = (json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in refused)
        write_text(out / "refused.jsonl", "".join(lines))
    _write_card(run, result, config)
    write_json(out / "export.json", {**told, "input": result.num_input, "written": found, "refused": result.refused})
    if config.push_to_hub:
        result = replace(result, address=push(out, config.push_to_hub))
    return result


def push(folder: Path, repository: str) -> str:
    """Upload an export to a data set of the Hub, made private if it is not there yet; return its address.

    Of an earlier export what this one does not have is removed there. Raises UserError for a repository that holds something else,
    and with the reason where it cannot be written or reached.
    """
    from huggingface_hub import HfApi, get_token

    kept = f"the files are in {folder}"
    if get_token() is None:
        raise UserError(f"{repository}: could not be pushed (there is no token of the Hub); {kept}: `hf auth login`, then again")
    api, kind = HfApi(), "dataset"
    try:
        address = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        others = [name for name in api.list_repo_files(repository, repo_type=kind) if name != ".gitattributes"]
        if others and "export.json" not in others:
            some = ", ".join(others[:3])
            raise UserError(f"{repository}: holds other files ({some}) and is no export of sftkit; {kept}: give a new name")
        message, mark = "Export of sftkit", "export.json"
        if not others:  # cut off from here on, it is still an export: the rest may come in several commits
            api.upload_file(repo_id=repository, repo_type=kind, path_or_fileobj=folder / mark, path_in_repo=mark, commit_message=message)
        api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, delete_patterns=[*FILES], ignore_patterns=[LOCK], commit_message=message
        )
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, (ValueError, RuntimeError)) and not is_of_network(error):
            raise
        reason, cure = _why(error)
        raise UserError(f"{repository}: could not be pushed ({reason}); {kept}: {cure}then again") from None
    return str(address)


def _why(error: BaseException) -> tuple[str, str]:
    """Say why the Hub's client failed, and what to do before trying again; nothing where that is all there is to do."""
    while type(error) is RuntimeError and error.__cause__ is not None:  # "error while uploading" has the reason behind it
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        return " ".join(str(error).split())[:240] or type(error).__name__, ""
    told = " ".join(str(getattr(error, "server_message", None) or response.reason_phrase).split())[:200]
    cures = {401: "`hf auth login`, ", 403: "give the token the right to write there, "}
    return f"{response.status_code}: {told}", cures.get(response.status_code, "")


Written = tuple[str, Row | str]  # the row's name, and what is written or the reason why it is refused


def _write(rows: Iterator[Written], file: IO[str], brackets: str) -> tuple[int, list[tuple[str, str]], set[str]]:
    """Write rows; return how many, those refused with their reasons, and the columns of all that were written."""
    refused: list[tuple[str, str]] = []
    columns: set[str] = set()
    found = 0
    for name, row in rows:
        if isinstance(row, str):
            refused.append((name, row))
            continue
        line = json.dumps(row, ensure_ascii=False)
        file.write(f"{',' if found else '['}\n{line}" if brackets else f"{line}\n")
        columns |= row.keys()
        found += 1
    file.write("\n]\n" if brackets and found else "")
    return found, refused, columns


def _parquet(run: Run, out: Path, place: Path) -> int:
    write_dataset(scan_rows(run, columns=EXPORTED), out)
    (out / "dataset.jsonl").unlink()
    (out / "dataset.parquet").replace(place)
    return int(scan_parquet(place).select(pl.len()).collect().item())


def _conversations(run: Run, writer: Callable[[list[Message], Mapping[str, str]], Row]) -> Iterator[Written]:
    rows = load_rows(run, columns=EXPORTED)
    for name, messages, source, meta in zip(row_ids(rows), rows["messages"], rows["source"], rows["meta"], strict=True):
        try:
            yield name, _with_tools(writer, json.loads(messages), {"id": name, "source": source or "", "meta": meta or "{}"})
        except CannotHold as reason:
            yield name, str(reason)


def _with_tools(writer: Callable[[list[Message], Mapping[str, str]], Row], messages: list[Message], row: Mapping[str, str]) -> Row:
    """Write a row; which functions can be called stands in the column `tools`, as TRL and OpenAI have it, or LLaMA-Factory."""
    meta = json.loads(row["meta"])
    tools = tools_of(meta)
    if not tools:
        return writer(messages, row)
    if writer is _alpaca:
        raise CannotHold("tools")
    rest = {name: value for name, value in meta.items() if name != "tools"}
    written = writer(messages, {**row, "meta": json.dumps(rest, ensure_ascii=False)})
    if writer in (_sharegpt, _llama_factory):
        return {**written, "tools": json.dumps([each["function"] for each in tools], ensure_ascii=False)}
    return {**written, "tools": list(tools)}


# Each writer gets a conversation, and id, source and meta (JSON text) of its row.


def _messages(messages: list[Message], row: Mapping[str, str]) -> Row:
    return {"id": row["id"], "messages": messages, "source": row["source"], "meta": row["meta"]}


def _openai(messages: list[Message], _row: Mapping[str, str]) -> Row:
    if not any(each["role"] == "assistant" for each in messages):
        raise CannotHold("no_answer")
    return {"messages": _with_call_ids(messages)}


def _prompt_completion(messages: list[Message], _row: Mapping[str, str]) -> Row:
    prompt, answer = _split(messages)
    return {"prompt": prompt, "completion": answer}


def _sharegpt(messages: list[Message], _row: Mapping[str, str]) -> Row:
    turns = _with_call_turns(messages)
    _only_texts(turns)
    return {"conversations": [{"from": SHAREGPT[each["role"]], "value": each["content"]} for each in turns]}


def _alpaca(messages: list[Message], _row: Mapping[str, str]) -> Row:
    system, turns = _alternating(messages, asked=("user",))
    if system is not None and not system.strip():
        raise CannotHold("blank_system")
    texts = [each["content"] for each in turns]
    history = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    row = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    return {**row, **({"system": system} if system is not None else {}), **({"history": history} if history else {})}


def _llama_factory(messages: list[Message], _row: Mapping[str, str]) -> Row:
    turns = _with_call_turns(messages)
    _alternating(turns, asked=("user", "tool"), answered=("assistant", "function_call"))  # what does not it leaves out without a word
    return {"messages": turns}


WRITERS: dict[str, Callable[[list[Message], Mapping[str, str]], Row]] = {
    "trl-messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "openai": _openai,
    "llama-factory": _llama_factory,
}
LLAMA_FACTORY = {
    "file_name": "train.json",
    "formatting": "sharegpt",
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
    },
}  # fmt: skip


def _with_call_turns(messages: Sequence[Message]) -> list[Message]:
    """Return messages with those that only call functions as turns of their own kind; one that would lose something stays."""
    turns = []
    for each in messages:
        calls = each.get("tool_calls")
        functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        text = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
        objects = functions and all(isinstance(function, dict) and isinstance(function.get("arguments"), dict) for function in functions)
        alone = set(each) == {"role", "content", "tool_calls"} and each["content"] == ""
        whole = alone and objects and calls_of(text) == calls
        turns.append({"role": "function_call", "content": text} if whole else each)
    return turns


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Return messages as OpenAI asks for them: the arguments of a call as JSON text, an id for each call and with its answer."""
    calls = [call for each in messages for call in each.get("tool_calls") or []]
    if not all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls):
        raise CannotHold("call_of_no_function")
    given = {call.get("id") for call in calls}
    unused = (name for number in count(1) if (name := f"call_{number}") not in given)
    written: list[Message] = []
    waiting: list[str] = []  # ids of calls without an answer so far
    for each in messages:
        if each.get("tool_calls"):
            own = [_with_text({**call, "id": call.get("id") or next(unused), "type": "function"}) for call in each["tool_calls"]]
            waiting = [call["id"] for call in own]
            each = {**each, "tool_calls": own}
        elif each["role"] == "tool":
            answered = each.get("tool_call_id") or next(iter(waiting), None)
            if answered not in waiting:
                raise CannotHold("tool_without_call")
            waiting.remove(answered)
            each = {**each, "tool_call_id": answered}
        written.append(each)
    return written


def _with_text(call: Row) -> Row:
    arguments = call["function"].get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _only_texts(messages: Sequence[Message]) -> None:
    for each in messages:
        more = sorted(set(each) - PLAIN_KEYS)
        if more:
            raise CannotHold(more[0])
        if not isinstance(each["content"], str):
            raise CannotHold("parts")


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    if not messages or messages[-1]["role"] != "assistant":
        raise CannotHold("no_answer")
    if len(messages) == 1:
        raise CannotHold("no_prompt")
    return messages[:-1], messages[-1:]


def _alternating(
    messages: list[Message], asked: tuple[str, ...], answered: tuple[str, ...] = ("assistant",)
) -> tuple[str | None, list[Message]]:
    """Return the system message, if there is one at the beginning, and the turns, which must alternate and end with an answer."""
    _only_texts(messages)
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages if system is None else messages[1:]
    if not turns or turns[-1]["role"] not in answered:
        raise CannotHold("no_answer")
    if any(each["role"] not in (*asked, *answered) for each in turns):
        raise CannotHold("tool" if any(each["role"] == "tool" for each in turns) else "second_system")
    if len(turns) % 2 or any((each["role"] in asked) == bool(place % 2) for place, each in enumerate(turns)):
        raise CannotHold("turns_do_not_alternate")
    return system, turns


def _pairs(run: Run, config: ExportConfig) -> Iterator[Written]:
    """Yield for each prompt its best kept sample and a lower one of the same prompt, as a pair that TRL reads."""
    by = config.by or _by_of_best(run)
    rows = load_rows(run, columns=EXPORTED)
    if not by and rows["sample_index"].null_count() == len(rows):
        yield from _given_pairs(rows)
        return
    if not by:
        raise UserError(f"{run.path}: say by which score a sample is better, as --by logprob; `best` was not run with one")
    name, sign = by[0].removeprefix("-"), -1.0 if by[0].startswith("-") else 1.0
    needed = dict.fromkeys([*EXPORTED, "response", "finish_reason", *columns_for(run, [name])])
    every = load_rows(run, all=True, columns=list(needed))
    every = every.with_columns(score_values(run, every, name).alias("score") * sign)
    others = every.filter((pl.col("finish_reason") != "length") | pl.col("finish_reason").is_null(), pl.col("response").is_not_null())
    lower: dict[str, list[tuple[float, Row]]] = {}
    wanted = set(rows["example_id"])
    for row in others.drop_nulls("score").filter(pl.col("example_id").is_in(list(wanted))).iter_rows(named=True):
        lower.setdefault(row["example_id"], []).append((row["score"], row))
    kept = rows.select(KEY).join(every, on=KEY, how="left", nulls_equal=True, maintain_order="left")
    best = kept.sort("score", descending=True, nulls_last=True, maintain_order=True).unique("example_id", keep="first")
    told = set(best.select(KEY).iter_rows())
    for name, row in zip(row_ids(kept), kept.iter_rows(named=True), strict=True):
        if (row["example_id"], row["sample_index"]) in told:
            yield name, _pair(name, row, lower.get(row["example_id"], []), config)
        else:
            yield name, "a_better_sample_is_chosen"


def _pair(name: str, row: Row, candidates: Sequence[tuple[float, Row]], config: ExportConfig) -> Row | str:
    chosen = json.loads(row["messages"])
    try:
        prompt, answer = _split(chosen)
    except CannotHold as reason:
        return str(reason)
    if row["score"] is None:
        return "unscored"
    below = [(score, each) for score, each in candidates if score < row["score"] and each["response"] != row["response"]]
    below = [each for each in below if row["score"] - each[0] >= config.min_margin]
    if not below:
        return "no_lower_sample"
    below.sort(key=lambda each: (each[0], each[1]["sample_index"]))
    pick = {"worst": below[0], "next": below[-1], "random": random.Random(f"{config.seed}/{name}").choice(below)}[config.rejected]
    return {
        "prompt": prompt,
        "chosen": answer,
        "rejected": json.loads(pick[1]["messages"])[-1:],
        **({"tools": list(tools)} if (tools := tools_of(json.loads(row["meta"] or "{}"))) else {}),
        "chosen_score": abs(row["score"]) if row["score"] == 0 else row["score"],
        "rejected_score": pick[0],
        "id": row["example_id"],
    }


def _by_of_best(run: Run) -> tuple[str, ...]:
    by = run.config().get("best", {}).get("by") or []
    return tuple(name for name in by if name.removeprefix("-") != "random")


def _given_pairs(rows: pl.DataFrame) -> Iterator[Written]:
    """Yield the pairs that rows were taken in as: the chosen answer in the conversation, the rejected one in meta."""
    for name, messages, meta in zip(row_ids(rows), rows["messages"], rows["meta"], strict=True):
        rejected = json.loads(meta or "{}").get("rejected")
        conversation = json.loads(messages)
        if not isinstance(rejected, list) or not rejected:
            yield name, "no_rejected_answer"
            continue
        split = len(conversation) - next(
            (n for n, each in enumerate(reversed(conversation)) if each["role"] != "assistant"), len(conversation)
        )
        prompt, chosen = conversation[:split], conversation[split:]
        tools = tools_of(json.loads(meta or "{}"))
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **({"tools": list(tools)} if tools else {})}
        yield name, pair if prompt and chosen else "no_answer"


def _write_card(run: Run, result: Exported, config: ExportConfig) -> None:
    card = run.path / "curate" / "README.md"
    own = card.read_text(encoding="utf-8") if card.exists() else f"# {run.path.name}\n"
    suffix = {"parquet": "parquet"}.get(config.format, "json" if config.format in ARRAY else "jsonl")
    refused = "".join(f"\n- {reason}: {count:,}" for reason, count in result.refused.items())
    told = f"\n\nRefused, as this format has no place for them (`refused.jsonl` names each):\n{refused}" if refused else ""
    for plot in ("lengths.svg", "clusters.svg"):
        if (run.path / "curate" / plot).exists():
            shutil.copyfile(run.path / "curate" / plot, result.folder / plot)
    head = f"---\ntags: [sftkit]\nconfigs:\n- config_name: default\n  data_files: train.{suffix}\n---\n\n"
    size = f"{result.num_written:,} of {result.num_input:,} rows"
    note = f"\n## This export\n\n`train.{suffix}`, format `{config.format}`: {size}.{told}\n"
    write_text(result.folder / "README.md", head + own + note)
