"""A run folder refuses to be mixed up with another run, and is held by one process at a time."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.files import read_json, read_json_lines, write_atomically
from sftkit.core.run import Run, is_done, mark_done, read_done, versions


def test_a_new_run_explains_itself(tmp_path: Path) -> None:
    with Run.create(tmp_path / "runs" / "a") as run:
        assert run.config() == {}
        assert run.ledger.stages() == []
        assert run.room("curate").is_dir()
        said = json.loads((run.path / "versions.json").read_text())
    assert said == versions()
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["transformers"]
    assert "vllm" in said, "what is not installed is null, and stands there"


def test_other_settings_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    with Run.create(tmp_path) as run:
        assert run.configure("distill", {"k": 1, "seed": 0, "system": None, "尺": "長"}, free=("k",)) == []
        before = (tmp_path / "config.yaml").read_text(encoding="utf-8")
        assert "尺: 長" in before
        assert run.configure("distill", {"k": 1, "seed": 0, "system": None, "尺": "長"}, free=("k",)) == []
        with pytest.raises(UserError) as error:
            run.configure("distill", {"k": 2, "seed": 7, "system": "hi", "尺": "長"}, free=("k",))
        assert str(error.value) == (
            f"{tmp_path}: this folder holds another run (distill.seed was 0, now 7; distill.system was None, now 'hi'); "
            "give another folder, or the settings it began with"
        )
        assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == before
        assert run.configure("distill", {"k": 4, "seed": 0, "system": None, "尺": "長"}, free=("k",)) == ["k"]
        assert run.config()["distill"]["k"] == 4
        assert run.configure("filter", {"min_words": 3}) == []
        assert run.configure("filter", {"max_words": 3}, free=("*",)) == ["max_words", "min_words"]
        assert run.config() == {"distill": {"k": 4, "seed": 0, "system": None, "尺": "長"}, "filter": {"max_words": 3}}
        with pytest.raises(UserError, match=r"filter.max_words was 3, now None"):
            run.configure("filter", {})


def test_a_setting_that_was_added_since_changes_nothing_while_it_is_off(tmp_path: Path) -> None:
    with Run.create(tmp_path) as run:
        run.configure("train", {"limit": 3, "engine": {"x": 1}})
        assert run.configure("train", {"limit": 3, "mask_thinking": False, "engine": {"x": 1, "quick": False, "of": None}}) == []
        with pytest.raises(UserError, match=r"\(train.engine.quick was None, now True\)"):
            run.configure("train", {"limit": 3, "engine": {"x": 1, "quick": True, "of": None}})
        with pytest.raises(UserError, match="mask_thinking was None, now True"):
            run.configure("train", {"limit": 3, "mask_thinking": True})


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UserError, match="is not empty and not a run of sftkit; give a new folder"):
        Run.create(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["cat.jpg"]
    with pytest.raises(UserError, match=r"cat.jpg: is a file; give a folder for the run"):
        Run.create(tmp_path / "cat.jpg")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        Run.create(tmp_path / "cat.jpg" / "run")
    with pytest.raises(UserError, match=r"is not a run of sftkit \(no config.yaml\)"):
        Run.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        Run.create(tmp_path / "run")


def test_a_run_whose_creation_was_interrupted_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    with Run.create(tmp_path) as run:
        assert run.config() == {}
    with Run.create(tmp_path) as again:
        assert again.configure("a", {"b": 1}) == []
    assert Run.open(tmp_path).config() == {"a": {"b": 1}}


def test_what_a_killed_writer_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    Run.create(tmp_path / "run").close()
    left = tmp_path / "run" / "curate" / "scores" / ".ifd.parquet.4711.tmp"
    left.parent.mkdir(parents=True)
    others = [left.with_name(name) for name in (".ifd.tmp", "ifd.4711.tmp", "ifd.parquet")]
    for each in (left, *others):
        each.touch()
    Run.create(tmp_path / "run").close()
    assert not left.exists()
    assert all(each.exists() for each in others)


def test_settings_that_someone_broke_are_told(tmp_path: Path) -> None:
    Run.create(tmp_path).close()
    (tmp_path / "config.yaml").write_text("distill: {")
    with pytest.raises(UserError, match=r"config.yaml: not valid YAML"):
        Run.open(tmp_path).config()


def test_one_process_at_a_time_writes_a_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sftkit.core.run import Run;"
        "run = Run.create(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing this run; wait for it, or give another folder"):
            Run.create(tmp_path)
        assert Run.open(tmp_path).config() == {}, "reading is not held up"
    finally:
        holder.kill()
        holder.wait()
    with Run.create(tmp_path):  # a process that is gone holds nothing, however it ended
        pass


def test_done_is_written_last_and_says_what_was_made(tmp_path: Path) -> None:
    assert not is_done(tmp_path)
    mark_done(tmp_path, rows=3, model="m")
    assert is_done(tmp_path)
    assert read_done(tmp_path) == {"rows": 3, "model": "m"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        mark_done(tmp_path, loss=float("nan"))
    assert read_done(tmp_path) == {"rows": 3, "model": "m"}
    assert [each.name for each in tmp_path.iterdir()] == ["done.json"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError("15360 requested and 5088 written"), errno.ENOSPC),  # numpy
        (OSError("No space left on device (os error 28)"), errno.ENOSPC),  # polars, which writes with Rust
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),  # Python, while it writes: it names no file
        (pl.exceptions.ComputeError("parquet: File out of specification: underlying IO error: File too large (os error 27)"), errno.EFBIG),
        (pl.exceptions.ComputeError("parquet: File out of specification: Invalid thrift: transport error"), errno.ENOSPC),
    ],
)
def test_a_full_disk_has_its_number_whoever_writes(error: Exception, number: int, tmp_path: Path) -> None:
    def save() -> None:
        with write_atomically(tmp_path / "vectors.npy") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(OSError, match=r"vectors\.npy") as told:
        save()
    assert told.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_and_not_the_temporary_name(tmp_path: Path) -> None:
    def save() -> None:
        with write_atomically(tmp_path / "a") as temporary:
            temporary.mkdir()
            try:
                temporary.write_text("x")
            finally:
                temporary.rmdir()

    with pytest.raises(IsADirectoryError) as told:
        save()
    assert told.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize("error", [ValueError("a bug of what was written"), pl.exceptions.ComputeError("no such column")])
def test_what_is_no_fault_of_the_disk_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as told, write_atomically(tmp_path / "a"):
        raise error
    assert told.value is error


def test_of_settings_within_settings_only_those_that_differ_are_told(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.configure("ablation", {"train": {"max_length": 128, "epochs": 1}})
        with pytest.raises(UserError, match=r"\(ablation\.train\.max_length was 128, now 1024\)"):
            run.configure("ablation", {"train": {"max_length": 1024, "epochs": 1}})


def test_a_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"loss": 1.')
    with pytest.raises(UserError, match=r"results\.json: damaged or cut short \(.*\); take it from a copy"):
        read_json(tmp_path / "results.json")


def test_of_lines_that_grow_only_the_last_may_be_torn(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(lines) == [{"step": 1}, {"step": 2}]
    lines.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_json_lines(lines)
