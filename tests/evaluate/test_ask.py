"""A base model is asked in both ways, and others are compared with both; a model with a template is asked in chats."""

import json
import logging
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import resolve_model
from sftkit.evaluate import task_data
from sftkit.evaluate.benchmark import evaluate_tasks
from sftkit.evaluate.marks import Comparison, against_both
from sftkit.evaluate.tasks import open_task

from .conftest import QUESTIONS, Watch, mmlu_rows, settings, write_rows


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    rows = [{"id": f"q{n}", "prompt": question, "scoring": "contains", "answer": "1"} for n, question in enumerate(QUESTIONS)]
    return write_rows(tmp_path / "mine.jsonl", rows)


def test_a_base_model_is_asked_in_both_ways_and_others_are_compared_with_both(
    mine: Path, tmp_path: Path, tiny_base_model: Path, trained_model: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    models = {"base": str(tiny_base_model), "sft": str(trained_model)}
    result = evaluate_tasks(models, [str(mine)], tmp_path / "run", settings())
    (task,) = result.tasks
    assert task.asked == {"base:completion": "completion", "base:chat": "in chats by sftkit:plain", "sft": "chat"}
    assert list(task.metrics) == list(task.generated) == list(task.asked)
    assert [(each.model, each.baseline) for each in task.comparisons] == [("sft", "base:completion"), ("sft", "base:chat")]
    assert [each.p_value for each in task.comparisons] == pytest.approx([0.125] * 2)
    assert [each.p_adjusted for each in task.comparisons] == pytest.approx([0.25] * 2)  # Holm, over both
    assert "sft against both base:completion and base:chat: no difference holds against both" in result.summary()
    assert "base has no chat template of its own: it is asked in chats by sftkit:plain, as in training, and given" in caplog.text
    assert "given texts to go on from: base:completion; asked in chats by sftkit:plain: base:chat; asked in chats: sft" in result.summary()
    assert watch.events == ["open tiny-base", "close tiny-base", "open trained", "close trained"]
    keys = pl.read_parquet(tmp_path / "run" / "evaluate" / "task_answers.parquet").filter(pl.col("model") != "sft")["key"]
    assert keys.n_unique() == 8  # what is asked differs
    again = evaluate_tasks({"base": str(tiny_base_model)}, [str(mine)], tmp_path / "run", settings(ask="chat"))
    assert (again.tasks[0].asked, again.tasks[0].generated) == ({"base": "in chats by sftkit:plain"}, {"base": 0})


def test_its_chats_are_those_that_training_would_render(mine: Path, tmp_path: Path, tiny_base_model: Path, watch: Watch) -> None:
    asked: list[list[int]] = []
    counted = watch._counted

    def seen(run: Any) -> Any:
        def noted(requests: Any) -> Any:
            wanted = list(requests)
            asked.extend(list(each.prompt_ids) for each in wanted if hasattr(each, "prompt_ids"))
            yield from counted(run)(wanted)

        return noted

    watch._counted = seen  # type: ignore[method-assign]
    evaluate_tasks({"base": str(tiny_base_model)}, [str(mine)], None, settings())
    chat = load_chat(resolve_model(tiny_base_model))
    rows = [[{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}] for question in QUESTIONS]
    for messages in rows:
        prompt = chat.prompt(messages[:1])
        assert prompt in asked
        assert chat.render(messages).ids[: len(prompt)] == prompt
    assert len(asked) == 8


@pytest.mark.parametrize(
    ("ask", "names", "pairs"),
    [
        ("auto", ["base:completion", "base:chat", "it"], 2),
        ("both", ["base:completion", "base:chat", "it:chat", "it:completion"], 4),
        ("chat", ["base", "it"], 1),
        ("completion", ["base", "it"], 1),
    ],
)
def test_the_ways_that_may_be_chosen(mine: Path, tiny_base_model: Path, tiny_model: Path, ask: str, names: list[str], pairs: int) -> None:
    models = {"base": str(tiny_base_model), "it": str(tiny_model)}
    (task,) = evaluate_tasks(models, [str(mine)], None, settings(ask=ask, limit=1)).tasks
    assert list(task.metrics) == names
    assert len(task.comparisons) == pairs
    assert all(each.baseline.startswith("base") and each.model.startswith("it") for each in task.comparisons)


def test_of_one_model_alone_its_ways_are_compared(mine: Path, tiny_base_model: Path) -> None:
    (task,) = evaluate_tasks({"base": str(tiny_base_model)}, [str(mine)], None, settings()).tasks
    assert [(each.model, each.baseline) for each in task.comparisons] == [("base:chat", "base:completion")]
    assert not against_both(task.comparisons)


def test_choices_are_compared_once_whatever_the_ways(
    mine: Path, tmp_path: Path, tiny_base_model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    monkeypatch.setattr(task_data, "cache_dir", lambda: tmp_path / "cache")
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", mmlu_rows())))
    result = evaluate_tasks({"base": str(tiny_base_model), "it": str(tiny_model)}, ["mmlu", str(mine)], None, settings())
    first, second = result.tasks
    assert first.asked == {"base": "choices", "it": "choices"}
    assert len(first.comparisons) == 1  # the same one twice would cost all others some of their power
    assert len(second.comparisons) == 2
    assert watch.events == ["open tiny-base", "close tiny-base", "open tiny-chat", "close tiny-chat"]


def test_a_way_in_which_nothing_can_be_asked_does_not_take_the_other_along(
    tmp_path: Path, tiny_base_model: Path, trained_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"base": str(tiny_base_model), "sft": str(trained_model)}
    (task,) = evaluate_tasks(models, ["gsm8k"], tmp_path / "run", settings(limit=3)).tasks  # five examples are too long for it
    assert task.asked == {"base:chat": "in chats by sftkit:plain", "sft": "chat"}
    assert task.unasked == {"base:completion": "3 too_long"}
    assert (task.n, task.left_out) == (3, {})
    assert [each.baseline for each in task.comparisons] == ["base:chat"]
    assert "base:completion answered no question and is left out: 3 too_long" in task.summary()
    assert "base:completion answered no question" in caplog.text
    answers = pl.read_parquet(tmp_path / "run" / "evaluate" / "task_answers.parquet")
    assert answers.filter(model="base:completion")["error"].to_list() == ["too_long"] * 3
    assert json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())["tasks"]["gsm8k"]["unasked"] == task.unasked
    with pytest.raises(UserError, match="none of its 3 questions was answered by every model: 3 too_long"):
        evaluate_tasks(models, ["gsm8k"], None, settings(limit=3, ask="completion"))


def test_lm_eval_is_not_asked_for_a_template_that_it_does_not_know(tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.evaluate.benchmark.importlib.util.find_spec", lambda name: name)
    with pytest.raises(
        UserError, match="lm-eval:arc_easy: lm-eval cannot ask base in chats, since it has no template; leave out --ask chat"
    ):
        evaluate_tasks({"base": str(tiny_base_model)}, ["lm-eval:arc_easy"], None, settings(ask="chat"))


@pytest.mark.parametrize(
    ("differences", "p_values", "told"),
    [
        ((0.2, 0.1), (0.01, 0.02), "sft against both base:completion and base:chat: better"),
        ((-0.2, -0.1), (0.01, 0.02), "sft against both base:completion and base:chat: worse"),
        ((0.2, 0.1), (0.01, 0.06), "sft against both base:completion and base:chat: no difference holds against both"),
        ((0.2, -0.1), (0.01, 0.01), "sft against both base:completion and base:chat: no difference holds against both"),
    ],
)
def test_better_is_what_is_better_than_both(differences: tuple[float, ...], p_values: tuple[float, ...], told: str) -> None:
    given = {"task": "t", "metric": "m", "model": "sft", "interval": None, "p_value": 0.0, "detectable": None}
    names = ("base:completion", "base:chat")
    compared = [
        Comparison(**given, baseline=name, difference=difference, p_adjusted=p_value)  # type: ignore[arg-type]
        for name, difference, p_value in zip(names, differences, p_values, strict=True)
    ]
    assert against_both(compared) == [told]
    assert against_both(compared[:1]) == []


def test_worked_examples_are_as_many_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(task_data, "cache_dir", lambda: tmp_path / "cache")
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", mmlu_rows())))  # two of each subject
    for name, shots in (("gsm8k", 0), ("gsm8k", 8), ("mmlu", 0), ("mmlu", 2)):
        item = open_task(name, settings(shots=shots)).items[0]
        assert item.completion.count("\nAnswer:") == shots + 1
    assert not caplog.records
    open_task("mmlu_generated", settings(shots=3))
    assert "mmlu: some subject has 2 worked examples (rows with the split dev), fewer than the 3 of shots" in caplog.text
    with pytest.raises(UserError, match="shots: gsm8k has 8 worked examples, found 9"):
        open_task("gsm8k", settings(shots=9))
