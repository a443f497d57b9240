"""Where rows come from: each kind of file, folder and stream, and each fault with its file and row."""

import csv
import gzip
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.sources import hash_files, iterate_rows, kind_of, mend_text, parse_json, plain

ROWS = [{"prompt": "你好", "answer": "a\nb"}, {"prompt": "two", "answer": "🙂"}, {"prompt": "three", "answer": ""}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pl.DataFrame(rows).write_parquet(content)
    return content.getvalue()


def as_json(rows: list[dict[str, Any]], indent: int | None = None) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode()


MARK = b"\xef\xbb\xbf"
KINDS = {
    "a.jsonl": jsonl(ROWS),
    "a.ndjson": jsonl(ROWS),
    "blank.jsonl": b"\n\n" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n"),
    "mark.jsonl": MARK + jsonl(ROWS),
    "a.json": as_json(ROWS),
    "lines.json": jsonl(ROWS),
    "array.jsonl": as_json(ROWS),
    "indented.json": as_json(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS, "empty": []}, indent=1).encode(),
    "a.csv": as_csv(ROWS),
    "mark.csv": MARK + as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "tabs.csv": as_csv(ROWS, "\t"),
    "a.tsv": as_csv(ROWS, "\t"),
    "a.parquet": parquet(ROWS),
    "UPPER.JSONL": jsonl(ROWS),
    "part[1]*.parquet": parquet(ROWS),  # a name, which polars would take for a pattern
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(KINDS[name]) if packed else KINDS[name])
    found = list(iterate_rows(path))
    assert [row for _, row in found] == ROWS
    assert all(place.startswith(f"{path}:") for place, _ in found)
    numbers = [int(place.rpartition(":")[2]) for place, _ in found]
    assert numbers == {"blank.jsonl": [3, 5, 7]}.get(name, [2, 4, 5] if name.endswith(("csv", "tsv")) else [1, 2, 3])


def test_a_gzipped_file_need_not_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(jsonl(ROWS)))
    assert [row for _, row in iterate_rows(tmp_path / "a.jsonl")] == ROWS
    (tmp_path / "b.jsonl.gz").write_bytes(jsonl(ROWS))
    assert [row for _, row in iterate_rows(tmp_path / "b.jsonl.gz")] == ROWS


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\n  second \n你好", encoding="utf-8")
    assert [(place.rpartition(":")[2], row) for place, row in iterate_rows(tmp_path / "a.txt")] == [
        ("1", {"text": "first"}),
        ("3", {"text": "  second "}),
        ("4", {"text": "你好"}),
    ]


@pytest.mark.parametrize(
    "content", [jsonl(ROWS), as_json(ROWS, indent=2), as_json(ROWS), gzip.compress(jsonl(ROWS)), MARK + jsonl(ROWS), b"\n" + jsonl(ROWS)]
)
def test_standard_input(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [row for _, row in iterate_rows("-")] == ROWS


def test_standard_input_of_text_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert list(iterate_rows("-")) == [("stdin:1", {"text": "one"}), ("stdin:2", {"text": "two"})]
    for content, words in ((b"", "stdin: is empty"), (b"\xff\xfe", "stdin:1: not UTF-8"), (gzip.compress(b"one\n")[:-9], "stdin: damaged")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(UserError, match=words):
            list(iterate_rows("-"))


def test_a_folder_is_its_files_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "part-2.jsonl").write_bytes(jsonl(ROWS[2:]))
    (tmp_path / "a.csv").write_bytes(as_csv(ROWS[:2]))
    (tmp_path / ".cache" / "old.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / ".hidden.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "README.md").write_text("what this is")
    with caplog.at_level(logging.INFO, "sftkit"):
        assert [row for _, row in iterate_rows(tmp_path)] == ROWS
        assert not caplog.text
        (tmp_path / "notes.txt").write_text("not a row")
        assert [row for _, row in iterate_rows(tmp_path)] == ROWS
    assert "its .txt files are not read" in caplog.text


def test_a_run_is_its_data_set(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_bytes(jsonl(ROWS))
    for name in ("config.yaml", "versions.json"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=r"this run has no data set .*; give the data that it was given itself"):
        list(iterate_rows(tmp_path))
    (tmp_path / "curate").mkdir()
    with pytest.raises(UserError, match=r"this run has no data set \(no curate/dataset.jsonl\); finish its curation"):
        list(iterate_rows(tmp_path))
    (tmp_path / "curate" / "prompts.parquet").write_bytes(parquet(ROWS))
    (tmp_path / "curate" / "prompts.jsonl").write_bytes(jsonl(ROWS[1:]))  # of `curate prompts`, which makes no more
    assert [row for _, row in iterate_rows(tmp_path)] == ROWS[1:]
    (tmp_path / "curate" / "dataset.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert [row for _, row in iterate_rows(tmp_path)] == ROWS[:1]


def test_what_the_datasets_library_saved(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert [row for _, row in iterate_rows(tmp_path / "one")] == ROWS
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])})
    both.save_to_disk(str(tmp_path / "both"))
    assert [row for _, row in iterate_rows(tmp_path / "both")] == ROWS[:2]
    assert [row for _, row in iterate_rows(tmp_path / "both", split="test")] == ROWS[2:]
    with pytest.raises(UserError, match="has no split 'validation'; it has test, train"):
        list(iterate_rows(tmp_path / "both", split="validation"))


def test_a_name_of_the_hub_that_is_not_to_be_had() -> None:
    """The tests run offline: that is said in one line, with the cure."""
    with pytest.raises(UserError, match=r"^nobody/nothing: no such file, and not to be had as a data set of the Hub \(.*check the name"):
        list(iterate_rows("nobody/nothing"))


FAULTS: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("a.jsonl", b"", ["a.jsonl: is empty"]),
    "only blank lines": ("a.jsonl", b"\n \n", ["a.jsonl: is empty"]),
    "empty gz": ("a.jsonl.gz", gzip.compress(b""), ["a.jsonl.gz: is empty"]),
    "an empty list": ("a.json", b"[]", ["a.json: is empty"]),
    "only names": ("a.csv", b"prompt,answer\n", ["a.csv: is empty"]),
    "an empty text": ("a.txt", b"\n\n", ["a.txt: is empty"]),
    "a broken line": ("a.jsonl", jsonl(ROWS) + b'{"prompt": "x"\n', ["a.jsonl:4: not valid JSON (Expecting ',' delimiter at column 15)"]),
    "a broken first line": ("a.jsonl", b'{"prompt": [\n' + jsonl(ROWS), ["a.jsonl:1: not valid JSON"]),
    "a broken line after blank ones": ("a.jsonl", b"\n\n" + jsonl(ROWS[:1]) + b"\n{]\n", ["a.jsonl:5: not valid JSON"]),
    "a broken list": ("a.json", b'[\n {"prompt": "x"},\n {"prompt" "y"}\n]', ["a.json: not valid JSON (Expecting ':' delimiter at line 3 column 12)"]),
    "a line that is no object": ("a.jsonl", jsonl(ROWS[:1]) + b"7\n", ["a.jsonl:2: expected an object", "found a number"]),
    "an element that is no object": ("a.json", b'[{"prompt": "x"}, [1]]', ["a.json:2: expected an object", "found a list"]),
    "a number for a list": ("a.json", b"7", ["a.json: expected a list of objects, found a number"]),
    "two lists": ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), ["a.json: has 2 lists (train, test)"]),
    "nested too deeply": ("a.jsonl", b"[" * 100_000 + b"\n{}\n", ["a.jsonl: not valid JSON"]),
    "not text": ("a.jsonl", jsonl(ROWS[:1]) + b'{"prompt": "\xff"}\n', ["a.jsonl:2: not UTF-8 text (byte 0xff)"]),
    "not text, csv": ("a.csv", b"prompt\nx\n\xff\n", ["a.csv:", "not UTF-8 text (byte 0xff)"]),
    "cut short": ("a.jsonl.gz", gzip.compress(jsonl(ROWS * 100))[:-20], ["a.jsonl.gz: damaged or cut short"]),
    "a damaged gz": ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:12] + b"\0" * 30, ["a.jsonl.gz: damaged or cut short"]),
    "too many cells": ("a.csv", b"prompt,answer\nx,y\nx,y,z\n", ["a.csv:3: has 3 cells, the first line names 2"]),
    "a row after one of two lines": ("a.csv", b'prompt,answer\n"x\ny",z\nx\n', ["a.csv:4: has 1 cell, the first line names 2"]),
    "an open quote": ("a.csv", b'prompt,answer\n"x,y\n', ["a.csv:2: not valid CSV"]),
    "a repeated name": ("a.csv", b"prompt,prompt\nx,y\n", ["a.csv:1: each column needs a name of its own"]),
    "a missing name": ("a.csv", b"prompt,\nx,y\n", ["a.csv:1: each column needs a name of its own"]),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["only Git LFS's pointer", "git lfs pull"]),
    "no Parquet": ("a.parquet", b"PAR1 but not really", ["a.parquet: not a Parquet file"]),
    "another kind": ("a.docx", b"x", ["a.docx: not a kind of file that is read here; give .jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_and_row(name: str, tmp_path: Path) -> None:
    file, content, words = FAULTS[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(iterate_rows(path))
    told = str(error.value)
    assert told.startswith(str(path))
    assert "\n" not in told
    assert len(told) < 500
    for word in words:
        assert word in told


def test_rows_before_a_fault_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS) + b"{")
    rows = iterate_rows(tmp_path / "a.jsonl")
    assert [next(rows)[1] for _ in ROWS] == ROWS
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("promts.jsonl", "no such file or folder; did you mean {folder}/prompts.jsonl?"),
        ("no/where/prompts.jsonl", "no such file, nor a folder {folder}/no/where; a data set of the Hub is named ORGANISATION/NAME"),
        ("xyz", "no such file or folder"),
        ("empty", "holds no data file (.jsonl"),
    ],
)
def test_what_is_not_there(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        list(iterate_rows(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name}: {words.format(folder=tmp_path)}")


def test_half_a_surrogate_pair_is_mended_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude42"}\n{"prompt": ["a\\ud83db", {"k\\udc00": 1}]}\n')
    assert [row for _, row in iterate_rows(tmp_path / "a.jsonl")] == [{"prompt": "🙂"}, {"prompt": ["a\ufffdb", {"k\ufffd": 1}]}]
    assert "a.jsonl:2: half a surrogate pair became U+FFFD" in caplog.text
    assert ":1:" not in caplog.text
    assert mend_text("🙂") == "🙂"


def test_what_json_does_not_know() -> None:
    assert parse_json('{"a": NaN, "b": [Infinity, -Infinity, 1.5, -1e999]}') == {"a": None, "b": [None, None, 1.5, None]}
    with pytest.raises(ValueError, match="Expecting value at line 2 column 1"):
        parse_json("[\n")


def test_cells_of_parquet_become_what_json_has(tmp_path: Path) -> None:
    from datetime import date, datetime

    row = {
        "when": datetime(2024, 1, 2, 3),
        "day": date(2024, 1, 2),
        "nan": float("nan"),
        "bytes": b"\0\1",
        "nested": [{"x": 1.5, "none": None}],
        "flag": True,
    }
    pl.DataFrame([row]).write_parquet(tmp_path / "a.parquet")
    ((_, found),) = iterate_rows(tmp_path / "a.parquet")
    assert found == {
        "when": "2024-01-02T03:00:00",
        "day": "2024-01-02",
        "nan": None,
        "bytes": "AAE=",
        "nested": [{"x": 1.5}],
        "flag": True,
    }
    json.dumps(found, allow_nan=False)
    assert plain(float("-inf")) is None


def test_objects_of_a_column_have_no_names_of_each_other(tmp_path: Path) -> None:
    """A column of Parquet has one kind of object: one function's parameters, and what it is called with, would be all functions'."""
    rows = [{"calls": [{"name": "forecast", "arguments": {"city": "Bern"}}]}, {"calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}]
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    assert [row for _, row in iterate_rows(tmp_path / "a.parquet")] == rows


def test_kinds_go_by_the_name() -> None:
    kinds = {"a.jsonl": ".jsonl", "a.JSON": ".json", "a.csv.gz": ".csv", "a.parquet": ".parquet", "a.gz": None, "a": None, "a.txt": ".txt"}
    assert {name: kind_of(Path(name)) for name in kinds} == kinds


def test_names_of_columns_as_people_and_pandas_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(", prompt , response\n0,x, y\n")
    assert [row for _, row in iterate_rows(tmp_path / "a.csv")] == [{"Unnamed: 0": "0", "prompt": "x", "response": " y"}]


def test_a_cell_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv([{"prompt": "x" * 300_000}]))
    ((_, row),) = iterate_rows(tmp_path / "a.csv")
    assert len(row["prompt"]) == 300_000


@pytest.mark.parametrize("write", [jsonl, as_csv, parquet, as_json])
def test_many_rows_keep_order_and_number(write: Callable[[list[dict[str, Any]]], bytes], tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}"} for number in range(25_000)]
    path = tmp_path / f"a.{ {'jsonl': 'jsonl', 'as_csv': 'csv', 'parquet': 'parquet', 'as_json': 'json'}[write.__name__] }"
    path.write_bytes(write(rows))
    found = list(iterate_rows(path))
    assert [row for _, row in found] == rows
    first = 2 if path.suffix == ".csv" else 1
    assert [place.rpartition(":")[2] for place, _ in found] == [str(number) for number in range(first, len(rows) + first)]


@pytest.mark.parametrize("name", ["", " "])
def test_a_name_that_is_empty_is_not_this_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the name of the data is empty"):
        next(iterate_rows(name))
    assert len(list(iterate_rows("."))) == 1


def test_a_folder_is_known_by_its_data_wherever_it_lies(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / "a.jsonl").write_text('{"prompt": "a"}')
    (data / "more" / "b.csv").write_text("prompt\nb\n")
    before = hash_files(data)
    (data / ".hidden.jsonl").write_text("{}")
    (data / "notes.md").write_text("no data")
    data = data.rename(tmp_path / "moved")
    assert hash_files(data) == before
    (data / "more" / "b.csv").rename(data / "b.csv")  # its rows have other places
    moved = hash_files(data)
    (data / "a.jsonl").write_text('{"prompt": "A"}')
    assert len({before, moved, hash_files(data), hash_files(data / "a.jsonl")}) == 4


def test_a_run_is_known_by_its_data_set(tmp_path: Path) -> None:
    made = tmp_path / "curate" / "dataset.jsonl"
    made.parent.mkdir()
    made.write_text('{"prompt": "a"}')
    (tmp_path / "config.yaml").write_text("{}")
    before = hash_files(tmp_path)
    (tmp_path / "versions.json").write_text("{}")
    assert hash_files(tmp_path) == before
    made.write_text('{"prompt": "b"}')
    assert hash_files(tmp_path) != before
