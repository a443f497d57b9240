"""The whole chain with a tiny model: one folder, each step done once, a stop anywhere and the rest afterwards, one honest page."""

import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from sftkit.core.config import to_mapping
from sftkit.core.errors import UserError
from sftkit.core.files import write_json
from sftkit.core.run import Run
from sftkit.core.text import visible
from sftkit.curate.decide_config import SelectConfig
from sftkit.curate.selection import select
from sftkit.evaluate.benchmark import open_tasks
from sftkit.evaluate.config import JudgeConfig, LossConfig
from sftkit.evaluate.judge import judge
from sftkit.evaluate.loss import loss
from sftkit.pipelines.chain import run_chain
from sftkit.pipelines.config import find_recipe, known_recipes, load_recipe
from sftkit.pipelines.report import headline, write_report

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Any:
    """Write a recipe of 60 rows; sections given replace those of the same name."""
    rows = [
        {"messages": [{"role": "user", "content": f"Calculate {n}+{n}."}, {"role": "assistant", "content": f"It is {2 * n}. {EVIL}"}]}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**sections: Any) -> Path:
        content = {
            "about": f"A toy. {EVIL}",
            "data": "rows.jsonl",
            "curate": {"filter": {}, "dedup": {"semantic": None}, "heldout": {"prompts": 10}, "select": {"budget": 45, "method": "random"}},
            "train": {"model": str(tiny_model), "epochs": 4, "learning_rate": 0.003, "validation": 0.1, "dtype": "float32"},
            "evaluate": {"loss": {"resamples": 1000}, "compare": {"max_new_tokens": 20, "heldout_prompts": 2}},
            **sections,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    return write


def test_from_rows_to_a_report(recipe: Any, tmp_path: Path) -> None:
    result = run_chain(load_recipe(recipe()), tmp_path / "run", name="toy")
    page = result.report.read_text()
    found = "\n".join(result.findings)
    assert re.search(r"held-out loss: \d+\.\d\d before, \d\.\d\d after, a change of −\d+\.\d\d \(95 % −.* to −.*\): it is better", found)
    assert "answers that end by themselves within 20 tokens: base " in found
    assert "trained on 4" in found
    for sentence in result.findings:
        assert sentence.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") in page
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for foreign in ("http://", "https://", "src=", "@import", "<link", "<script"):
        assert foreign not in page, foreign
    ledger = pl.read_parquet(tmp_path / "run" / "ledger.parquet")
    counts = {(stage, action): count for stage, action, count in ledger.group_by("stage", "action").len().iter_rows()}
    assert counts[("import", "kept")] == 60
    assert counts[("heldout", "rejected")] == 10
    assert counts[("select", "kept")] == 45
    trained = pl.read_parquet(tmp_path / "run" / "train" / "ledger.parquet")
    held = set(ledger.filter((pl.col("stage") == "heldout") & (pl.col("action") == "rejected"))["example_id"])
    assert len(trained) == 45
    assert not held & set(trained["example_id"])
    questions = (tmp_path / "run" / "evaluate" / "questions.jsonl").read_text().splitlines()
    assert len(questions) == 5


def test_what_is_done_is_not_done_again_and_a_failed_step_is(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def fails(*_: Any) -> None:
        raise UserError("the power is gone")

    with monkeypatch.context() as broken:
        broken.setattr("sftkit.pipelines.chain.compare", fails)
        with pytest.raises(UserError, match="the power is gone"):
            run_chain(load_recipe(recipe()), out)
    times = json.loads((out / "times.json").read_text())  # a stopped run's are not lost
    assert set(times) == {"curate", "train"}
    model, store = out / "train" / "final" / "model.safetensors", out / "curate" / "dataset.jsonl"
    before = (model.stat().st_mtime_ns, store.stat().st_mtime_ns)
    first = run_chain(load_recipe(recipe()), out, name="first")
    answers = (out / "evaluate" / "answers.sqlite").stat().st_mtime_ns
    second = run_chain(load_recipe(recipe()), out, name="first")
    assert (model.stat().st_mtime_ns, store.stat().st_mtime_ns) == before
    assert (out / "evaluate" / "answers.sqlite").stat().st_mtime_ns == answers
    assert second.findings == first.findings
    after = json.loads((out / "times.json").read_text())
    assert set(after) == {"curate", "train", "evaluate"}
    assert all(after[step] >= seconds for step, seconds in times.items())
    other = {"filter": {"max_words": 3}, "dedup": {"semantic": None}}
    with pytest.raises(UserError, match="its model was trained on other data than this recipe makes"):
        run_chain(load_recipe(recipe(curate=other, evaluate={})), out, name="second")
    with open(tmp_path / "rows.jsonl", "a") as rows:
        rows.write(json.dumps({"prompt": "One more?", "answer": "Yes."}) + "\n")
    with pytest.raises(UserError, match="its model was trained on other data than this recipe makes"):
        run_chain(load_recipe(recipe()), out, name="second")
    assert (model.stat().st_mtime_ns, store.stat().st_mtime_ns) == before
    assert yaml.safe_load((out / "config.yaml").read_text())["recipe"]["name"] == "first"  # what was refused left no trace


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, r"recipe\.yaml: unknown setting 'trian': did you mean 'train'"),
        ({"train": {"model": "x", "epoch": 1}}, r"recipe\.yaml: train: unknown setting 'epoch': did you mean 'epochs'"),
        ({"train": {}}, r"recipe\.yaml: train: missing setting model"),
        ({"curate": {"dedup": {"semantic": None}}}, r"needs rows that are not trained on"),
        ({"evaluate": {"tasks": {"names": ["gsm8"]}}}, r"unknown task 'gsm8': did you mean 'gsm8k'"),
        (
            {"curate": {"score": {"scorers": {"numerik": {}}}, "heldout": {"prompts": 5}}},
            r"unknown scorer 'numerik': did you mean 'numeric'",
        ),
    ],
)
def test_a_faulty_recipe_fails_before_anything_is_done(recipe: Any, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_chain(load_recipe(recipe(**sections)), tmp_path / "run")
    assert not (tmp_path / "run" / "curate").exists()


@pytest.mark.parametrize(
    ("student", "message"), [("gemma-3-270m", "comes under the Gemma terms"), ("no-model", "unknown model 'no-model'")]
)
def test_what_is_refused_is_refused_before_anything_is_fetched(
    student: str, message: str, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sftkit.core.catalogue._download", lambda *_: pytest.fail("a model was fetched"))
    curate = {"distill": {"teacher": "qwen2.5-coder-1.5b-instruct"}, "heldout": {"prompts": 10}}
    with pytest.raises(UserError, match=message):
        run_chain(load_recipe(recipe(curate=curate, train={"model": student})), tmp_path / "run")


@pytest.fixture
def only_curate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the chain end with its first step."""
    for name in ("_train", "_evaluate", "write_report"):
        monkeypatch.setattr(f"sftkit.pipelines.chain.{name}", lambda *_: None)
    monkeypatch.setattr("sftkit.pipelines.chain.headline", lambda *_: [])


@pytest.mark.usefixtures("only_curate")
def test_a_data_set_that_another_hand_has_changed_is_made_again(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of other settings that was stopped on the way, a step by hand: the recipe's own rows are trained on all the same."""
    out = tmp_path / "run"
    files = [out / "curate" / name for name in ("heldout.jsonl", "dataset.jsonl")]
    run_chain(load_recipe(recipe()), out)
    made = [each.read_bytes() for each in files]

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    other = {"dedup": {"semantic": None}, "heldout": {"prompts": 3}, "select": {"budget": 45, "method": "random"}}
    with monkeypatch.context() as broken:
        broken.setattr("sftkit.curate.build.select", stops)
        with pytest.raises(KeyboardInterrupt):
            run_chain(load_recipe(recipe(curate=other)), out)
    assert files[0].read_bytes() != made[0]
    run_chain(load_recipe(recipe()), out)
    assert [each.read_bytes() for each in files] == made
    with Run.create(out) as run:
        select(run, SelectConfig(budget=5, method="random"))
    write_json(out / "train" / "done.json", {})
    run_chain(load_recipe(recipe()), out)
    assert [each.read_bytes() for each in files] == made


@pytest.mark.usefixtures("only_curate")
def test_rows_are_known_wherever_they_lie(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    path = recipe()
    run_chain(load_recipe(path), tmp_path / "run")
    write_json(tmp_path / "run" / "train" / "done.json", {})
    (tmp_path / "folder").mkdir()
    rows = rows.rename(tmp_path / "folder" / "moved.jsonl")
    moved = load_recipe(recipe(data="folder/moved.jsonl"))
    run_chain(moved, tmp_path / "run")
    (tmp_path / "run" / "curate" / "done.json").unlink()
    (tmp_path / "run" / "train" / "done.json").unlink()
    run_chain(moved, tmp_path / "run")  # imported again, from elsewhere
    whole = load_recipe(recipe(data="folder"))
    run_chain(whole, tmp_path / "run2")
    with monkeypatch.context() as unread:
        unread.setattr("sftkit.core.sources._parsed", lambda *_: pytest.fail("rows were read where all is done"))
        run_chain(whole, tmp_path / "run2")
    (tmp_path / "folder" / "more.jsonl").write_text(json.dumps({"prompt": "One more?", "answer": "Yes."}))
    with pytest.raises(UserError, match="holds other rows"):
        run_chain(whole, tmp_path / "run2")
    write_json(tmp_path / "run2" / "train" / "done.json", {})  # the working folder holds other data, if it is read
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="the name of the data is empty"):
        run_chain(load_recipe(recipe(data="")), tmp_path / "run2")


@pytest.mark.parametrize("folder", ["run", "."])
@pytest.mark.usefixtures("only_curate")
def test_a_task_of_rows_that_the_recipe_makes_is_asked_when_they_are_made(
    folder: str, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = Path(folder)
    made = [f"{out}/curate/heldout.jsonl:exact", f"{out.resolve()}:exact"]
    with pytest.raises(UserError, match="unknown task 'gsm8'"):
        run_chain(load_recipe(recipe(evaluate={"tasks": {"names": [*made, "gsm8"]}})), out)
    asked = load_recipe(recipe(evaluate={"tasks": {"names": made}}))
    run_chain(asked, out)
    assert asked.evaluate.tasks is not None
    assert [len(each.items) for each in open_tasks(made, asked.evaluate.tasks)[0]] == [10, 45]


@pytest.mark.parametrize("data", ["rows.jsonl", "folder"])
@pytest.mark.usefixtures("only_curate")
def test_what_was_done_before_it_was_told_what_was_made_is_done(data: str, recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe()
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "folder")
    asked = load_recipe(recipe(data=data))
    run_chain(asked, out)
    done = json.loads((out / "curate" / "done.json").read_text())
    content = hashlib.sha256((tmp_path / data).read_bytes()).hexdigest() if data == "rows.jsonl" else None
    settings = {"data": str(tmp_path / data), "content": content, **to_mapping(asked.curate)}
    former = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    write_json(out / "train" / "done.json", {})
    write_json(out / "curate" / "done.json", {"settings": former[::-1]})
    with pytest.raises(UserError, match="its model was trained on other data than this recipe makes"):
        run_chain(asked, out)
    write_json(out / "curate" / "done.json", {"settings": former})
    before = (out / "curate" / "dataset.jsonl").stat().st_mtime_ns
    run_chain(asked, out)
    assert (out / "curate" / "dataset.jsonl").stat().st_mtime_ns == before
    assert json.loads((out / "curate" / "done.json").read_text()) == done


def test_recipes_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert set(known_recipes()) == {"quickstart", "quickstart-full"}
    with pytest.raises(UserError, match="unknown recipe 'quikstart': did you mean 'quickstart'"):
        find_recipe("quikstart")
    with pytest.raises(UserError, match=r"mine\.yaml: no such file; recipes that come with sftkit are quickstart, quickstart-full"):
        find_recipe(str(tmp_path / "mine.yaml"))
    assert find_recipe("quickstart", full=True) == find_recipe("quickstart-full")
    with pytest.raises(UserError, match=r"--full: mine\.yaml has no larger form, quickstart has; leave out --full"):
        find_recipe("mine.yaml", full=True)


@pytest.mark.parametrize("name", ["quickstart", "quickstart-full"])
def test_the_recipes_that_come_with_sftkit_are_sound(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    assert Path(recipe.data).is_file()
    assert recipe.about
    distill = recipe.curate.distill
    assert distill is not None
    assert recipe.teacher == distill.teacher
    assert recipe.curate.heldout is not None
    assert recipe.evaluate.loss is not None


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    Run.create(tmp_path / "run").close()
    with pytest.raises(UserError, match="holds nothing to report yet"):
        write_report(tmp_path / "run")


def test_the_losses_of_turns_and_sources_stand_in_the_report(tmp_path: Path, tiny_model: Path) -> None:
    def chat(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]

    rows = [{"messages": chat("hi", "hello", "and?", "The sea."), "source": name} for name in ("sea", "land")]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"messages": chat("1+1", "2"), "source": "sea"}])
    )
    models = {"base": str(tiny_model), "sft": str(shutil.copytree(tiny_model, tmp_path / "same"))}
    loss(tmp_path / "rows.jsonl", models, tmp_path / "run", LossConfig(resamples=1000))
    loss(tmp_path / "rows.jsonl", models, tmp_path / "run", LossConfig(resamples=1000, text=True))
    page = write_report(tmp_path / "run").read_text()
    assert re.search(r"<h2>Held-out loss</h2>.*<h2>Loss on plain texts</h2>.*3 pieces of 2 texts, scored as they stand", page, re.DOTALL)
    assert re.search(r"<h3>by source</h3>.*<th class=n>land<th class=n>sea<.*sft − base<td class=n>\+0\.000", page, re.DOTALL)
    assert re.search(r"<h3>by turn</h3>.*<th class=n>1<th class=n>2<", page, re.DOTALL)


def test_an_interval_without_zero_that_the_test_does_not_back_is_explained(tmp_path: Path) -> None:
    interval = {"low": -3.5, "high": -0.9}
    models = {name: {"loss": {"value": value, "interval": None}} for name, value in (("base", 13.2), ("sft", 10.6))}
    change = {"value": -2.6, "interval": interval}
    difference = {"model": "sft", "baseline": "base", "loss": change, "bits_per_byte": change, "shown": False}
    write_json(tmp_path / "evaluate" / "results.json", {"loss": {"models": models, "differences": [difference]}})
    write_json(tmp_path / "evaluate" / "done.json", {"loss": {}})
    (told,) = headline(tmp_path)
    assert told.endswith("(95 % −3.50 to −0.90): the interval leaves zero out and the test does not agree, none is shown")


def test_what_a_judge_preferred_stands_in_the_report(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.core.judge.LEAST_MASS", 0.0)  # the judge is a model of random weights
    files = []
    for name, answer in (("old", "It is two."), ("new", "Two, as one and one are two.")):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": f"What is {n}+{n}?", "response": f"{answer} {EVIL}"}) + "\n" for n in range(3)))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"input": "1+1?", "output_1": "2", "output_2": "3", "label": 1}))
    judge(files, tmp_path / "run", JudgeConfig(judge=str(tiny_model), calibrate=str(pairs)))
    page = write_report(tmp_path / "run").read_text()
    assert re.search(r"<h2>Judged in pairs</h2>.*<td>new\.jsonl<td>old\.jsonl<td class=n>\d+\.\d%<td class=n>\d+% to \d+%", page)
    assert "new.jsonl against old.jsonl: not significant" in page
    assert re.search(r"<th>labelled pairs<th class=n>n.*<td>[^<]+<td class=n>1<td class=n>\d+\.\d%", page)
    assert "begun again" not in page
    with pytest.raises(UserError, match="has no column"):
        judge(files, tmp_path / "run", JudgeConfig(judge=str(tiny_model), calibrate=str(files[0])))
    assert "evaluate judge was begun again and has not ended" in write_report(tmp_path / "run").read_text()


def test_tasks_of_a_recipe_stand_in_the_report(recipe: Any, tmp_path: Path) -> None:
    questions = [*(f"Calculate {n}+{n}." for n in range(8)), "Calculate " + "1+" * 2000 + "1."]
    lines = [json.dumps({"question": each, "answer": "1", "scoring": "numeric"}) for each in questions]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    tasks = {"names": [str(tmp_path / "sums.jsonl")], "max_new_tokens": 12, "resamples": 1000, "ask": "chat"}
    evaluate = {"tasks": tasks, "compare": {"max_new_tokens": 5}}
    result = run_chain(load_recipe(recipe(evaluate=evaluate)), tmp_path / "run")
    page = result.report.read_text()
    assert re.search(r"<h2>Tasks</h2><h3>[^<]*sums", page)
    assert "sft − base: " in page
    assert "questions left out for all models: 1 too_long" in page
    assert any(re.match(r".*sums\.jsonl: sft − base: score [+−]", each) for each in result.findings)
    assert "without what was trained on" in page
    assert "<th class=n>repetitive" in page
    assert re.search(r"four times in five|too few questions to find any difference", page)
    with pytest.raises(UserError, match=r"evaluate\.tasks: expected names"):
        load_recipe(recipe(evaluate={"tasks": {"limit": 3}}))


def test_answers_during_training_stand_in_the_report(recipe: Any, tmp_path: Path, tiny_model: Path) -> None:
    training = {
        "model": str(tiny_model), "epochs": 5, "learning_rate": 0.003, "validation": 0.1, "dtype": "float32", "samples": 2, "stop_check": 0,
    }  # fmt: skip
    page = run_chain(load_recipe(recipe(train=training, evaluate={})), tmp_path / "run").report.read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "train" / "samples.jsonl").read_text().splitlines()]
    steps = sorted({line["step"] for line in lines})
    assert (len(steps), len(lines)) == (6, 12)
    assert "<h3>The same prompts during training</h3><p class=soft>Greedy answers at 4 of 6 evaluations; train/samples.jsonl" in page
    shown = [steps[place] for place in (0, 2, 3, 5)]
    assert re.findall(r"<h4>step ([\d,]+) ·", page) == [str(step) for step in shown] * 2
    for line in lines:
        cell = f"<div class=text>{html.escape(visible(line['answer']))}</div>"
        assert (cell in page) or line["step"] not in shown
        assert html.escape(visible(line["prompt"])) in page
    assert EVIL not in page
