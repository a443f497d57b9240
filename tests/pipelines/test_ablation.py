"""An ablation with a tiny model: it finds a selection that is better, and claims nothing where there is nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.errors import UserError
from sftkit.core.files import read_json
from sftkit.core.formats import iterate_examples
from sftkit.core.statistics import Estimate, Interval
from sftkit.evaluate.config import LossConfig
from sftkit.pipelines import ablation
from sftkit.pipelines.ablation import Contrast, ablate, told
from sftkit.pipelines.config import AblationConfig
from sftkit.train.config import TrainConfig


def write_rows(path: Path, numbers: range, answer: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"messages": [{"role": "user", "content": f"Calculate {n}+{n}."}, {"role": "assistant", "content": answer.format(n=n)}]}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run whose selection has the held-out rows' manner, whose first control has not, and whose second has it too."""
    run = tmp_path / "run"
    write_rows(run / "curate" / "dataset.jsonl", range(24), "It is twice {n}.")
    write_rows(run / "curate" / "controls" / "other.jsonl", range(24), "Paris, the hat of the cat! " * 2)
    write_rows(run / "curate" / "controls" / "same.jsonl", range(24), "It is twice {n}.")
    write_rows(run / "curate" / "heldout.jsonl", range(100, 112), "It is twice {n}.")
    (run / "config.yaml").write_text("{}\n")
    return run


CONFIG = AblationConfig(
    seeds=2,
    train=TrainConfig(epochs=4, learning_rate=0.003, validation=0, dtype="float32", stop_check=0),
    loss=LossConfig(resamples=1000),
)


def test_a_better_selection_is_found_and_an_equal_one_is_not(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    result = ablate(run, str(tiny_model), out, CONFIG)
    verdicts = {each.control: each.verdict for each in result.contrasts}
    assert verdicts["other"] == "the selection is better"
    other, same = result.contrasts
    assert other.p_adjusted < 0.01 < same.p_adjusted
    assert same.difference.value == pytest.approx(0, abs=1e-5)
    arms = {each.name: each for each in result.arms}
    assert list(arms) == ["selection", "other", "same"]
    assert all(loss < result.base_loss for loss in arms["selection"].losses)
    assert arms["other"].epochs < 4 == arms["selection"].epochs
    assert arms["other"].trained_tokens[0] == pytest.approx(arms["selection"].trained_tokens[0], rel=0.15)
    models = {path: path.stat().st_mtime_ns for path in out.glob("*/train/final/model.safetensors")}
    assert len(models) == 6
    again = ablate(run, str(tiny_model), out, CONFIG)
    assert again.facts() == result.facts() == read_json(out / "ablation.json")
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_the_command_writes_the_report(
    run: Path, tmp_path: Path, tiny_model: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(ablation, "iterate_examples", lambda path: read.append(path) or iterate_examples(path))
    settings = tmp_path / "settings.yaml"
    training: dict[str, Any] = {"epochs": 1, "validation": 0, "dtype": "float32", "stop_check": 0}
    settings.write_text(json.dumps({"train": training, "loss": {"resamples": 1000}}))
    arguments = ["ablate", run, "--model", tiny_model, "-o", tmp_path / "out", "--seeds", 1, "--no-equal-tokens", "--config", settings]
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert len(read) == len(set(read)) == 3  # each arm's rows once, to count them and to see whether any is held out
    assert "selection − other: " in out
    assert "one seed: how much of it is the luck of one training is not known" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Did the selection pay?" in page
    assert "selection − other: " in page


def test_what_is_missing_is_said(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such file; give --heldout FILE"):
        ablate(run, str(tiny_model), tmp_path / "out", CONFIG, heldout=tmp_path / "none.jsonl")
    trained_on = run / "curate" / "dataset.jsonl"
    with pytest.raises(UserError, match=r"24 of its 24 conversations stand in .*dataset\.jsonl, which selection is trained on"):
        ablate(run, str(tiny_model), tmp_path / "out", CONFIG, heldout=trained_on)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl: is empty"):
        ablate(run, str(tiny_model), tmp_path / "out", CONFIG, heldout=tmp_path / "empty.jsonl")
    assert not (tmp_path / "out").exists()  # and nothing was trained
    for control in (run / "curate" / "controls").iterdir():
        control.unlink()
    with pytest.raises(UserError, match=r"holds no controls to compare with; `sftkit curate select .* --controls` writes them"):
        ablate(run, str(tiny_model), tmp_path / "out", CONFIG)
    with pytest.raises(UserError, match="seeds: expected 1 or more, found 0"):
        AblationConfig(seeds=0)


def test_seeds_that_disagree_are_no_difference() -> None:
    estimate = Estimate(-0.02, Interval(-0.03, -0.01))
    contrast = Contrast(control="random", difference=estimate, by_seed=[-0.05, 0.01], p_value=0.001, p_adjusted=0.001)
    assert contrast.verdict.startswith("not the same way for every seed")
    few = Contrast(control="random", difference=estimate, by_seed=[-0.02], p_value=0.0625, p_adjusted=0.0625)
    assert few.verdict == "no difference is shown"  # six prompts: the interval of so few is too narrow
    shown = {"control": "random", "difference": {"value": -0.02, "interval": {"low": -0.03, "high": -0.01}}, "p_adjusted": 0.001}
    assert told({**shown, "verdict": "x"}) == "selection − random: −0.020 (95 % −0.030 to −0.010, p 0.001): x"
