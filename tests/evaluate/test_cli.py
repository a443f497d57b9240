"""The commands say in one line what was wrong with what they were given, and print what the library returns."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core.errors import UserError
from sftkit.evaluate.config import parse_models

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in range(4)))
    return path


def test_names_and_references() -> None:
    assert parse_models(["base=a/b", "sft-1.0=runs/x=y"]) == {"base": "a/b", "sft-1.0": "runs/x=y"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["smollm2-135m-instruct"], "--model 'smollm2-135m-instruct': expected NAME=REF, as base=smollm2-135m-instruct"),
        (["=m"], "--model '=m': expected NAME=REF"),
        (["base="], "--model 'base=': expected NAME=REF"),
        (["my model=m"], "expected NAME=REF"),
        (["a=m", "b=n", "a=o"], "--model 'a=o': the name 'a' was given before, for m"),
        ([], "no model was given"),
    ],
)
def test_a_wrong_model_option_is_one_line(texts: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_models(texts)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare",), ["no model was given"]),
        (("compare", "--model", "a=smollm2-135m-instrukt"), ["smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"]),
        (("compare", "--model", "a=./no/model"), ["./no/model: no such model folder"]),
        (("compare", "--model", "a=TINY", "--questions", "no.jsonl"), ["no.jsonl: no such file"]),
        (("compare", "--model", "a=TINY", "--limit", "0"), ["limit: expected 1 or more, found 0"]),
        (("compare", "--model", "a=TINY", "--max-new-tokens", "0"), ["max_new_tokens: expected 1 or more"]),
        (("loss", "HELDOUT"), ["no model was given"]),
        (("loss", "HELDOUT", "--model", "a=nothing"), ["unknown model 'nothing'"]),
        (("loss", "no.jsonl", "--model", "a=TINY"), ["no.jsonl: no such file"]),
        (("loss", "HELDOUT", "--model", "a=TINY", "--resamples", "10"), ["resamples: expected 1000 or more"]),
        (("loss", "HELDOUT", "--model", "a=TINY", "-o", "HELDOUT"), ["is a file; give a folder for the run"]),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: list[str], cli: Cli, tiny_model: Path, heldout: Path) -> None:
    filled = [each.replace("TINY", str(tiny_model)).replace("HELDOUT", str(heldout)) for each in arguments]
    code, out, err = cli("evaluate", *filled)
    assert (code, out) == (1, "")
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert "Traceback" not in err


def test_an_unknown_setting_names_the_nearest(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text("max_tokens: 5\n")
    code, _, err = cli("evaluate", "compare", "--model", f"a={tiny_model}", "--config", config)
    assert code == 1
    assert "compare.yaml: unknown setting 'max_tokens': did you mean 'max_new_tokens'?" in err


def test_a_section_that_is_none_is_named_beside_an_option_of_it(tmp_path: Path, tiny_model: Path, cli: Cli) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text("engine: transformers\n")
    code, _, err = cli("evaluate", "compare", "--model", f"a={tiny_model}", "--config", config, "--device", "cpu")
    assert code == 1
    assert "compare.yaml: engine: expected settings like 'key: value', found 'transformers'" in err


def test_compare_prints_the_answers_and_options_win_over_the_file(tmp_path: Path, tiny_model: Path, trained_model: Path, cli: Cli) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text("max_new_tokens: 50\nengine: {dtype: float32, device: cpu}\n")
    run = tmp_path / "run"
    arguments = ("compare", "--model", f"base={tiny_model}", "--model", f"sft={trained_model}", "--config", config, "-o", run)
    code, out, err = cli("evaluate", *arguments, "--max-new-tokens", 9, "--engine", "transformers")
    assert code == 0, err
    assert "question 3 of 3: What's the difference between thread and process?" in out
    assert "cut after 9 tokens" in out
    assert "3 questions answered by every model, greedily, in at most 9 tokens" in out
    assert "sft − base: stop rate" in out
    stored = json.loads((run / "evaluate" / "results.json").read_text())["compare"]
    assert stored["max_new_tokens"] == 9
    import yaml

    engine = yaml.safe_load((run / "config.yaml").read_text())["compare"]["engine"]
    assert (engine["engine"], engine["dtype"]) == ("transformers", "float32")


def test_loss_prints_the_numbers_and_keeps_nothing_without_a_folder(
    tmp_path: Path, tiny_model: Path, trained_model: Path, heldout: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli(
        "evaluate", "loss", heldout, "--model", f"base={tiny_model}", "--model", f"sft={trained_model}", "--resamples", 1000
    )
    assert code == 0, err
    assert "4 of 4 rows, 4 prompts" in out
    assert "bits per byte" in out
    assert "sft − base: loss " in out
    assert sorted(tmp_path.rglob("*")) == before
