"""Rows come in as they are called in their file, and conversations with calls as what they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.run import Run
from sftkit.curate.config import ImportConfig
from sftkit.curate.intake import take_in
from sftkit.curate.rows import load_rows

ROW = {"问题": "一加一？", "回答": "二", "prompt": "template 7", "topic": "x"}


def taken(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.create(folder / "run")
    take_in(folder / "rows.jsonl", run, ImportConfig(**settings))
    run.close()
    return read_examples(run.path)


def test_columns_that_have_no_usual_names_are_named(tmp_path: Path) -> None:
    (found,) = taken([ROW], tmp_path, prompt_column="问题", answer_column="回答")
    assert found.messages == [{"role": "user", "content": "一加一？"}, {"role": "assistant", "content": "二"}]
    assert found.meta == {"prompt": "template 7", "topic": "x"}  # which is the prompt where nothing is said


def test_one_of_them_may_have_its_usual_name(tmp_path: Path) -> None:
    (found,) = taken([ROW], tmp_path, answer_column="回答")
    assert [each["content"] for each in found.messages] == ["template 7", "二"]
    (tmp_path / "other").mkdir()
    (found,) = taken([{**ROW, "answer": "2"}], tmp_path / "other", prompt_column="问题")
    assert [each["content"] for each in found.messages] == ["一加一？", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_column": "frage"}, r"rows.jsonl:1: found the columns 问题, 回答, prompt, topic; expected frage"),
        ({"prompt_column": "问题", "answer_column": "antwort"}, r"rows.jsonl:1: found the columns 回答, prompt, topic; expected antwort"),
        ({"prompt_column": "问题", "format": "alpaca"}, "format alpaca: has columns of its own"),
    ],
)
def test_a_column_that_is_not_there_is_told(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        taken([ROW], tmp_path, **settings)


def test_the_command_names_them_too(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "faq.csv").write_text("title,body\n第一題？,甲 👍\n")
    named = ("--prompt-column", "title", "--answer-column", "body")
    code, _, err = cli("curate", "import", tmp_path / "faq.csv", "-o", tmp_path / "run", *named)
    assert code == 0, err
    (found,) = read_examples(tmp_path / "run")
    assert [each["content"] for each in found.messages] == ["第一題？", "甲 👍"]


def test_rows_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(taken([{"prompt": "a"}, {"prompt": "b"}, {"prompt": 7}], tmp_path, limit=2)) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_takes_a_row_at_least(limit: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"limit: expected 1 or more, found {limit}"):
        taken([{"prompt": "a"}], tmp_path, limit=limit)


def test_rows_without_an_answer_are_told_with_the_columns_that_may_hold_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken([{"prompt": "a", "response": "b"}, {"prompt": "a", "reply": "b", "topic": "x"}], tmp_path)
    assert "1 of 2 rows have no answer, as" in caplog.text
    assert "rows.jsonl:2; if one of its other columns is it (reply, topic), name that as answer column" in caplog.text
    caplog.clear()
    (tmp_path / "other").mkdir()
    taken([{"prompt": "a", "response": "b"}], tmp_path / "other")
    assert not caplog.text


def test_columns_of_ours_that_hold_something_else_stay_in_meta(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"id": "q", "messages": messages, "source": source, "meta": {}} for source in (5, {"url": "u"})]
    found = taken([*rows, {"messages": messages, "num_tokens": 10**30}], tmp_path)
    assert [each.meta.get("source") for each in found] == [5, {"url": "u"}, None]
    assert [each.source.rpartition("/")[2] for each in found] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert found[2].meta == {"num_tokens": 10**30}


def test_a_row_whose_reference_is_null_has_none(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "gold_label": gold} for gold in ("3", None)]
    taken(rows, tmp_path, reference_column="gold_label")
    assert load_rows(Run.open(tmp_path / "run"))["reference"].to_list() == ["3", None]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"rows.jsonl:1: no column 'gold'; there are gold_label"):
        taken(rows, tmp_path / "other", reference_column="gold")


@pytest.mark.parametrize("command", [("import",), ("build",), ("dedup", "--no-semantic")])
def test_a_file_that_is_not_there_leaves_no_folder(
    command: tuple[str, ...], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    name, *options = command
    code, _, err = cli("curate", name, tmp_path / "typo.jsonl", "-o", tmp_path / "run", *options)
    assert code == 1
    assert "typo.jsonl: no such file" in err
    assert not (tmp_path / "run").exists()
