"""Export: what is written comes back as it was, what a format cannot hold is refused with its reason, pairs are TRL's."""

import fcntl
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.run import Run
from sftkit.core.sources import iterate_rows
from sftkit.curate.best import best
from sftkit.curate.config import EXPORTS, ExportConfig, ImportConfig
from sftkit.curate.decide_config import BestConfig, FilterConfig
from sftkit.curate.export import WRITERS, export, push
from sftkit.curate.filters import filter_rows
from sftkit.curate.intake import take_in
from sftkit.curate.rows import write_dataset

TEXTS = [
    *(
        "What is 1+1?",
        "你好，世界。\n\n第二行",
        "مرحبا \u200fبالعالم",
        "שלום",
        "👩‍👩‍👧 🇩🇪 e\u0301",
        'quotes " and \\ back',
        "\ttabs\r\nand returns\u2028",
    ),
    *("", " ", "a\x00b\x1f", "<|im_end|>", "```python\nprint('x')\n```", "x" * 3000, "null", "[1, 2]", "ﬁ Å \ufeff"),
]
CALL = {"id": "c1", "type": "function", "function": {"name": "看", "arguments": '{"wo": "東京"}'}}


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """Return a conversation of any shape: system or not, several turns, tools, no answer, unusual order."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(TEXTS)})
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": rng.choice(TEXTS)})
        if rng.random() < 0.2:
            function = {"name": "f", "arguments": {"a": rng.choice(TEXTS)}}
            call = rng.choice([CALL, {**CALL, "function": function}, {"type": "function", "function": function}])
            messages.append({"role": "assistant", "content": rng.choice(["", "I look."]), "tool_calls": [call]})
            messages.append({"role": "tool", "content": rng.choice(TEXTS), **({"tool_call_id": "c1"} if rng.random() < 0.5 else {})})
        if rng.random() < 0.9:
            messages.append({"role": "assistant", "content": rng.choice(TEXTS)})
        if rng.random() < 0.05:
            messages[-1]["name"] = "Ada"
    return messages


def plain_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the arguments of calls as objects, and without ids."""
    found = json.loads(json.dumps(messages))
    for message in found:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", ()):
            call.pop("id", None)
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[[list[Any]], Run]:
    def make(conversations: list[Any]) -> Run:
        file = tmp_path / "given.jsonl"
        rows = [{"messages": each, "topic": "x", "nested": {"a": [1, None]}} for each in conversations]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = Run.create(tmp_path / "run")
        take_in(file, run, ImportConfig())
        return run

    return make


@pytest.mark.parametrize("format", [*WRITERS, "parquet"])
def test_what_is_written_comes_back_and_the_rest_is_refused_with_its_reason(format: str, run_of: Callable, tmp_path: Path) -> None:
    rng = random.Random(format)
    given = [conversation(rng) for _ in range(300)]
    run = run_of(given)
    out = tmp_path / "out"
    result = export(run, out, ExportConfig(format=format))
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()] if result.refused else []
    names = [example.id for example in read_examples(run.path)]
    gone = {each["id"] for each in refused}
    back = read_examples(out)
    held = [messages for name, messages in zip(names, given, strict=True) if name not in gone]
    if format == "openai":
        assert not any(call.get("id") is None for each in back for message in each.messages for call in message.get("tool_calls", ()))
        assert not any(message["role"] == "tool" and "tool_call_id" not in message for each in back for message in each.messages)
        assert [plain_calls(each.messages) for each in back] == [plain_calls(messages) for messages in held]
    else:
        assert [each.messages for each in back] == held
    assert result.num_input == 300 == result.num_written + len(refused)
    assert sum(result.refused.values()) == len(refused)
    assert json.loads((out / "export.json").read_text())["refused"] == result.refused
    if format in ("trl-messages", "parquet"):
        assert not refused
        assert {json.dumps(each.meta) for each in back} == {json.dumps({"topic": "x", "nested": {"a": [1, None]}})}
        assert [each.id for each in back] == names
        assert back[0].source.endswith("given.jsonl:1")
    assert f"format `{format}`" in (out / "README.md").read_text()


TOOL = {"type": "function", "function": {"name": "看", "parameters": {"type": "object", "properties": {"wo": {"type": "string"}}}}}


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]]), ["hammer", "saw"], "[", []], ids=str)
@pytest.mark.parametrize("format", [*WRITERS, "parquet", "preference"])
def test_the_functions_that_can_be_called_stay_with_the_calls(format: str, given: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pair = {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "b"}]}
    row = {**(pair if format == "preference" else {"messages": chat}), "tools": given, "topic": "x"}
    (tmp_path / "given.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "tools": None}) + "\n")
    run = Run.create(tmp_path / "run")
    take_in(tmp_path / "given.jsonl", run, ImportConfig())
    result = export(run, tmp_path / "out", ExportConfig(format=format))
    names_functions = (isinstance(given, list) and given == [TOOL]) or (isinstance(given, str) and given != "[")
    if names_functions and format == "alpaca":
        assert result.refused == {"tools": 1}
        return
    assert result.refused == {}
    wanted: Any = json.dumps([TOOL["function"]], ensure_ascii=False) if format in ("sharegpt", "llama-factory") else [TOOL]
    if format != "parquet":
        written = [row.get("tools") for _, row in iterate_rows(tmp_path / "out")]
        assert written == [wanted if names_functions else None, None]
    back = [each.meta for each in read_examples(tmp_path / "out")]
    if format in ("trl-messages", "parquet"):
        assert back == [
            {"tools": [TOOL] if names_functions and format == "trl-messages" else given, "topic": "x"},
            {"tools": None, "topic": "x"},
        ]
    elif names_functions:
        assert back[0]["tools"] == wanted


CALLING = [
    {"from": "human", "value": "现在几点了？"},
    {"from": "function_call", "value": '{"name": "now", "arguments": {"tz": "Asia/Taipei"}}'},
    {"from": "observation", "value": '{"time": "12:00"}'},
    {"from": "function_call", "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"שם": [1, null]}}]'},
    {"from": "observation", "value": "[1, 2]"},
    {"from": "gpt", "value": "十二点。🕛"},
]


def test_calls_get_what_openai_asks_for(tmp_path: Path) -> None:
    given = {"id": "call_1", "type": "function", "function": {"name": "c", "arguments": "{}"}}
    last = [{"role": "assistant", "content": "", "tool_calls": [given]}, {"role": "tool", "tool_call_id": "call_1", "content": "3"}]
    messages = [*({"role": {"human": "user", "gpt": "assistant", "observation": "tool"}.get(each["from"], each["from"]), "content": each["value"]} for each in CALLING), *last]  # fmt: skip
    messages.insert(5, {"role": "tool", "content": "second"})
    (tmp_path / "given.jsonl").write_text(json.dumps({"messages": messages}))
    run = Run.create(tmp_path / "run")
    take_in(tmp_path / "given.jsonl", run, ImportConfig())
    assert export(run, tmp_path / "out", ExportConfig(format="openai")).refused == {}
    written = json.loads((tmp_path / "out" / "train.jsonl").read_text())["messages"]
    calls = [(call["id"], call["function"]["arguments"]) for each in written for call in each.get("tool_calls", ())]
    assert calls == [("call_2", '{"tz": "Asia/Taipei"}'), ("call_3", "{}"), ("call_4", '{"שם": [1, null]}'), ("call_1", "{}")]
    assert [each["tool_call_id"] for each in written if each["role"] == "tool"] == ["call_2", "call_3", "call_4", "call_1"]


@pytest.mark.parametrize("format", ["sharegpt", "llama-factory"])
def test_a_call_of_sharegpt_is_a_call_and_goes_back_as_it_came(format: str, tmp_path: Path) -> None:
    """As an assistant's text it was neither a call to OpenAI and the chat templates nor, written again, to LLaMA-Factory."""
    row = {"conversations": CALLING, "tools": json.dumps([TOOL["function"]], ensure_ascii=False)}
    no_call = [CALLING[0], {"from": "function_call", "value": "I call nobody."}]
    (tmp_path / "given.json").write_text(json.dumps([row, {"conversations": no_call}]))
    run = Run.create(tmp_path / "run")
    take_in(tmp_path / "given.json", run, ImportConfig())
    calls = read_examples(run.path)[0].messages[3]
    functions = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"שם": [1, None]}}]
    assert calls == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": each} for each in functions]}
    assert read_examples(run.path)[1].messages[1] == {"role": "assistant", "content": "I call nobody."}
    assert export(run, tmp_path / "out", ExportConfig(format=format)).refused == {}
    if format == "sharegpt":
        assert json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0]) == row
    else:
        (info,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text()).values()
        assert info["columns"] == {"messages": "messages", "tools": "tools"}
        assert info["tags"]["function_tag"] == "function_call"
        turns = json.loads((tmp_path / "out" / "train.json").read_text())[0]["messages"]
        assert [turn["role"] for turn in turns] == ["user", "function_call", "tool", "function_call", "tool", "assistant"]
        assert [turn["content"] for turn in turns] == [turn["value"] for turn in CALLING]
    assert [each.messages for each in read_examples(tmp_path / "out")] == [each.messages for each in read_examples(run.path)]


REFUSALS = [
    ("openai", [{"role": "user", "content": "q"}], "no_answer"),
    ("openai", [{"role": "assistant", "content": "", "tool_calls": [{"type": "retrieval"}]}], "call_of_no_function"),
    (
        "openai",
        [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}],
        "tool_without_call",
    ),
    ("prompt-completion", [{"role": "assistant", "content": "a"}], "no_prompt"),
    ("prompt-completion", [{"role": "user", "content": "q"}], "no_answer"),
    ("sharegpt", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tool_calls"),
    (
        "alpaca",
        [{"role": "system", "content": " "}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "blank_system",
    ),
    ("alpaca", [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}, *[{"role": "assistant", "content": "a"}] * 2], "tool"),
    ("llama-factory", [*[{"role": "user", "content": "q"}] * 2, {"role": "assistant", "content": "a"}], "turns_do_not_alternate"),
]


@pytest.mark.parametrize(("format", "messages", "reason"), REFUSALS)
def test_why_a_format_refuses_a_conversation(format: str, messages: list, reason: str, run_of: Callable, tmp_path: Path) -> None:
    fine = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    result = export(run_of([messages, fine]), tmp_path / "out", ExportConfig(format=format))
    assert result.refused == {reason: 1}
    assert result.summary() == f"1 of 2 rows in {tmp_path / 'out'}, 1 refused; {reason} 1"


def test_a_folder_that_is_written_already_is_left_alone(run_of: Callable, tmp_path: Path) -> None:
    """Each would remove the other's files."""
    run = run_of([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
    out = tmp_path / "out"
    export(run, out, ExportConfig())
    with open(out / ".export.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another process is exporting into it; wait for it, or give another folder"):
            export(run, out, ExportConfig())
    assert export(run, out, ExportConfig()).num_written == 1
    assert not (out / ".export.lock").exists()


def test_a_place_for_no_folder_is_told_in_one_line(run_of: Callable, tmp_path: Path) -> None:
    run = run_of([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"thesis.txt: is a file; give a folder for the export"):
        export(run, tmp_path / "thesis.txt", ExportConfig())
    with pytest.raises(UserError, match=r"thesis.txt/out: cannot be written: Not a directory; give another folder"):
        export(run, tmp_path / "thesis.txt" / "out", ExportConfig())


@pytest.mark.parametrize("format", ["preference", "parquet"])
def test_an_earlier_export_stays_where_no_row_can_be_written(format: str, run_of: Callable, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    out = tmp_path / "out"
    export(run_of([turns]), out, ExportConfig())
    before = {each.name: each.read_bytes() for each in out.iterdir()}
    run = Run.open(tmp_path / "run")
    if format == "parquet":
        filter_rows(run, FilterConfig(min_chars=100))
    with pytest.raises(UserError, match="no row can be written"):
        export(run, out, ExportConfig(format=format))
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before


def test_nothing_that_can_be_held_is_an_error_and_leaves_no_rows(run_of: Callable, tmp_path: Path) -> None:
    run = run_of([[{"role": "user", "content": "q"}]])
    with pytest.raises(UserError, match="no row can be written as openai: no_answer 1"):
        export(run, tmp_path / "out", ExportConfig(format="openai"))
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["export.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and no export of sftkit"):
        export(run, tmp_path / "mine", ExportConfig())


def graded(toy_run: Callable[..., Run]) -> Run:
    rows = [
        {"id": name, "prompt": name, "response": answer, "index": index, "logprob": logprob, "finish_reason": finish}
        for name, answers in {
            "a": [("good", -0.1, "stop"), ("middling", -0.5, "stop"), ("bad", -2.0, "stop"), ("cut", -9.0, "length")],
            "b": [("same", -0.1, "stop"), ("same", -0.5, "stop")],
            "c": [("alone", -0.1, "stop")],
            "d": [("unlikely", -5.0, "stop"), ("unlikelier", -6.0, "stop")],
        }.items()
        for index, (answer, logprob, finish) in enumerate(answers)
    ]
    run = toy_run(rows)
    best(run, BestConfig(by=("logprob",)))
    return run


def answers(path: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["prompt"][-1]["content"]: (row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}


@pytest.mark.parametrize(
    ("settings", "pairs", "refused"),
    [
        ({}, {"a": ("good", "bad"), "d": ("unlikely", "unlikelier")}, {"no_lower_sample": 2}),
        ({"rejected": "next"}, {"a": ("good", "middling"), "d": ("unlikely", "unlikelier")}, {"no_lower_sample": 2}),
        ({"min_margin": 1.5}, {"a": ("good", "bad")}, {"no_lower_sample": 3}),
    ],
)
def test_pairs_of_best_of_k(settings: dict, pairs: dict, refused: dict, toy_run: Callable[..., Run], tmp_path: Path) -> None:
    run = graded(toy_run)
    result = export(run, tmp_path / "out", ExportConfig(format="preference", **settings))
    assert answers(tmp_path / "out" / "train.jsonl") == pairs
    assert result.refused == refused
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == [{"role": "user", "content": "a"}]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    assert (row["chosen_score"], row["rejected_score"]) == (-0.1, -2.0 if settings.get("rejected") != "next" else -0.5)


def test_pairs_come_back_and_are_written_again_as_they_were(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    export(graded(toy_run), tmp_path / "one", ExportConfig(format="preference"))
    run = Run.create(tmp_path / "again")
    take_in(tmp_path / "one", run, ImportConfig())
    export(run, tmp_path / "two", ExportConfig(format="preference"))
    assert answers(tmp_path / "two" / "train.jsonl") == answers(tmp_path / "one" / "train.jsonl")


def test_pairs_are_what_trl_reads(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    export(graded(toy_run), tmp_path / "out", ExportConfig(format="preference"))
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert is_conversational(rows[0])
    assert {"prompt", "chosen", "rejected"} <= set(rows.column_names)


def test_an_export_that_was_killed_is_no_data_and_is_written_again(
    run_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("sftkit.curate.export._write_card", Mock(side_effect=KeyboardInterrupt))  # the rows are there, the rest is not
        with pytest.raises(KeyboardInterrupt):
            export(run, out, ExportConfig())
    assert (out / "train.jsonl").exists()
    with pytest.raises(UserError, match="this export was cut off before it was whole"):
        list(iterate_rows(out))
    assert export(run, out, ExportConfig(format="alpaca")).num_written == 1
    assert len(list(iterate_rows(out))) == 1


def test_what_a_killed_parquet_export_left_is_in_no_other(run_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = run_of([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]), tmp_path / "out"

    def killed(*given: Any) -> None:
        write_dataset(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sftkit.curate.export.write_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            export(run, out, ExportConfig(format="parquet"))
    assert (out / "dataset.jsonl").exists()
    assert export(run, out, ExportConfig(format="alpaca")).num_written == 1
    assert len(list(iterate_rows(out))) == 1


@pytest.mark.parametrize(("token", "reason"), [(None, "there is no token of the Hub"), ("hf_none", "Name or service not known")])
def test_why_nothing_was_pushed(token: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", Mock(side_effect=httpx.ConnectError("Name or service not known")))
    with pytest.raises(UserError, match=rf"me/data: could not be pushed \({reason}\); the files are in"):
        push(tmp_path, "me/data")


def test_the_command_line(run_of: Callable, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    run = run_of([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]])
    code, out, _ = cli("curate", "export", run.path, "--format", "alpaca", "-o", tmp_path / "out")
    assert (code, out) == (0, f"1 of 1 rows in {tmp_path / 'out'}\n")
    code, _, err = cli("curate", "export", run.path, "--format", "preference", "-o", tmp_path / "pairs")
    assert code == 1
    assert "no row can be written as preference: no_rejected_answer 1; a pair is made of a row with a column rejected, or of" in err
    code, _, err = cli("curate", "export", run.path, "-o", tmp_path / "hub", "--push-to-hub", "me/data")
    assert code == 1, "no test may reach the network"
    assert "me/data: could not be pushed" in err
    assert "Traceback" not in err
    assert set(EXPORTS) == {*WRITERS, "preference", "parquet"}


def test_a_folder_of_llama_factory_says_what_its_columns_and_roles_are_called(tmp_path: Path) -> None:
    info = {
        "a": {"file_name": "a.json", "columns": {"prompt": "frage", "response": "antwort"}},
        "b": {
            "file_name": "b.json",
            "formatting": "sharegpt",
            "columns": {"messages": "chat"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "it"},
        },
        "far": {"hf_hub_url": "some/where"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "a.json").write_text(json.dumps([{"frage": "q", "antwort": "a"}]))
    (tmp_path / "b.json").write_text(json.dumps([{"chat": [{"who": "me", "said": "q"}, {"who": "it", "said": "a"}]}]))
    both = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert [each.messages for each in read_examples(tmp_path)] == [both, both]
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="names no file that is there"):
        read_examples(tmp_path)
