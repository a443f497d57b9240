"""Rows come in as they are called in their file, and conversations with calls as what they are."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.run import Run
from sftkit.curate.config import ImportConfig
from sftkit.curate.intake import take_in
from sftkit.curate.rows import load_rows

Cli = Callable[..., tuple[int, str, str]]
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


GOOD = [json.dumps({"prompt": f"q{number}", "response": f"a{number}"}) for number in range(6)]
BAD = {  # a line of a file, and why it is no row
    b'{"prompt": "cut': "not valid JSON",
    b"[1, 2]": "expected an object",
    b'{"colour": "red"}': "found the columns colour",
    b'{"messages": [{"role": "wizard", "content": "hi"}]}': "messages[0]: unknown role 'wizard'",
    b'{"prompt": null, "response": "x"}': "prompt is null",
    b'{"prompt": "caf\xe9"}': "not UTF-8 text (byte 0xe9)",
}


@pytest.fixture
def crawled(tmp_path: Path) -> Path:
    """A file whose every second line is no row, the first one too."""
    file = tmp_path / "crawled.jsonl"
    file.write_bytes(b"".join(bad + b"\n" + good.encode() + b"\n" for bad, good in zip(BAD, GOOD, strict=True)))
    return file


def test_rows_that_cannot_be_read_are_left_out_by_name(crawled: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    few = cli("curate", "import", crawled, "-o", tmp_path / "few", "--max-failed", 0.9, "--limit", 1)[1]
    assert few.splitlines()[1].split() == ["import", "2", "1", "unreadable", "1"]  # each has a reason with a place of its own
    code, out, err = cli("curate", "import", crawled, "-o", run, "--max-failed", 0.5)
    assert (code, "Traceback" in err) == (0, False)
    assert out.splitlines()[1].split() == ["import", "12", "6", "unreadable", "6"]
    assert [each.messages[0]["content"] for each in read_examples(run)] == [f"q{number}" for number in range(6)]
    failed = Run.open(run).ledger.read().filter(pl.col("action") == "failed")
    assert failed["example_id"].to_list() == [f"crawled.jsonl:{line}" for line in range(1, 12, 2)]
    for place, rule, reason in zip(failed["example_id"], failed["rule"], BAD.values(), strict=True):
        assert rule.startswith(f"unreadable: {tmp_path / place}: {reason}")
    assert "not UTF-8 text" in cli("curate", "why", "crawled.jsonl:11", run)[1]
    assert "found the columns colour" in cli("curate", "show", run, "--rejected", "unreadable")[1]
    assert cli("curate", "verify", run)[0] == 0


def test_more_of_them_than_may_be_end_with_3_after_the_rest_is_taken_in(crawled: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        code, _, err = cli("curate", "import", crawled, "-o", run, "--max-failed", 0.49)
        assert code == 3
        assert "6 of 12 rows cannot be read, more than the share of 0.49 that max_failed allows, the first: unreadable: " in err
        assert len(read_examples(run)) == 6


def test_without_a_share_the_first_of_them_ends_it_and_nothing_is_taken_in(crawled: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("curate", "import", crawled, "-o", tmp_path / "run")
    assert (code, "max-failed" in err) == (1, False)  # the very first may be a file of another kind
    crawled.write_text(f"{GOOD[0]}\n{{\n")
    code, _, err = cli("curate", "import", crawled, "-o", tmp_path / "run")
    assert code == 1
    assert err.splitlines()[-1].endswith("; `sftkit curate import --max-failed 0.01` leaves such rows out")
    assert not (tmp_path / "run").exists()
    crawled.write_text("5\n6\n")
    code, _, err = cli("curate", "import", crawled, "-o", tmp_path / "run", "--max-failed", 1)
    assert code == 1
    assert "has no rows that can be read; unreadable: " in err


@pytest.mark.parametrize(
    ("name", "text", "failed"),
    [
        ("a.csv", "prompt,response\na,b\nc\nd,e\n", ["a.csv:3"]),
        ("a.json", '[{"prompt": "a", "response": "b"}, 5, {"prompt": "d", "response": "e"}]', ["a.json:2"]),
    ],
)
def test_rows_of_other_files_that_cannot_be_read(name: str, text: str, failed: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with Run.create(tmp_path / "run") as run:
        take_in(tmp_path / name, run, ImportConfig(max_failed=0.5))
        assert run.ledger.read().filter(pl.col("action") == "failed")["example_id"].to_list() == failed
    assert len(read_examples(run.path)) == 2


def test_files_of_one_name_in_several_folders_have_rows_of_their_own(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "x.jsonl").write_text(f"{GOOD[0]}\n5\n")
    with Run.create(tmp_path / "run") as run:
        take_in(tmp_path / "data", run, ImportConfig(max_failed=0.5))
        failed = run.ledger.read().filter(pl.col("action") == "failed")
    assert failed["example_id"].to_list() == ["x.jsonl:2", "x.jsonl:2~2"]
    assert ["/b/x.jsonl:2: expected an object" in rule for rule in failed["rule"]] == [False, True]


def test_one_candidate_that_is_no_text_leaves_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "one": "b", "two": 5}, {"prompt": "c", "one": "d", "two": "e"}]
    found = taken_with_failures(rows, tmp_path, samples=("one", "two"), max_failed=0.5)
    assert found == [(1, "rows.jsonl:1: column two: expected a text")]
    (tmp_path / "other").mkdir()
    rows = [{"prompt": "a", "response": "b", "gold": "1"}, {"prompt": "c", "response": "d"}]
    assert taken_with_failures(rows, tmp_path / "other", reference_column="gold", max_failed=0.5) == [
        (None, "rows.jsonl:2: no column 'gold'")
    ]


def taken_with_failures(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> list[tuple[int | None, str]]:
    """Return the sample and the beginning of the reason of each failure."""
    taken(rows, folder, **settings)
    failed = Run.open(folder / "run").ledger.read().filter(pl.col("action") == "failed")
    reasons = [rule.rpartition("/")[2].partition("; ")[0].partition(", or")[0] for rule in failed["rule"]]
    return list(zip(failed["sample_index"], reasons, strict=True))


def test_a_folder_whose_digest_has_the_source_in_it_is_the_same_rows(tmp_path: Path) -> None:
    taken([ROW], tmp_path)
    run = Run.create(tmp_path / "run")
    now = run.config()["intake"]
    rows = pl.read_parquet(run.path / "curate" / "rows.parquet")
    lines = rows.select(pl.concat_str(pl.all().fill_null("\x00"), separator="\x1f")).to_series()
    former = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert former != now["content"]
    run.configure("intake", {**now, "content": former}, free=("*",))
    assert take_in(tmp_path / "rows.jsonl", run, ImportConfig()) is None
    assert run.config()["intake"] == now
    run.configure("intake", {**now, "content": former[::-1]}, free=("*",))
    with pytest.raises(UserError, match="holds other rows"):
        take_in(tmp_path / "rows.jsonl", run, ImportConfig())
