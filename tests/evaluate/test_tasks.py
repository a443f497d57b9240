"""Tasks with answers that rules judge: asked once, marked as often as one likes, compared question by question."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.chat import load_chat
from sftkit.core.checks.code import extract_program
from sftkit.core.checks.sandbox import available
from sftkit.core.engines.base import EngineConfig
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.core.named_models import find_models
from sftkit.core.values import ValueStore
from sftkit.evaluate import benchmark, task_data
from sftkit.evaluate.ask import Asked, choose_likeliest, loaded_when_needed, ways
from sftkit.evaluate.benchmark import TasksResult, evaluate_tasks
from sftkit.evaluate.compare import Answer
from sftkit.evaluate.health import health
from sftkit.evaluate.tasks import open_task
from sftkit.evaluate.tasks.base import Item, Mark, Task, asked
from sftkit.pipelines.report import write_report

from .conftest import ANSWER, QUESTIONS, Watch, mmlu_rows, settings, write_rows

needs_sandbox = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Questions of all kinds that a model which says ANSWER ("The answer is 1.") gets right, but for the last."""
    scorings: list[dict[str, Any]] = [
        {"scoring": "exact", "answer": "The answer  is 1."},
        {"scoring": "numeric", "answer": "1.0"},
        {"scoring": "contains", "answer": ["ANSWER", "1"]},
        {"scoring": "regex", "pattern": r"is \d\.$"},
    ]
    rows = [
        {"id": f"q{number}", "prompt": question, **each} for number, (question, each) in enumerate(zip(QUESTIONS, scorings, strict=True))
    ]
    return write_rows(tmp_path / "mine.jsonl", [*rows, {"id": "q4", "prompt": "What is a process?", "scoring": "numeric", "answer": 2}])


def scores(result: TasksResult) -> dict[str, float]:
    return {name: metrics[0].mean for name, metrics in result.tasks[0].metrics.items()}


def test_answers_are_made_once_and_marked_again_for_nothing(
    mine: Path, tiny_model: Path, trained_model: Path, tmp_path: Path, watch: Watch
) -> None:
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    result = evaluate_tasks(models, [str(mine)], tmp_path / "run", settings())
    assert scores(result)["sft"] == pytest.approx(0.8)
    assert scores(result)["base"] == 0.0
    (task,) = result.tasks
    assert (task.generated, watch.asked) == ({"base": 4, "sft": 4}, 8)  # of two equal questions one
    (comparison,) = task.comparisons
    assert (comparison.model, comparison.baseline, comparison.difference) == ("sft", "base", pytest.approx(0.8))
    assert comparison.p_value == pytest.approx(0.125)  # four of four pairs to one side, both sides
    assert (
        "p 0.12: not significant; too few questions to find any difference" in comparison.told() or "not significant" in comparison.told()
    )
    assert task.health["sft"] is not None
    assert task.health["sft"].stop_rate == 1.0

    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    rows[4]["answer"] = 1  # another mark for the same answer
    write_rows(mine, rows)
    again = evaluate_tasks(models, [str(mine)], tmp_path / "run", settings())
    assert watch.asked == 8
    assert again.tasks[0].generated == {"base": 0, "sft": 0}
    assert scores(again)["sft"] == 1.0
    stored = pl.read_parquet(tmp_path / "run" / "evaluate" / "task_scores.parquet")
    assert stored.filter(pl.col("model") == "sft")["value"].to_list() == [1.0] * 5
    assert json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())["tasks"]["mine.jsonl"]["n"] == 5


def test_a_model_is_opened_once_for_all_tasks_and_closed_before_the_next(
    mine: Path, tiny_model: Path, trained_model: Path, tmp_path: Path, watch: Watch
) -> None:
    more = write_rows(tmp_path / "more.jsonl", [{"prompt": "Calculate 2+2", "answer": "4", "scoring": "numeric"}])
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    evaluate_tasks(models, [str(mine), str(more)], tmp_path / "run", settings(ask="both"))
    assert watch.events == ["open tiny-chat", "close tiny-chat", "open trained", "close trained"]
    evaluate_tasks(models, [str(mine), str(more)], tmp_path / "run", settings(ask="both"))
    assert len(watch.events) == 4


def test_new_weights_under_the_same_path_are_asked_anew(
    mine: Path, tiny_model: Path, trained_model: Path, tmp_path: Path, watch: Watch
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_model, place)
    first = evaluate_tasks({"it": str(place)}, [str(mine)], tmp_path / "run", settings())
    shutil.copyfile(trained_model / "model.safetensors", place / "model.safetensors")
    second = evaluate_tasks({"it": str(place)}, [str(mine)], tmp_path / "run", settings())
    assert (scores(first)["it"], scores(second)["it"]) == (0.0, pytest.approx(0.8))
    assert second.tasks[0].generated == {"it": 4}
    assert watch.asked == 8
    longer = evaluate_tasks({"it": str(place)}, [str(mine)], tmp_path / "run", settings(max_new_tokens=17))
    assert longer.tasks[0].generated == {"it": 4}


def test_several_samples_give_pass_at_k_and_the_majority(mine: Path, trained_model: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    numbers = [row for row in rows if row["scoring"] == "numeric"]
    numeric = write_rows(tmp_path / "numbers.jsonl", [{**row, "prompt": QUESTIONS[place]} for place, row in enumerate(numbers)])
    result = evaluate_tasks({"sft": str(trained_model)}, [str(numeric)], tmp_path / "run", settings(samples=3, temperature=0.2))
    assert re.search(r"pass@3 [\d.]+% \(\d+% to \d+%\), maj [\d.]+%", write_report(tmp_path / "run").read_text())
    (metric,) = result.tasks[0].metrics["sft"]
    assert sorted(metric.pass_at) == [1, 2, 3]
    assert metric.pass_at[1].value == pytest.approx(metric.mean)
    assert metric.pass_at[1].value <= metric.pass_at[3].value <= 1.0
    assert all(each.interval and each.interval.low <= each.value <= each.interval.high for each in metric.pass_at.values())
    assert metric.majority is not None
    assert metric.majority.value == pytest.approx(0.5)
    assert metric.majority.interval is not None
    assert "pass@3" in result.summary()


@needs_sandbox
def test_programs_are_run(trained_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Write f", "scoring": "unit-test", "tests": "assert f(1) == 1"}]
    path = write_rows(tmp_path / "code.jsonl", rows)
    result = evaluate_tasks({"sft": str(trained_model)}, [str(path)], None, settings())
    (metric,) = result.tasks[0].metrics["sft"]
    assert (metric.n, metric.mean, metric.not_found) == (1, 0.0, 1.0)  # "The answer is 1." is no Python
    assert "nan" not in result.summary().lower()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(task_data, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_choices_are_compared_by_their_probability(
    cache: Path, tiny_model: Path, trained_model: Path, tmp_path: Path, watch: Watch
) -> None:
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", mmlu_rows())))
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    result = evaluate_tasks(models, ["mmlu"], tmp_path / "run", settings())
    (metric,) = result.tasks[0].metrics["base"]
    assert (metric.n, metric.clusters, metric.name) == (8, 2, "likelihood")
    assert watch.asked == 2 * 8 * 4
    again = evaluate_tasks(models, ["mmlu"], tmp_path / "run", settings(samples=3))  # choices are not drawn
    assert watch.asked == 2 * 8 * 4
    assert again.tasks[0].metrics == result.tasks[0].metrics


@pytest.mark.parametrize("choices", [(" the", " is", " and"), (" the boats", " is", " 你好")], ids=["one token each", "several tokens"])
def test_the_likeliest_choice_is_that_of_plain_forward_passes(tiny_model: Path, tmp_path: Path, choices: tuple[str, ...]) -> None:
    import torch

    items = [Item(f"i{number}", asked(text), text, {}, None, choices) for number, text in enumerate(["What is", "the sea", "a poem about"])]
    task = Task(name="t", items=items, metrics=("m",), score=lambda item, answer: {"m": Mark(1.0)}, likelihood=True)
    (model,) = find_models({"it": str(tiny_model)}, EngineConfig(engine="transformers", device="cpu", dtype="float32"))
    with ValueStore(tmp_path / "choices.sqlite") as store, loaded_when_needed(model) as engine:
        found, requests = choose_likeliest(Asked("it", model, False), task, store, engine)
        assert choose_likeliest(Asked("it", model, False), task, store, engine) == (found, 0)
    ref = resolve_model(tiny_model)
    tokenizer, plain = load_chat(ref).tokenizer, load_model(ref, dtype="float32")
    counts = {len(tokenizer(choice)["input_ids"]) for choice in choices}
    assert requests == (3 if counts == {1} else 9)
    assert (counts == {1}) == (choices[0] == " the")
    for item, (answer,) in zip(items, found, strict=True):
        start, sums = len(tokenizer(item.completion)["input_ids"]), []
        for choice in choices:
            ids = tokenizer(item.completion + choice)["input_ids"]
            with torch.inference_mode():
                logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))))
        assert answer.logprob == pytest.approx(max(sums), abs=1e-3)
        assert answer.text == choices[sums.index(max(sums))]


def test_data_sets_come_along_or_are_fetched(cache: Path, tmp_path: Path) -> None:
    assert [len(open_task(name, settings()).items) for name in ("gsm8k", "ifeval", "humaneval")] == [1319, 541, 164]
    assert len(task_data.read_data("mt_bench")) == 80
    with pytest.raises(UserError, match="mmlu does not come with sftkit: `sftkit evaluate data get mmlu SOURCE`"):
        open_task("mmlu", settings())
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: has no split; found the columns question; expected split, subject, question, A, B, C, D, answer"
    ):
        task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [{"question": "a"}])))
    hub = {"question": "What?", "subject": "a_subject", "choices": ["1", "2", "3", "4"], "answer": 2}
    for wrong, message in (
        ({"answer": 4}, "4 choices and the answer 4"),
        ({"choices": ["1", "2", "3"]}, "3 choices"),
        ({"answer": -1}, "answer -1"),
    ):
        with pytest.raises(UserError, match=rf"rows.jsonl:1: found .*{message}.*; expected four choices and their number, 0 to 3"):
            task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [{**hub, **wrong}])))
    with pytest.raises(UserError, match=r"rows.jsonl:1: the answer is 'E'; expected A, B, C or D"):
        task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [{**mmlu_rows()[0], "answer": "E"}])))
    assert task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [hub])))[1] == 1
    assert task_data.read_data("mmlu")[0]["answer"] == "C"
    with pytest.raises(UserError, match="gsm8k comes with sftkit"):
        task_data.fetch_data("gsm8k", "x")
    with pytest.raises(UserError, match="unknown data set 'mlu': did you mean 'mmlu'"):
        task_data.fetch_data("mlu", "x")
    assert "mmlu" in task_data.table()


def test_gsm8k_is_marked_in_three_ways() -> None:
    task = open_task("gsm8k", settings())
    item = task.items[0]  # 18
    marks = {
        text: {name: (each.value, each.found) for name, each in task.score(item, text).items()}
        for text in ("so 18", "#### 18", r"\boxed{18}", "#### 17", "")
    }
    right, missing = (1.0, True), (0.0, False)
    assert marks["so 18"] == {"flexible": right, "strict": missing, "boxed": missing}
    assert marks["#### 18"] == {"flexible": right, "strict": right, "boxed": missing}
    assert marks[r"\boxed{18}"] == {"flexible": right, "strict": missing, "boxed": right}
    assert marks["#### 17"] == {"flexible": (0.0, True), "strict": (0.0, True), "boxed": missing}
    assert marks[""] == {"flexible": missing, "strict": missing, "boxed": missing}
    assert item.completion.startswith("Question: Natalia sold clips")
    assert item.completion.count("Question:") == 6
    assert item.completion.endswith("\nAnswer:")


def test_a_completion_ends_where_it_goes_on_to_something_else(
    tmp_path: Path, tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"What is {n}?", "answer": "1", "scoring": "exact"} for n in range(4)])

    def answers(run: str) -> list[dict[str, Any]]:
        evaluate_tasks({"m": str(tiny_base_model)}, [str(rows)], tmp_path / run, settings(max_new_tokens=40, ask="completion"))
        return pl.read_parquet(tmp_path / run / "evaluate" / "task_answers.parquet").to_dicts()

    whole = answers("whole")
    longest = max((each["text"] for each in whole), key=len)
    stop = longest[len(longest) // 2 :][:2]
    monkeypatch.setattr(benchmark, "open_task", lambda *given: replace(open_task(*given), stops=(stop,)))
    ended = answers("ended")
    for before, after in zip(whole, ended, strict=True):
        assert after["text"] == before["text"].partition(stop)[0]
        if stop in before["text"]:
            assert (after["finish_reason"], after["num_tokens"] < before["num_tokens"]) == ("stop", True)  # not generated and cut
        assert after["key"] != before["key"]
    assert longest not in [each["text"] for each in ended]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), (" (C)", "C"), ("The answer is D.", "D"), ("The correct answer is: (a) because", "A"), ("B. 2", "B"), ("The answer is a matter of taste. (C)", "C"), ("answer: b", "B"), ("The answer is c.", "C"), ("A man walks", ""), ("none", ""), ("**B**", "B")],
)  # fmt: skip
def test_the_letter_of_a_written_choice(cache: Path, tmp_path: Path, answer: str, letter: str) -> None:
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", mmlu_rows())))
    task = open_task("mmlu_generated", settings())
    assert task.score(task.items[0], answer)["generated"].answer == letter


BAD: list[tuple[list[dict[str, Any]], str]] = [
    ([{"prompt": "a", "scoring": "numeric"}], r"rows.jsonl:1: scoring 'numeric' needs a column answer; found prompt, scoring"),
    ([{"prompt": "a", "scoring": "regex", "answer": "b"}], r"rows.jsonl:1: scoring 'regex' needs a column pattern"),
    ([{"prompt": "a", "scoring": "numeric", "answer": "b"}], r"needs a number as answer; found 'b'"),
    ([{"prompt": "a", "scoring": "regex", "pattern": "("}], r"pattern '\(' is not a regular expression"),
    ([{"prompt": "a", "scoring": "json-schema", "schema": {"type": "x"}}], r"rows.jsonl:1: json schema: is not valid"),
    ([{"prompt": "a", "scoring": "json-schema", "schema": "{"}], r"rows.jsonl:1: schema is '\{'; expected a JSON schema"),
    ([{"prompt": " ", "scoring": "exact", "answer": "b"}], r"rows.jsonl:1: its question is empty"),
    ([{"prompt": "a", "scoring": "regex", "pattern": 5}], r"rows.jsonl:1: pattern is '5'; expected a text"),
    ([{"prompt": "a", "scoring": "unit-test", "tests": ["assert 1"]}], r"rows.jsonl:1: tests is .*; expected a text"),
    ([{"prompt": "a", "scoring": "unit-test", "tests": " "}], r"rows.jsonl:1: tests is ' '; expected a text"),
    ([{"prompt": "a", "scoring": "unit-test", "tests": "f()", "entry_point": 5}], r"entry_point is '5'; expected the name of a function"),
    ([{"prompt": "a", "scoring": "contains", "answer": []}], r"answer is '\[\]'; expected a text, a number or a list of them, none empty"),
    ([{"prompt": "a", "scoring": "contains", "answer": ""}], r"answer is ''; expected a text, a number or a list of them, none empty"),
    ([{"prompt": "a", "scoring": "exact", "answer": ["b", True]}], r"rows.jsonl:1: answer is true or false, which can be written in many"),
    ([{"prompt": "a", "answer": "b"}], r"rows.jsonl:1: says no scoring; add a column scoring, or give .*rows.jsonl:SCORING"),
    ([{"prompt": "a", "answer": "b", "scoring": "exat"}], r"rows.jsonl:1: unknown scoring 'exat': did you mean 'exact'"),
    ([{"answer": "b", "scoring": "exact"}], r"rows.jsonl:1: has no question, only what the answer is held against"),
    (
        [{"id": "x", "prompt": "a", "answer": "b", "scoring": "exact"}, {"id": "x", "prompt": "c", "answer": "d", "scoring": "exact"}],
        r"rows.jsonl:2: the id 'x' is that of .*rows.jsonl:1 too",
    ),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_task(str(write_rows(tmp_path / "rows.jsonl", rows)), settings())


def test_data_without_what_is_asked_is_named(cache: Path, tmp_path: Path) -> None:
    rows = mmlu_rows()
    with pytest.raises(UserError, match=r"rows.jsonl:1: has no question; found the columns split, subject, A, B, C, D, answer; expected"):
        task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [{**rows[0], "question": None}])))
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["split"] == "dev"])))
    with pytest.raises(UserError, match="mmlu: no row of its data has the split test"):
        open_task("mmlu", settings())


def test_empty_cells_of_a_table_are_none(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer,id,group,scoring,entry_point\nA?,1,,,,\nB?,2,,,numeric,\n")
    first, second = open_task(f"{tmp_path / 'rows.csv'}:exact", settings()).items
    assert [each.target["scoring"] for each in (first, second)] == ["exact", "numeric"]
    assert "entry_point" not in first.target
    assert first.group != second.group
    assert "" not in (first.id, second.id)


def test_a_question_keeps_its_system_message_and_its_functions_and_is_one_cluster(tmp_path: Path, tiny_model: Path, watch: Watch) -> None:
    tools = [{"name": "look", "parameters": {"type": "object", "properties": {}}}]
    row = {"prompt": "B?", "system": "Be brief.", "tools": tools, "scoring": "exact", "answer": "1"}
    said = [{"role": each, "content": text} for each, text in (("user", "A?"), ("assistant", "Yes."), ("user", "B?"))]
    rows = [row, {**row, "answer": "2"}, {"messages": said, "scoring": "exact", "answer": "1"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    first, again, turns = open_task(str(path), settings()).items
    assert [each["content"] for each in first.messages] == ["Be brief.", "B?"]
    assert first.tools[0]["function"] == tools[0]
    assert first.completion == "Be brief.\n\nQuestion: B?\nAnswer:"
    assert turns.completion == "Question: A?\n\nAnswer: Yes.\n\nQuestion: B?\nAnswer:"
    assert (first.group == again.group, first.id == again.id) == (True, False)
    (metric,) = evaluate_tasks({"a": str(tiny_model)}, [str(path)], None, settings()).tasks[0].metrics["a"]
    assert (metric.n, metric.clusters) == (3, 2)


def test_whole_numbers_of_a_table_are_written_as_answers_write_them(tmp_path: Path) -> None:
    rows = [{"prompt": "A?", "scoring": each, "answer": answer} for each in ("exact", "contains") for answer in (3.0, 2.5)]
    rows.append({"prompt": "A?", "scoring": "contains", "answer": [200, -3.0, "ab"]})
    task = open_task(str(write_rows(tmp_path / "rows.jsonl", rows)), settings())
    whole, part, found, found_part, several = task.items
    right = {
        whole.id: ["3", "3.0", " 3\n"],
        part.id: ["2.5"],
        found.id: ["it is 3", "3.0", "3.00.", "(1,2,3)", "10-3", "x=3, so", "$3"],
        found_part.id: ["it is 2.5.", "2.50"],
        several.id: ["Cab: 200, -3.0"],
    }
    wrong = {
        whole.id: ["3.00", "13", "it is 3"],
        part.id: ["2", "2.50"],
        found.id: ["it is 13", "30", "3.5", "1.3", ".3", "3,000", "-3", "x = -3.0"],
        found_part.id: ["2", "12.5", "2.51"],
        several.id: ["ab 1,200 -3", "ab 200 3", "200 -3"],
    }
    for value, cases in ((1.0, right), (0.0, wrong)):
        for item in (whole, part, found, found_part, several):
            assert [task.score(item, answer)["score"].value for answer in cases[item.id]] == [value] * len(cases[item.id]), item.target


def test_a_schema_may_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,scoring,schema\nA number?,json-schema,"{""type"": ""integer""}"\n')
    task = open_task(str(tmp_path / "rows.csv"), settings())
    assert [task.score(task.items[0], answer)["score"].value for answer in ("7", '"seven"')] == [1.0, 0.0]


def test_a_pattern_that_backtracks_without_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.core.patterns.SECONDS", 0.2)
    row = {"id": 0, "prompt": "a", "scoring": "regex", "pattern": r"^(.*)(.*)(.*)(.*)(.*)(.*)\1\2[xyz]$"}
    task = open_task(str(write_rows(tmp_path / "rows.jsonl", [row])), settings())
    assert task.items[0].id == "0"
    with pytest.raises(UserError, match=r"took longer than 0.2 s to search for in a text of 4,002 characters"):
        task.score(task.items[0], "z" + "a" * 4000 + "!")


LONG = ["a" * 100_000, "\n" * 100_000, " " * 100_000, "```\n" * 25_000, r"\boxed{" * 14_000, "#### " * 20_000, "1 1/2 " * 16_000, "(A" * 50_000, "<" * 100_000]  # fmt: skip


@pytest.mark.parametrize("answer", LONG, ids=[repr(each[:6]) for each in LONG])
def test_an_endless_answer_is_marked_all_the_same(answer: str, cache: Path, tmp_path: Path) -> None:
    task_data.fetch_data("mmlu", str(write_rows(tmp_path / "rows.jsonl", mmlu_rows())))
    golds = {"exact": "1", "numeric": "7", "contains": "zz"}
    rows: list[dict[str, Any]] = [{"prompt": name, "scoring": name, "answer": gold} for name, gold in golds.items()]
    rows.append({"prompt": "s", "scoring": "json-schema", "schema": {"type": "object"}})
    mine = write_rows(tmp_path / "mine.jsonl", rows)
    for name in ("gsm8k", "ifeval", "mmlu_generated", str(mine)):
        task = open_task(name, settings())
        for item in task.items[:4]:
            assert all(0.0 <= mark.value <= 1.0 for mark in task.score(item, answer).values())
    found = health(["What?"], [Answer(text=answer, finish_reason="length", num_tokens=9)])
    assert found.truncated == 1.0
    assert len(extract_program(answer, prompt="def f():\n", entry_point="f")) <= 2 * len(answer) + 100_000


def test_bad_settings_are_named(mine: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'gsm8': did you mean 'gsm8k'"):
        evaluate_tasks({"a": str(tiny_model)}, ["gsm8"], None, settings())
    with pytest.raises(UserError, match="unknown scoring 'numerc': did you mean 'numeric'"):
        open_task(f"{mine}:numerc", settings())  # all its rows name theirs, and yet it is no scoring
    with pytest.raises(UserError, match=r"mine.jsonl is given twice \(a file goes by its name, without its folder\)"):
        evaluate_tasks({"a": str(tiny_model)}, [str(mine), str(mine)], None, settings())
    with pytest.raises(UserError, match="temperature: 2 samples need one above 0"):
        settings(samples=2, temperature=0)
    with pytest.raises(UserError, match=r"gone.jsonl"):  # before any model is looked at
        evaluate_tasks({"a": "no/such/model"}, [str(mine)], None, settings(train_data=str(tmp_path / "gone.jsonl")))
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a " * 2000, "answer": "1", "scoring": "exact"}])
    with pytest.raises(UserError, match="none of its 1 questions was answered by every model: 1 too_long"):
        evaluate_tasks({"a": str(tiny_model)}, [str(long)], None, settings())
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    some = write_rows(tmp_path / "some.jsonl", [*rows, {"prompt": "a " * 2000, "answer": "1", "scoring": "exact"}])
    result = evaluate_tasks({"a": str(tiny_model)}, [str(some)], None, settings())
    assert (result.tasks[0].n, result.tasks[0].left_out) == (5, {"too_long": 1})


def test_a_server_is_not_asked_for_what_it_does_not_tell(tiny_model: Path) -> None:
    (model,) = find_models({"it": str(tiny_model)}, EngineConfig(engine="transformers", device="cpu"))
    server = replace(model, chat=None, template=None, reference="some")
    mmlu = Task(name="mmlu", items=[], metrics=("m",), score=lambda item, answer: {}, likelihood=True)
    with pytest.raises(
        UserError, match="it=some: a server does not tell the probabilities of a given text, which mmlu compares; take mmlu_gen"
    ):
        ways([server], [mmlu], settings())
    with pytest.raises(UserError, match="a server takes chats only; leave out --ask completion"):
        ways([server], [], settings(ask="completion"))
    assert ways([server], [], settings(ask="both")) == [Asked("it", server, True)]


def test_without_a_sandbox_no_model_is_asked(tiny_model: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.evaluate.benchmark.available", lambda: "bubblewrap is not installed: apt-get install bubblewrap (Linux)")
    with pytest.raises(UserError, match="humaneval: runs programs that models wrote, and bubblewrap is not installed"):
        evaluate_tasks({"a": str(tiny_model)}, ["humaneval"], None, settings())
    assert watch.events == []


def test_one_question_and_ties_give_words_and_no_nan(mine: Path, tiny_model: Path) -> None:
    models = {"a": str(tiny_model), "b": str(tiny_model)}
    result = evaluate_tasks(models, [str(mine)], None, settings(limit=1))
    (comparison,) = result.tasks[0].comparisons
    assert (comparison.difference, comparison.p_value, comparison.detectable) == (0.0, 1.0, None)
    assert "not significant; too few questions to find any difference" in result.summary()
    assert "1 question answered" in result.summary()
    assert "nan" not in result.summary().lower()


def test_the_command(mine: Path, trained_model: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli(
        "evaluate", "tasks", "--model", f"sft={trained_model}", "--tasks", mine, "--max-new-tokens", 16, "-o", tmp_path / "run"
    )
    assert code == 0
    assert "mine.jsonl: 5 questions answered by every model" in out
    assert "80.0 %" in out
    code, out, error = cli("evaluate", "tasks", "--model", f"sft={trained_model}", "--tasks", "gsm9k")
    assert (code, out) == (1, "")
    assert "did you mean 'gsm8k'" in error
    assert "Traceback" not in error
    code, out, _ = cli("evaluate", "data", "list")
    assert code == 0
    assert "humaneval" in out
    assert ANSWER == "The answer is 1."
    assert Item("a", asked("b"), "c").question == "b"
