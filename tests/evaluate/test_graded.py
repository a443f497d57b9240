"""Answers that a judge grades: the grade is the mark, what got none is left out for all, and nobody is asked twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core import judge as judging
from sftkit.core.engines.base import EngineConfig
from sftkit.core.errors import UserError
from sftkit.core.judge import Grade, Item, Judge
from sftkit.core.named_models import find_models
from sftkit.core.values import ValueStore
from sftkit.evaluate.benchmark import _mark, evaluate_tasks, open_tasks
from sftkit.evaluate.compare import Answer
from sftkit.evaluate.config import TasksConfig
from sftkit.evaluate.graded import grade_answers
from sftkit.evaluate.tasks import open_task

from .conftest import ANSWER, QUESTIONS, Watch

CPU = EngineConfig(engine="transformers", device="cpu", dtype="float32")


def settings(**values: Any) -> TasksConfig:
    return TasksConfig(**{"max_new_tokens": 16, "resamples": 1000, "engine": CPU, "judge_engine": CPU, **values})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four questions that only a judge can mark, one with a reference, and one that a rule marks."""
    judged: list[dict[str, Any]] = [{"id": f"q{n}", "prompt": question, "scoring": "judge"} for n, question in enumerate(QUESTIONS)]
    judged[3]["answer"] = "1"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*judged, {"id": "r", "prompt": QUESTIONS[0], "scoring": "contains", "answer": "1"}])
    )
    return path  # fmt: skip


def test_the_grade_is_the_mark_and_nobody_is_asked_twice(
    tmp_path: Path, rows: Path, tiny_model: Path, trained_model: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "LEAST_MASS", 0.0)  # a model of random weights gives its digits what it gives any token
    models, run = {"base": str(tiny_model), "sft": str(trained_model)}, tmp_path / "run"
    (task,) = evaluate_tasks(models, [str(rows)], run, settings(judge=str(tiny_model))).tasks
    assert watch.events[-2:] == ["open tiny-chat", "close tiny-chat"]
    assert watch.events.count("close trained") == 1  # one model at a time
    marks = pl.read_parquet(run / "evaluate" / "task_scores.parquet").filter(pl.col("model") == "sft")
    (model,) = find_models({"judge": str(tiny_model)}, CPU)
    with ValueStore(tmp_path / "own.sqlite") as store, Judge(model, store) as judge:
        asked = [Item(question, ANSWER, "1" if place == 3 else None) for place, question in enumerate(QUESTIONS)]
        expected = [((each.value or 0) - 1) / 5 for each in judge.grade(asked)]
    assert marks["value"].to_list() == pytest.approx([*expected, 1.0], abs=1e-4)
    assert task.n == 5
    opened = len(watch.events)
    again = evaluate_tasks(models, [str(rows)], run, settings(judge=str(tiny_model))).tasks[0]
    assert (again.metrics, len(watch.events)) == (task.metrics, opened)


def test_answers_without_a_grade_are_left_out_for_all_models(
    tmp_path: Path, rows: Path, tiny_model: Path, trained_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    (task,) = evaluate_tasks(models, [str(rows)], None, settings(judge=str(trained_model))).tasks  # it writes ANSWER, never a digit
    assert (task.n, sum(task.left_out.values())) == (1, 4)
    assert all(reason.startswith("not_graded") for reason in task.left_out)
    assert "not a grade: the judge gives 1 to 6 together a probability of" in caplog.text
    assert "the judge is sft itself: judges prefer their own answers" in caplog.text


def test_what_a_judge_needs(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"mt_bench, rows\.jsonl: no rule can mark the answers; expected --judge MODEL"):
        evaluate_tasks({"m": str(tiny_model)}, ["mt_bench", str(rows)], None, settings())
    with pytest.raises(UserError, match="rubric 'nice': expected one of"):
        evaluate_tasks({"m": str(tiny_model)}, [str(rows)], None, settings(judge=str(tiny_model), rubric="nice"))
    with pytest.raises(UserError, match="unknown model 'no-model'"):
        evaluate_tasks({"m": str(tiny_model)}, [str(rows)], None, settings(judge="no-model"))


def test_what_a_judge_needs_is_known_before_a_recipe_trains(rows: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl: no rule can mark the answers; expected --judge MODEL"):
        open_tasks([str(rows)], settings())
    with pytest.raises(UserError, match="rubric 'nice': expected one of"):
        open_tasks([str(rows)], settings(judge="some", rubric="nice"))
    assert open_tasks([str(rows)], settings(judge="some"))[0][0].judged  # a recipe may yet have to fetch its judge


def test_mt_bench_has_two_turns_and_its_references() -> None:
    task = open_task("mt_bench", settings())
    assert (len(task.items), task.metrics, task.judged) == (160, ("grade",), True)
    assert sum("answer" in item.target for item in task.items) == 70  # some references are empty
    assert all(isinstance(item.target.get("answer", ""), str) for item in task.items)
    assert [item.after for item in task.items[:2]] == ["", task.items[0].id]
    assert len({item.group for item in task.items}) == 80


@pytest.mark.parametrize("ask", ["chat", "completion"])
def test_a_second_turn_comes_after_the_models_own_first_answer(
    tmp_path: Path, tiny_model: Path, trained_model: Path, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    shown: list[Item] = []
    grade = Judge.grade

    def watched(self: Judge, items: list[Item]) -> Any:
        shown.extend(items)
        return grade(self, items)

    monkeypatch.setattr(judging, "LEAST_MASS", 0.0)
    monkeypatch.setattr(Judge, "grade", watched)
    models, run = {"base": str(tiny_model), "sft": str(trained_model)}, tmp_path / "run"
    config = settings(judge=str(tiny_model), limit=4, ask=ask)
    (task,) = evaluate_tasks(models, ["mt_bench"], run, config).tasks
    assert (task.n, task.metrics["sft"][0].clusters) == (4, 2)
    asked = open_task("mt_bench", config)
    answers = pl.read_parquet(run / "evaluate" / "task_answers.parquet")
    said = {(row["model"], row["item"]): row for row in answers.iter_rows(named=True)}
    for name in models:
        first, second = (said[name, item.id] for item in asked.items[:2])
        question, then = (item.question for item in asked.items[:2])
        if first["text"].strip() and second["text"].strip():
            turns = f"user: {question}\n\nassistant: {first['text']}\n\nuser: {then}"
            assert any((each.prompt, each.answer) == (turns, second["text"]) for each in shown)
        assert "\x00" not in "".join(each.prompt for each in shown)
    again = evaluate_tasks(models, ["mt_bench"], run, config).tasks[0]
    assert again.generated == {"base": 0, "sft": 0}


def test_the_same_words_after_another_first_answer_are_another_answer() -> None:
    """Two models say the same in the second turn of MT-Bench: each is graded after what it said itself in the first."""

    class Judging:
        def grade(self, items: list[Item]) -> list[Grade]:
            return [Grade(6.0 if "right" in each.prompt else 1.0) for each in items]

    task = open_task("mt_bench", settings(limit=2))
    task = replace(task, items=task.items[:2])
    answers = {
        "one": [[Answer(key="1", text="right")], [Answer(key="2", text="so it is 3")]],
        "other": [[Answer(key="3", text="wrong")], [Answer(key="4", text="so it is 3")]],
        "none": [[Answer(key="5", text="right")], [Answer(key="6", text=" ")]],
    }
    graded, marked = grade_answers(task, answers, Judging())  # type: ignore[arg-type]
    second = {name: _mark(graded, name, graded.items, marked[name], settings())[1][0]["grade"].value for name in answers}
    assert second == {"one": 1.0, "other": 0.0, "none": 0.0}
