"""A sweep: the same rows for all, the better setting found, and intervals that are those of the textbook."""

import json
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sftkit.core.errors import UserError
from sftkit.core.models import load_model
from sftkit.train.config import TrainConfig
from sftkit.train.sweep import mean_and_margin, parse_variations, sweep
from sftkit.train.trainer import make_trainer


@pytest.fixture
def alone(monkeypatch) -> list[weakref.ref[Any]]:
    """Return the trainers, and the models that rows were held out from, of which none may stand when a run begins."""
    held: list[weakref.ref[Any]] = []

    def noted(name: str, plain: Callable[..., Any], begins: bool) -> None:
        def made(*told: Any, **named: Any) -> Any:
            assert not (begins and [each for each in held if each()]), "what the run before held stands in this one's way"
            found = plain(*told, **named)
            held.append(weakref.ref(found))
            return found

        monkeypatch.setattr(name, made)

    noted("sftkit.train.local.make_trainer", make_trainer, begins=True)
    noted("sftkit.train.sweep.load_model", load_model, begins=False)
    return held


def test_the_better_setting_has_the_lower_held_out_loss(tmp_path, tiny_model, chats, cli, alone) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("{validation: 0.2, dtype: float32, epochs: 3}")
    arguments = ["--model", tiny_model, "-o", tmp_path / "sweep", "--config", settings, "--vary", "learning_rate=1e-5,3e-3"]
    code, out, err = cli("train", "sweep", chats(60), *arguments)
    assert code == 0, err
    assert len(alone) == 4
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    best, worst = found["runs"]
    assert (best["name"], found["first"], found["rows"]) == ("learning_rate-0.003", "learning_rate-1e-05", 12)
    assert best["tokens"] == worst["tokens"]
    assert best["change"] + best["change_margin"] < 0
    assert best["change"] == pytest.approx(best["loss"] - worst["loss"], rel=1e-6)
    assert worst["change"] == worst["change_margin"] == 0
    assert "learning_rate-0.003" in out
    assert "±" in out
    assert "12 held-out prompts are few" in out
    run = json.loads((tmp_path / "sweep" / "learning_rate-0.003" / "train" / "results.json").read_text())
    assert run["validation"][1] == pytest.approx(best["loss"], rel=1e-3)
    before = (tmp_path / "sweep" / "learning_rate-0.003" / "train" / "done.json").stat().st_mtime_ns
    again = cli("train", "sweep", chats(60), *arguments)
    assert again[1] == out
    assert (tmp_path / "sweep" / "learning_rate-0.003" / "train" / "done.json").stat().st_mtime_ns == before


def test_a_run_that_diverges_is_told_of_and_stops_no_other(tmp_path, tiny_model, chats, alone, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.train.config.MOST_RATE", math.inf)
    settings = TrainConfig(validation=0.2, dtype="float32", epochs=4.0, logging_steps=1, max_grad_norm=1e9, warmup=0.0)
    arguments = (str(chats(60)), str(tiny_model), tmp_path / "sweep", settings, {"learning_rate": [1e30, 1e-3]})
    found = sweep(*arguments)
    sound, broken = found.entries
    assert (found.first, sound.name, broken.name) == ("learning_rate-0.001", "learning_rate-0.001", "learning_rate-1e+30")
    assert sound.change == 0
    assert "is not a finite number any more" in broken.diverged
    assert "learning_rate-1e+30  diverged: step 2: grad_norm is not" in found.summary()
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [each["loss"] is None for each in runs] == [False, True]
    before = (tmp_path / "sweep" / broken.name / "train" / "metrics.jsonl").stat().st_mtime_ns
    assert sweep(*arguments).summary() == found.summary()
    assert (tmp_path / "sweep" / broken.name / "train" / "metrics.jsonl").stat().st_mtime_ns == before  # not trained again
    assert len(alone) == 3
    with pytest.raises(UserError, match="all 1 runs diverged, as learning_rate-1e\\+30: step 2"):
        sweep(*arguments[:-1], {"learning_rate": [1e30]})


def test_intervals_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        counts = random.integers(5, 60, 80).astype(float)
        sums = counts * 1.5 + random.normal(0, 1, 80) * np.sqrt(counts) * 2
        mean, margin = mean_and_margin(sums, counts)
        covered += abs(mean - 1.5) <= margin
    assert 0.93 <= covered / 2000 <= 0.965


def test_copies_of_an_answer_make_no_interval_narrower() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(5, 60, 40).astype(float)
    sums = counts * 1.5 + random.normal(0, 5, 40)
    copies = [f"prompt {place}" for place in range(40)] * 4
    assert mean_and_margin(np.tile(sums, 4), np.tile(counts, 4), copies) == pytest.approx(mean_and_margin(sums, counts))
    assert mean_and_margin(np.tile(sums, 4), np.tile(counts, 4))[1] < 0.6 * mean_and_margin(sums, counts)[1]


def test_what_is_not_a_comparison_is_refused(tmp_path, tiny_model, chats) -> None:
    assert parse_variations(["learning-rate=1e-5,0.1", "lora=true,false"]) == {"learning_rate": ["1e-5", 0.1], "lora": [True, False]}
    assert parse_variations(["init=prune:3,5-7,prune:1"]) == {"init": ["prune:3,5-7", "prune:1"]}
    for texts, message in (
        (["epochs=1,2"], "what leaves rows and tokens as they are.*unknown setting 'epochs'"),
        (["learning_rate"], "expected NAME=VALUE"),
        (["learning_rate=1e-5,,2e-5"], "expected NAME=VALUE"),  # which ran the default beside them
        (["learning_rate=1e-5,'2e-5"], "expected values as YAML has them"),
        (["lora_rank=8", "lora-rank=16"], "lora_rank is given twice"),
        ([], "nothing to compare"),
    ):
        with pytest.raises(UserError, match=message):
            parse_variations(texts)
    (tmp_path / "a.txt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    for name, kind in (("a.txt", "file"), ("run", "run")):
        with pytest.raises(UserError, match=f"{name}: is a {kind}; give a folder for the runs of this sweep"):
            sweep(str(chats(20)), str(tiny_model), tmp_path / name, TrainConfig(), {"learning_rate": [1e-5, 1e-4]})
    with pytest.raises(UserError, match="held-out rows"):
        sweep(str(chats(20)), str(tiny_model), tmp_path / "s", TrainConfig(validation=0.0), {"learning_rate": [1e-5, 1e-4]})
    with pytest.raises(UserError, match="vary: learning_rate: expected"):
        sweep(str(chats(20)), str(tiny_model), tmp_path / "s", TrainConfig(), {"learning_rate": ["fast"]})
    for varied, message in (
        ({"lora_rank": [8, 16]}, "lora_rank changes nothing in a run without an adapter"),
        ({"lora": [True, False], "lora_rank": [8, 16]}, "lora_rank changes nothing"),
        ({"init": ["prune:0", "prune:9"]}, "there is no layer 9"),
        ({"init": ["prune:0", "shrink"]}, "expected prune:FIRST-LAST"),
    ):
        with pytest.raises(UserError, match=message):
            sweep(str(chats(20)), str(tiny_model), tmp_path / "s", TrainConfig(), varied)
    assert not (tmp_path / "s").exists()
