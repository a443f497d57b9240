"""The commands of a distillation and of its cache: what they say, and what a config file sets."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.cache import explain
from sftkit.curate.distill import distill

from .teachers import copy_with_other_weights, prompts


def test_cache_explain_names_the_fields_that_differ(tmp_path: Path, tiny_model: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run"
    distill(path, run, settings(k=2))
    (same,) = explain(run, {})
    assert (same.differs, same.samples) == ({}, 6)
    (warmer,) = explain(run, {"temperature": 1.0, "system": "Be brief."})
    assert warmer.differs == {"temperature": (0.8, 1.0), "system": (None, "Be brief.")}
    everything = {"temperature": 0.5, "top_p": 0.5, "max_new_tokens": 9, "seed": 3, "system": "x", "thinking": True, "json_schema": "{}"}
    for name, value in everything.items():
        (changed,) = explain(run, {name: value})
        assert changed.differs == {name: (getattr(settings(), name), value)}
        assert f"{name}: stored" in changed.summary()
    teacher = copy_with_other_weights(tiny_model, tmp_path / "teacher")
    (other,) = explain(run, {"teacher": str(teacher)})
    assert list(other.differs) == ["model"]
    shutil.copytree(tiny_model, tmp_path / "edited")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        if (tmp_path / "edited" / file).exists():
            text = (tmp_path / "edited" / file).read_text()
            (tmp_path / "edited" / file).write_text(text.replace("assistant", "helper"))
    (edited,) = explain(run, {"teacher": str(tmp_path / "edited")})
    assert "template" in edited.differs
    with pytest.raises(UserError, match="is not a run of sftkit"):
        explain(tmp_path, {})


def test_the_commands_say_what_happened(tmp_path: Path, tiny_model: Path) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 70), tmp_path / "run"
    base = [
        "curate",
        "distill",
        str(path),
        "-o",
        str(run),
        "--teacher",
        str(tiny_model),
        "--max-new-tokens",
        "12",
        "--engine",
        "transformers",
    ]

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(sftkit, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    dry = call(*base, "-k", "2", "--dry-run")
    assert "140 samples wanted, 0 were there, 50 probed now and kept" in dry
    assert "to come: 90 samples" in dry
    assert "standard error" in dry
    assert dry.count("prompt: What is") == 3
    done = call(*base, "-k", "2")
    assert "140 of 140 samples of 70 prompts" in done
    assert "new: 90 samples" in done
    assert "cut at the longest length" in done
    assert str(run / "curate" / "dataset.jsonl") in done
    assert "new: none, everything that was asked for is there" in call(*base, "-k", "2")
    assert "140 samples of" in (told := call("curate", "cache", "explain", str(run), "--temperature", "1.0"))
    assert "temperature: stored 0.8, asked 1.0" in told
    assert "nothing differs" in call("curate", "cache", "explain", str(run))
    assert "140 samples" in call("curate", "cache", "export", str(run), "-o", str(tmp_path / "samples.parquet"))
    assert pl.read_parquet(tmp_path / "samples.parquet").height == 140


def test_a_config_file_speaks_below_the_options(tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "distill.yaml"
    config.write_text(f"teacher: {tiny_model}\nk: 3\nmax_new_tokens: 9\nengine:\n  dtype: float32\n")
    arguments = ["curate", "distill", str(prompts(tmp_path / "p.jsonl", 2)), "-o", str(tmp_path / "run"), "--config", str(config)]
    result = CliRunner().invoke(sftkit, [*arguments, "-k", "2", "--engine", "transformers"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    section = Run.open(tmp_path / "run").config()["distill"]
    assert (section["k"], section["max_new_tokens"]) == (2, 9)
    assert (section["engine"]["engine"], section["engine"]["dtype"]) == ("transformers", "float32")


def test_rows_that_cannot_be_read_are_told_of_before_anything_is_asked(tmp_path: Path, tiny_model: Path, cli: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 4), tmp_path / "run"
    path.write_text(path.read_text() + '{"prompt": "bro\n{"prompt": 3}\n')
    asked = ("--teacher", tiny_model, "--engine", "transformers", "--max-new-tokens", "4")
    for command in (("distill", path, "-o", run, *asked), ("prompts", path, "-o", run, *asked), ("tune", path, *asked)):
        code, _, err = cli("curate", *command)
        assert code == 1
        assert "p.jsonl:5: not valid JSON" in err
        assert f"(1 other row cannot be read either); mend it, or `sftkit curate import {path} -o RUN --max-failed 0.1` makes a run" in err
        assert not run.exists()
    assert cli("curate", "import", path, "-o", tmp_path / "read", "--max-failed", "0.5")[0] == 0
    code, out, err = cli("curate", "distill", tmp_path / "read", "-o", run, *asked)
    assert (code, out.partition(": ")[2].partition(",")[0]) == (0, "4 of 4 samples of 4 prompts"), err
    path.write_text('{"answer": "4"}\n')  # of nothing that can be read nothing would be left
    assert "mend it" not in cli("curate", "distill", path, "-o", run, *asked)[2]


def test_a_folder_holds_the_rows_of_one_command(tmp_path: Path, tiny_model: Path, cli: Any) -> None:
    path, asked = prompts(tmp_path / "p.jsonl", 4), ("--teacher", tiny_model, "--engine", "transformers", "--max-new-tokens", "4")
    assert cli("curate", "prompts", path, "-o", tmp_path / "grown", "--rounds", "1", *asked)[0] == 0
    assert cli("curate", "distill", path, "-o", tmp_path / "asked", *asked)[0] == 0
    assert cli("curate", "import", path, "-o", tmp_path / "read")[0] == 0
    for command, name, stages in (
        ("distill", "grown", "grow"),
        ("distill", "read", "import"),
        ("prompts", "asked", "prompts, distill"),
        ("prompts", "read", "import"),
    ):
        before = (tmp_path / name / "ledger.parquet").read_bytes()
        code, _, err = cli("curate", command, path, "-o", tmp_path / name, *asked)
        assert code == 1
        assert f"{name}: this folder holds what another command has made (it has recorded {stages}); give another folder" in err
        assert (tmp_path / name / "ledger.parquet").read_bytes() == before
    assert "holds the prompts that `curate prompts` has grown" in cli("curate", "import", path, "-o", tmp_path / "grown")[2]
    assert "grown: holds other rows already" in cli("curate", "mix", path, tmp_path / "read", "-o", tmp_path / "grown")[2]
    assert "its samples are requests for prompts" in cli("curate", "cache", "explain", tmp_path / "grown")[2]


def test_tune_wants_some_time(tmp_path: Path, tiny_model: Path, cli: Any) -> None:
    path = prompts(tmp_path / "p.jsonl", 4)
    for seconds in ("0", "-3"):
        code, _, err = cli("curate", "tune", path, "--teacher", tiny_model, "--seconds", seconds)
        assert (code, err) == (1, f"error: seconds: expected more than 0, found {seconds}\n")
