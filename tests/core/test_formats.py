"""The formats of the field, row by row: what becomes a turn, what stays in meta, and what a fault says."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.errors import UserError
from sftkit.core.example import ROLES, content_id
from sftkit.core.formats import FORMATS, ROLE_NAMES, calls_of, detect_format, iterate_examples, read_examples, split_prompt


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def said(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["role"], each["content"]) for each in messages]


HI, YES = ("user", "hi"), ("assistant", "yes")
ROWS = {
    "messages": ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "k": 1}, [HI, YES], {"k": 1}),
    "messages as JSON text": ({"messages": '[{"role": "user", "content": "hi"}]'}, [HI], {}),
    "conversation": ({"conversation": [{"role": "user", "content": "hi"}]}, [HI], {}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "be brief"},
        [("system", "be brief"), HI, YES],
        {},
    ),
    "an empty system stays in meta": ({"conversations": [{"from": "human", "value": "hi"}], "system": ""}, [HI], {"system": ""}),
    "a system that is there already": (
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "hi"}], "system": "b"},
        [("system", "a"), HI],
        {"system": "b"},
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yes"}, [HI, YES], {}),
    "alpaca with input": ({"instruction": "Add", "input": "1 2", "output": "3", "n": 7}, [("user", "Add\n\n1 2"), ("assistant", "3")], {"n": 7}),
    "dolly": ({"instruction": "Who?", "context": "Ada.", "response": "Ada", "category": "qa"}, [("user", "Who?\n\nAda."), ("assistant", "Ada")], {"category": "qa"}),
    "alpaca without an answer": ({"instruction": "hi"}, [HI], {}),
    "history before a query": ({"query": "hi", "response": "yes", "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b"), HI, YES], {}),
    "a history of messages": (
        {"query": "hi", "response": "yes", "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b"), HI, YES],
        {},
    ),
    **{
        f"a history of {what}": ({"question": "hi", "answer": "yes", "history": value}, [HI, YES], {"history": value})
        for what, value in {
            "names": ["a", "b"],
            "half a pair": [["a", None]],
            "purchases": [["2020-01-01", "bought", 3]],
            "objects": [{"date": "2020-01-01"}],
            "a question": [{"role": "user", "content": "hi"}],
        }.items()
    },
    "a history in words": ({"question": "hi", "answer": "yes", "history": "ill"}, [HI, YES], {"history": "ill"}),
    "an empty instruction": ({"instruction": "", "input": "hi", "output": "yes"}, [HI, YES], {}),
    "history": ({"instruction": "hi", "output": "yes", "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b"), HI, YES], {}),
    "instances": (
        {"instruction": "hi", "instances": [{"input": "", "output": "yes"}, {"input": "", "output": "no"}]},
        [HI, YES],
        {"other_instances": [{"input": "", "output": "no"}]},
    ),
    "prompt": ({"prompt": "hi"}, [HI], {}),
    "prompt and completion": ({"prompt": "hi", "completion": "yes"}, [HI, YES], {}),
    "question and answer": ({"question": "hi", "answer": "yes", "level": "easy"}, [HI, YES], {"level": "easy"}),
    "problem and solution": ({"problem": "hi", "solution": "yes"}, [HI, YES], {}),
    "input and output": ({"input": "hi", "output": "yes"}, [HI, YES], {}),
    "prompt and completion of messages": (
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]},
        [HI, YES],
        {},
    ),
    "a prompt with a null beside it": ({"prompt": "hi", "messages": None}, [HI], {"messages": None}),
    "ranked answers": ({"instruction": "hi", "output": ["yes", "no"]}, [HI, YES], {"other_outputs": ["no"]}),
    "system prompt": ({"system_prompt": "s", "question": "hi", "response": "yes"}, [("system", "s"), HI, YES], {}),
    "text": ({"text": "hi", "url": "x"}, [HI], {"url": "x"}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]}, [HI], {}),
    "preference": (
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        [HI, YES],
        {"rejected": [{"role": "assistant", "content": "no"}]},
    ),
    "a preference that is not there": ({"messages": [{"role": "user", "content": "hi"}], "chosen": None, "rejected": None}, [HI], {"chosen": None, "rejected": None}),
    "preference of conversations": (
        {
            "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
        },
        [HI, YES],
        {"rejected": [{"role": "assistant", "content": "no"}]},
    ),
    "preference of ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
        [HI, YES],
        {"rejected": [{"role": "assistant", "content": "no"}]},
    ),
    "preference of instructions": (
        {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
        [HI, YES],
        {"rejected": [{"role": "assistant", "content": "no"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_conversation_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    row, expected, meta = ROWS[name]
    (example,) = read_examples(lines(tmp_path / "rows.jsonl", row))
    assert said(example.messages) == expected
    assert example.meta == meta
    assert example.source == f"{tmp_path / 'rows.jsonl'}:1"
    assert example.id == content_id(example.messages)


def test_rows_of_different_formats_may_stand_in_one_file(tmp_path: Path) -> None:
    examples = read_examples(lines(tmp_path / "mixed.jsonl", *(row for row, _, _ in ROWS.values())))
    assert [said(each.messages) for each in examples] == [expected for _, expected, _ in ROWS.values()]
    ids = [each.id for each in examples]
    assert len(set(ids)) == len(ids), "rows that say the same have ids of their own"
    same = [each.id for each in examples if said(each.messages) == [HI, YES]]
    assert same == [same[0], *(f"{same[0]}~{n}" for n in range(2, len(same) + 1))]


def test_roles_of_the_field_are_mapped(tmp_path: Path) -> None:
    names = {
        "system": "system", "developer": "system", "user": "user", "human": "user", "Human": "user", "prompter": "user", "assistant": "assistant",
        "gpt": "assistant", "GPT": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool",
        "observation": "tool", "ipython": "tool",
    }  # fmt: skip
    (example,) = read_examples(lines(tmp_path / "roles.jsonl", {"conversations": [{"from": name, "value": "x"} for name in names]}))
    assert [each["role"] for each in example.messages] == list(names.values())


def test_calls_names_and_thoughts_stay_on_their_turn(tmp_path: Path) -> None:
    call = [{"id": "1", "type": "function", "function": {"name": "get", "arguments": "{}"}}]
    row = {
        "messages": [
            {"role": "user", "content": "hi", "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "It is sunny."}]},
        ]
    }
    (example,) = read_examples(lines(tmp_path / "calls.jsonl", row))
    assert example.messages == [
        {"role": "user", "content": "hi", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "hm"},
    ]


GOOD = {"messages": [{"role": "user", "content": "hi"}]}
FAULTS = {
    "no known column": ({"colour": "red"}, ["found the columns colour", "messages or conversations", "--prompt-column NAME --answer-column NAME` takes other names"]),
    "an unknown role": ({"messages": [{"role": "asistant", "content": "hi"}]}, ["messages[0]", "unknown role 'asistant'", "did you mean 'assistant'?"]),
    "no role": ({"messages": [{"content": "hi"}]}, ["messages[0]: found content; expected role and content, or from and value"]),
    "no content": ({"messages": [{"role": "user"}]}, ["messages[0]", "the content is null", "expected a text"]),
    "a number for a text": ({"messages": [{"role": "user", "content": 5}]}, ["messages[0]", "the content is int '5'"]),
    "a text for a message": ({"messages": ["hi"]}, ["messages[0] is str 'hi'", "an object with role and content"]),
    "no messages": ({"messages": []}, ["messages is empty"]),
    "messages of another type": ({"messages": 7}, ["messages is int '7'", "expected a list"]),
    "messages in broken JSON text": ({"messages": "[{"}, ["messages is a text that is no JSON"]),
    "a null answer": ({"prompt": "hi", "completion": None}, ["completion is null", "give its text"]),
    "a null instruction": ({"instruction": None, "output": "yes"}, ["instruction is null; fill it in"]),
    "null messages": ({"messages": None, "k": 1}, ["messages is null; fill it in"]),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, ["a part of type 'image'", "only texts are read"]),
    "a history of texts": ({"instruction": "hi", "history": ["a"]}, ["history is", "a list of [user, assistant] pairs"]),
    "an answer without its prompt": ({"chosen": "yes", "rejected": "no"}, ["chosen is an answer without its prompt"]),
    "a null candidate": ({"prompt": "hi", "chosen": "yes", "rejected": None}, ["rejected is null", "expected a text"]),
    "a number for a prompt": ({"prompt": 7}, ["prompt is int '7'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_row_and_cure(name: str, tmp_path: Path) -> None:
    row, words = FAULTS[name]
    path = lines(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError) as error:
        read_examples(path)
    told = str(error.value)
    assert told.startswith(f"{path}:2: ")
    assert "\n" not in told
    for word in words:
        assert word in told


def test_a_format_can_be_given(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"prompt": "hi", "instruction": "do", "text": "all of it", "output": "yes"})
    assert said(read_examples(path)[0].messages) == [("user", "do"), YES]
    assert said(read_examples(path, format="prompt")[0].messages) == [HI, YES]
    assert said(read_examples(path, format="text")[0].messages) == [("user", "all of it")]
    with pytest.raises(UserError, match="expected messages or conversations or conversation"):
        read_examples(path, format="sharegpt")
    with pytest.raises(UserError, match="expected chosen and rejected"):
        read_examples(path, format="preference")
    with pytest.raises(UserError, match=r"unknown format 'alpacca': did you mean 'alpaca'\?"):
        read_examples(path, format="alpacca")
    for name in FORMATS:
        with pytest.raises(UserError, match=r"rows.jsonl:1: found the columns odd; expected"):
            read_examples(lines(tmp_path / "rows.jsonl", {"odd": 1}), format=name)


def test_an_answer_that_is_not_wanted_is_no_answer_to_learn(tmp_path: Path) -> None:
    """TRL's unpaired preferences; a label that is no truth value is a column like others."""
    path = lines(
        tmp_path / "kto.jsonl", {"prompt": "hi", "completion": "yes", "label": True}, {"prompt": "hi", "completion": "no", "label": False}
    )
    with pytest.raises(UserError, match=r"kto.jsonl:2: label is false: its answer, in completion, is one that is not wanted"):
        read_examples(path)
    table = tmp_path / "kto.csv"
    table.write_text("prompt,completion,label\nhi,no,False\n")
    with pytest.raises(UserError, match="label is false"):
        read_examples(table)
    classes = lines(tmp_path / "classes.jsonl", {"prompt": "hi", "completion": "yes", "label": 0})
    assert read_examples(classes)[0].meta == {"label": 0}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    for row in (
        {"messages": chat, "label": False},
        {"conversations": chat, "kto_tag": False},
        {"instruction": "hi", "output": "no", "kto_tag": False},
    ):
        with pytest.raises(UserError, match=r"unpaired.jsonl:1: \w+ is false: its answer, in \w+, is one .*; leave such rows out, or give"):
            read_examples(lines(tmp_path / "unpaired.jsonl", row))
        mark = next(name for name in ("label", "kto_tag") if name in row)
        renamed = {"class" if name == mark else name: value for name, value in row.items()}
        assert read_examples(lines(tmp_path / "unpaired.jsonl", renamed))[0].meta == {"class": False}
    assert read_examples(lines(tmp_path / "liar.jsonl", {"messages": chat, "label": "false"}))[0].meta == {"label": "false"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}], "label": False},
        {"conversations": [{"from": "human", "value": "hi"}], "kto_tag": False},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}], "label": False, "answer": "yes"},
        {"messages": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no", "label": False},
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}],
            "chosen": "yes",
            "rejected": "no",
            "kto_tag": False,
        },
        {"prompt": "hi", "label": False},
    ],
)
def test_a_false_label_of_something_else_is_a_column_like_others(row: dict[str, Any], tmp_path: Path) -> None:
    mark = "label" if "label" in row else "kto_tag"
    assert read_examples(lines(tmp_path / "rows.jsonl", row))[0].meta[mark] is False


def test_what_sftkit_wrote_keeps_its_id_source_and_meta(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    own = content_id(messages)
    rows = [
        {"id": own, "messages": messages, "source": "first.jsonl:3", "meta": {"k": 1}},
        {"id": f"{own}~2", "messages": messages, "source": "first.jsonl:9", "meta": {}},
        {"id": f"{own}/4", "messages": messages, "source": "first.jsonl:11", "meta": '{"k": 2}'},
    ]
    examples = read_examples(lines(tmp_path / "dataset.jsonl", *rows))
    assert [(each.id, each.source, each.meta) for each in examples] == [
        (own, "first.jsonl:3", {"k": 1}),
        (f"{own}~2", "first.jsonl:9", {}),
        (f"{own}~3", "first.jsonl:11", {"k": 2, "id": f"{own}/4"}),
    ]
    edited = [{**rows[0], "messages": [{"role": "user", "content": "edited"}]}]
    (example,) = read_examples(lines(tmp_path / "dataset.jsonl", *edited))
    assert example.id == content_id(edited[0]["messages"]), "an id is that of the messages that stand there"
    assert example.meta["id"] == own


def test_split_prompt_ends_at_the_last_question(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "content": "b"}]},
    ]
    split = [split_prompt(each) for each in read_examples(lines(tmp_path / "rows.jsonl", *rows))]
    assert [(said(prompt), answer) for prompt, answer in split] == [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], None),
        ([("user", "a")], "b"),
        ([], "b"),
    ]


def test_detection_goes_by_the_columns_that_are_there() -> None:
    expected = {
        ("messages",): "messages", ("conversations", "tools"): "messages", ("instruction", "output"): "alpaca", ("prompt",): "prompt",
        ("question", "answer", "text"): "prompt", ("text", "label"): "text", ("text", "answer"): "prompt", ("prompt", "chosen", "rejected"): "preference",
    }  # fmt: skip
    for columns, name in expected.items():
        assert detect_format(set(columns)) == name


CHINESE = re.compile("[\u4e00-\u9fff]")


def texts(value: Any) -> list[str]:
    """Return all texts in a value, but no names of keys."""
    if isinstance(value, str):
        return [value]
    return [
        text for each in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()) for text in texts(each)
    ]


def files_of(folder: Path) -> list[tuple[Path, int]]:
    """Return the files that a SOURCE.md lists, with their numbers of rows."""
    table = (folder / "SOURCE.md").read_text(encoding="utf-8")
    return [(folder / name, int(count)) for name, count in re.findall(r"^\| (\S+\.jsonl\.gz) \| (\d+) \|", table, re.MULTILINE)]


@pytest.mark.parametrize("name", ["llamafactory_demo", "alpaca_subset", "dolly_3k", "lima", "oasst_zh", "self_instruct"])
def test_real_data_is_read_whole(name: str, shared_data: Path) -> None:
    files = files_of(shared_data / name)
    assert files
    names = {*ROLE_NAMES, "text", "reasoning"}  # of roles and of parts: a turn says them in its own way
    unwanted: list[str] = []
    for path, count in files:
        if path.name.startswith("kto"):  # half of its answers are marked as not wanted
            wanted = list(iterate_examples(path, faulty=lambda place, error: unwanted.append(str(error))))
            assert (len(wanted), len(unwanted)) == (150, 150)
            assert all("label is false" in each for each in unwanted)
            assert all(each.meta == {"label": True} for each in wanted)
            continue
        examples = read_examples(path)
        assert len(examples) == count, path.name
        assert len({each.id for each in examples}) == count
        assert {message["role"] for each in examples for message in each.messages} <= set(ROLES)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for each, line in zip(examples, file, strict=True):  # not a character is lost, whatever became of its column
                kept = "\0".join([*texts(each.messages), *texts(each.meta)])
                assert all(text in kept for text in texts(json.loads(line)) if text not in names and not calls_of(text)), each.source
        for number, each in enumerate(examples, start=1):
            assert each.source == f"{path}:{number}"
            assert all(isinstance(message["content"], str) for message in each.messages)
        shapes = Counter("".join(message["role"][0] for message in each.messages) for each in examples)
        if "toolcall" in path.name:  # calls are the assistant's, observations the tool's
            letters = {"human": "u", "gpt": "a", "function_call": "a", "observation": "t"}
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = [json.loads(line)["conversations"] for line in file]
            assert shapes == Counter("".join(letters[turn["from"]] for turn in turns) for turns in lines)
            calls = [json.loads(turn["value"]) for turns in lines for turn in turns if turn["from"] == "function_call"]
            found = [call["function"] for each in examples for message in each.messages for call in message.get("tool_calls", [])]
            assert found == calls
            assert found
        elif "dpo" in path.name:
            assert all(each.messages[-1]["role"] == "assistant" for each in examples)
            assert all(each.meta["rejected"][0]["role"] == "assistant" for each in examples)
        elif name in ("alpaca_subset", "dolly_3k") or "alpaca" in path.name:
            assert shapes == {"ua": count}
        if "zh" in path.name:
            assert sum(bool(CHINESE.search("".join(message["content"] for message in each.messages))) for each in examples) > 0.95 * count


def test_real_histories_become_turns(shared_data: Path) -> None:
    lima = read_examples(shared_data / "lima" / "lima.jsonl.gz")
    assert sum(len(each.messages) > 2 for each in lima) == 29
    ranked = read_examples(shared_data / "oasst_zh" / "oasst_rm_zh.jsonl.gz")
    assert all(each.meta["other_outputs"] for each in ranked)
    assert sum(len(each.messages) > 2 for each in ranked) == 392
