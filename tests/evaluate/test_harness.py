"""Tasks of lm-eval: run by it, in a process of its own, and compared here."""

import importlib.util
import json
from pathlib import Path

import pytest
from sftkit.core.errors import UserError
from sftkit.evaluate.benchmark import evaluate_tasks
from sftkit.evaluate.config import TasksConfig

HERE = importlib.util.find_spec("lm_eval") is not None


def settings(folder: Path, **values: object) -> TasksConfig:
    (folder / "data.jsonl").write_text("".join(json.dumps({"q": f"Calculate {n}+1-1", "a": "AB"[n % 2]}) + "\n" for n in range(6)))
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [A, B]\ndoc_to_target: a\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return TasksConfig(resamples=1000, lm_eval_tasks=str(folder), **values)  # type: ignore[arg-type]


@pytest.mark.skipif(not HERE, reason="lm-eval is not installed")
def test_models_are_compared_on_a_task_of_lm_eval(tiny_model: Path, trained_model: Path, tmp_path: Path) -> None:
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    config = settings(tmp_path)
    result = evaluate_tasks(models, ["lm-eval:mine"], tmp_path / "run", config)
    (task,) = result.tasks
    assert (task.name, task.n, task.generated) == ("lm-eval:mine", 6, {"base": 6, "sft": 6})
    assert [metric.name for metric in task.metrics["base"]] == ["acc"]
    assert task.comparisons[0].model == "sft"
    again = evaluate_tasks(models, ["lm-eval:mine"], tmp_path / "run", config)
    assert again.tasks[0].generated == {"base": 0, "sft": 0}
    assert again.tasks[0].metrics == task.metrics
    with pytest.raises(UserError, match=r"lm-eval:nothing_here: lm-eval failed on base: .*nothing_here"):
        evaluate_tasks(models, ["lm-eval:nothing_here"], None, config)


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_lm_eval_its_pip_line_is_given(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm-eval is not installed: pip install 'sftkit\[lm-eval\]'"):
        evaluate_tasks({"base": str(tiny_model)}, ["lm-eval:mine"], None, settings(tmp_path))
