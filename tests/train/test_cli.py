"""What `sftkit train` refuses before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_names_and_settings_that_are_wrong_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "half.yaml").write_text("dtype: float16\n")
    mistakes = [
        ("sft chats.json --model model -o run", "chats.json: no such file or folder; did you mean chats.jsonl?"),
        ("sft chats.jsonl:0.5 chat.jsonl:0.5 --model model -o run", "chat.jsonl: no such file"),
        ("sft chats.jsonl --model models -o run", "unknown model 'models'"),
        ("sft chats.jsonl --model model -o run --learning-rate 0", "learning_rate: expected more than 0"),
        ("preference pairs.jsonl --model model -o run", "pairs.jsonl: no such file"),
        ("preference chats.jsonl --model model -o run --beta 0", "beta: expected more than 0"),
        ("preview chat.jsonl --model model", "chat.jsonl: no such file"),
        ("sweep chat.jsonl --model model -o run --vary lora_rank=1,2", "chat.jsonl: no such file"),
        ("plan chat.jsonl --model model --gpu T4", "chat.jsonl: no such file"),
        ("plan chats.jsonl --model model --gpu T4 --config half.yaml", "half.yaml: unknown value for dtype 'float16'"),
    ]
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from sftkit.cli import sftkit\n"
        f"said = [str(CliRunner().invoke(sftkit, ['train', *each.split()]).exception) for each, _ in {mistakes!r}]\n"
        "print(json.dumps([said, [each for each in ('torch', 'transformers', 'polars') if each in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    said, heavy = json.loads(result.stdout)
    assert heavy == []
    for (command, reason), found in zip(mistakes, said, strict=True):
        assert reason in found, (command, found)


@pytest.mark.parametrize(
    ("given", "told"), [("", "only the first 100 rows, as this machine has no GPU"), ("limit: 7\n", ""), ("limit: null\n", "")]
)
def test_rows_that_a_recipe_leaves_out_are_told_of_and_those_of_a_file_are_not(given: str, told: str, cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.core.hardware.pick_device", lambda: "cpu")
    (tmp_path / "more.yaml").write_text(given or "seed: 1\n")
    (tmp_path / "chats.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "config.json").write_text("{}")
    _, _, said = cli(
        *("train", "sft", tmp_path / "chats.jsonl", "--model", tmp_path, "-o", tmp_path / "run", "--recipe", "classic"),
        *("--config", tmp_path / "more.yaml"),
    )
    assert ("recipe classic" in said) == bool(told)
    assert told in said
