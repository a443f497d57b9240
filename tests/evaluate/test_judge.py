"""The judge of stored answers: both orders, lengths out of the way, and its own worth beside every result."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sftkit.core import judge as judging
from sftkit.core.config import load_config
from sftkit.core.errors import UserError
from sftkit.core.statistics import wilson
from sftkit.evaluate.calibration import read_verdicts
from sftkit.evaluate.compare import compare
from sftkit.evaluate.config import CompareConfig, JudgeConfig
from sftkit.evaluate.judge import judge
from sftkit.evaluate.preferences import agreement, length_controlled, win_rate
from sftkit.evaluate.task_data import read_data
from sftkit.pipelines.report import write_report

Cli = Callable[..., tuple[int, str, str]]
CPU = {"engine": "transformers", "device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def no_least_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LEAST_MASS", 0.0)  # the judges here are models of random weights


def settings(model: Path, **more: object) -> JudgeConfig:
    return load_config(JudgeConfig, {"judge": str(model), "engine": CPU, "calibrate": "none", **more})


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: Path, texts: list[str]) -> Path:
    return write(path, [{"prompt": f"What is {number}?", "response": text} for number, text in enumerate(texts)])


PAIRS = [
    {"subset": subset, "idx": 0, "input": f"Say {word}", "output_1": word, "output_2": "the sea", "label": 1 + (word == "hi")}
    for subset in ("LLMBar/Adversarial/Manual", "LLMBar/Adversarial/GPTOut", "Processed/MT-Bench")
    for word in ("hi", "model", "42")
]


def test_padding_answers_leaves_the_length_controlled_rate_where_it_was() -> None:
    """Equal quality, and a judge that likes length: the raw rate follows the padding, the controlled one does not."""
    random = np.random.default_rng(0)
    n = 20_000
    first, second = (np.exp(random.normal(5.5, 0.6, n)) for _ in range(2))
    draws = random.random(n)
    rates = {}
    for name, filler in (("as it was", ""), ("padded", " Let me know if you need anything else. I am happy to help with it!")):
        lengths = first + 2 * len(filler)
        difference = lengths - second
        wins = draws < 1 / (1 + np.exp(-1.5 * np.tanh(difference / difference.std())))
        numbers = win_rate(np.where(wins, 1, 2).tolist(), [False] * n, list(zip(lengths.astype(int), second.astype(int), strict=True)))
        rates[name] = numbers
    raw, padded = rates["as it was"], rates["padded"]
    assert padded.rate.value - raw.rate.value > 0.08
    assert abs(padded.controlled.value - raw.controlled.value) < 0.02
    assert padded.controlled.value == pytest.approx(0.5, abs=0.02)
    assert padded.longer_wins is not None
    assert padded.longer_wins > 0.6


def test_the_interval_at_equal_lengths_covers_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    truth = 1 / (1 + np.exp(-0.4))
    for _ in range(400):
        difference = random.normal(80, 200, 200)
        wins = random.random(200) < 1 / (1 + np.exp(-(0.4 + np.tanh(difference / difference.std()))))
        interval = length_controlled(wins, difference).interval
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("outcomes", "differences"),
    [([1.0], [5.0]), ([1.0] * 8, [3.0] * 8), ([0.5] * 8, [0.0] * 8), ([1.0, 0.0], [7.0, 7.0]), ([1.0] * 9, range(9))],
)
def test_few_pairs_ties_and_equal_lengths_give_numbers(outcomes: list[float], differences: list[float]) -> None:
    estimate = length_controlled(outcomes, list(differences))
    assert 0 < estimate.value < 1
    assert (estimate.interval is None) == (len(outcomes) == 1)
    numbers = win_rate(
        [{1.0: 1, 0.0: 2, 0.5: 0}[each] for each in outcomes], [False] * len(outcomes), [(int(each), 0) for each in differences]
    )
    assert numbers.wins + numbers.ties + numbers.losses == numbers.n
    assert np.isfinite([numbers.rate.value, numbers.controlled.value, numbers.p_value]).all()


def test_equal_outcomes_are_not_certain() -> None:
    ties = win_rate([0] * 8, [True] * 8, [(5, 5)] * 8)
    assert ties.rate.interval == ties.controlled.interval == wilson(8, 16)
    won = win_rate([1] * 8, [False] * 8, [(5, 5)] * 8)
    assert won.rate.interval == won.controlled.interval == wilson(8, 8)
    assert agreement("toy", [1] * 8, [(1, 2)] * 8).interval == wilson(8, 16)


def test_llmbars_verdicts_give_llmbars_accuracies(shared_data: Path) -> None:
    """Zeng et al. 2023: with a plain prompt GPT-3.5 is below chance on the adversarial pairs, GPT-4 far above."""
    source = str(shared_data / "llmbar" / "judge_verdicts.jsonl.gz")
    found = {name: {each.name: each for each in read_verdicts(source, judge=name, prompt="Vanilla")} for name in ("GPT-4", "ChatGPT")}
    assert found["GPT-4"]["LLMBar/Adversarial"].n == 319
    assert 0.79 < found["GPT-4"]["LLMBar/Adversarial"].accuracy < 0.83
    assert 0.26 < found["ChatGPT"]["LLMBar/Adversarial"].accuracy < 0.28
    assert found["GPT-4"]["LLMBar/Natural"].accuracy == pytest.approx(0.955)
    assert found["ChatGPT"]["CaseStudy/Base_9"].accuracy == 0.5  # it always names the same place
    assert found["ChatGPT"]["CaseStudy/Base_9"].same == 0.0
    together = {each.name: each for each in read_verdicts(source, judge="GPT-4")}
    assert together["Vanilla: LLMBar/Natural"].n == found["GPT-4"]["LLMBar/Natural"].n == 100  # not thrice the pairs, as if independent
    with pytest.raises(UserError, match="no verdicts of 'GPT-5'; there are ChatGPT, ChatGPT-0301, Falcon, GPT-4"):
        read_verdicts(source, judge="GPT-5")


def test_numbers_of_outputs_may_be_written_as_fractions_are(tmp_path: Path) -> None:
    rows = [{"judge": "j", "label": 1.0, "winner_orig": 1.0, "winner_swapped": None}, {"judge": "j", "label": 2.0, "winner_orig": 2.0}]
    (found,) = read_verdicts(str(write(tmp_path / "v.jsonl", [{"winner_swapped": 2.0, **row} for row in rows])), judge="j")
    assert (found.accuracy, found.both) == (0.75, 0.5)
    others = write(tmp_path / "o.jsonl", [{"judge": "j", "label": 1, "winner_orig": "A", "winner_swapped": "B"}])
    with pytest.raises(UserError, match=r"o.jsonl: the winners are A, B; expected 1 or 2, the number of the better output"):
        read_verdicts(str(others), judge="j")


def test_agreement_counts_both_orders_and_silence_as_wrong() -> None:
    found = agreement("toy", [1, 2, 1, 1], [(1, 1), (1, 2), (None, 1), (2, 2)])
    assert (found.accuracy, found.both, found.same) == (0.5, 0.25, 0.5)
    mute = agreement("toy", [1, 2], [(None, None), (None, None)])
    assert (mute.accuracy, mute.same) == (0.0, 0.0)  # to say nothing twice is no agreement


def test_a_run_is_judged_and_judged_again_for_nothing(
    tmp_path: Path, tiny_model: Path, trained_model: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    compare(models, None, run, load_config(CompareConfig, {"max_new_tokens": 20, "engine": CPU}))
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    result = judge([run], None, settings(tiny_model, calibrate=str(pairs), calibrate_limit=2))
    (comparison,) = result.comparisons
    assert (comparison.model, comparison.baseline, comparison.numbers.n) == ("sft", "base", 3)
    table = pl.read_parquet(run / "evaluate" / "judgements.parquet")
    assert set(table["winner"]) <= {"sft", "base", "tie"}
    assert comparison.numbers.wins == table.filter(winner="sft").height
    assert comparison.numbers.flips == table["flipped"].sum()
    means = table.select((pl.col("shown_first") + pl.col("shown_second")) / 2).to_series().to_list()
    assert table["preference"].to_list() == pytest.approx(means)
    assert [(each.name, each.n) for each in result.agreements] == [
        ("LLMBar/Adversarial", 4),
        ("LLMBar/Adversarial/GPTOut", 2),
        ("LLMBar/Adversarial/Manual", 2),
        ("Processed/MT-Bench", 2),
    ]
    told = [each for each in result.warnings if "flip" not in each]
    assert told == ["the judge is base itself: judges prefer their own answers"]
    assert (len(told) < len(result.warnings)) == (comparison.numbers.flips >= 1)
    assert json.loads((run / "evaluate" / "results.json").read_text()).keys() == {"compare", "judge"}
    monkeypatch.setattr("sftkit.core.named_models.open_engine", lambda *_: pytest.fail("the model was opened"))
    code, said, _ = cli(
        "evaluate",
        "judge",
        run,
        "--judge",
        tiny_model,
        "--calibrate",
        "none",
        "--engine",
        "transformers",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    assert code == 0
    assert "at equal length" in said
    assert "warning: what this judge is worth is not known" in said
    results, report = run / "evaluate" / "results.json", run / "report.html"
    asked = {"max_new_tokens": 20, "engine": CPU}
    compare(models, None, run, load_config(CompareConfig, asked))  # the same answers
    write_report(run)
    assert "judge" in json.loads(results.read_text())
    assert "Judged in pairs" in report.read_text()
    compare(models, None, run, load_config(CompareConfig, {**asked, "limit": 2}))  # fewer of them
    write_report(run)
    assert json.loads(results.read_text()).keys() == {"compare"}
    assert json.loads((run / "evaluate" / "done.json").read_text()).keys() == {"compare"}
    assert not (run / "evaluate" / "judgements.parquet").exists()
    assert "Judged in pairs" not in report.read_text()


def test_llmbar_comes_along_and_is_judged_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (JudgeConfig(judge="m").calibrate, JudgeConfig(judge="m").calibrate_limit) == ("llmbar", 20)
    assert Counter(row["subset"].split("/")[1] for row in read_data("llmbar")) == {"Natural": 100, "Adversarial": 319}
    files = [answers(tmp_path / "new.jsonl", ["one"]), answers(tmp_path / "old.jsonl", ["uno"])]
    wide = shutil.copytree(tiny_model, tmp_path / "wide")  # the pairs do not fit into the toy's 512 tokens
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        (wide / name).write_text(json.dumps(json.loads((wide / name).read_text()) | {key: 4096}))
    config = settings(wide, calibrate="llmbar", calibrate_limit=1)
    first = judge(files, tmp_path / "run", config)
    assert {each.name.removeprefix("LLMBar/"): each.n for each in first.agreements} == {
        "Natural": 1,
        "Adversarial": 4,
        **{f"Adversarial/{name}": 1 for name in ("GPTInst", "GPTOut", "Manual", "Neighbor")},
    }
    assert not any("not known" in each for each in first.warnings)
    monkeypatch.setattr("sftkit.core.named_models.open_engine", lambda *_: pytest.fail("the model was opened"))
    assert judge(files, tmp_path / "run", config).agreements == first.agreements


def test_two_files_are_matched_by_their_questions(tmp_path: Path, tiny_model: Path) -> None:
    first = answers(tmp_path / "new.jsonl", ["one", "two", "three"])
    second = answers(tmp_path / "old.jsonl", ["uno", "due"])
    gold = answers(tmp_path / "gold.jsonl", ["1", "2", "3"])
    plain = judge([second, first], None, settings(tiny_model))
    assert (plain.comparisons[0].model, plain.comparisons[0].baseline) == ("new.jsonl", "old.jsonl")
    assert plain.comparisons[0].numbers.n == 2
    assert plain.comparisons[0].left_out == {"not answered by both": 1}
    assert "not significant" in plain.summary()
    assert plain.folder is None
    guided = judge([second, first], tmp_path / "a", settings(tiny_model, references=str(gold)))
    unguided = judge([second, first], tmp_path / "b", settings(tiny_model))
    tables = [pl.read_parquet(each.folder / "judgements.parquet") for each in (guided, unguided) if each.folder]
    assert tables[0]["preference"].to_list() != tables[1]["preference"].to_list()  # the judge saw the right answers
    compare({"base": str(tiny_model)}, None, tmp_path / "b", load_config(CompareConfig, {"max_new_tokens": 2, "limit": 1, "engine": CPU}))
    kept = json.loads((tmp_path / "b" / "evaluate" / "results.json").read_text())
    assert kept.keys() == {"judge", "compare"}  # the judged answers are not this run's


def test_a_comparison_that_was_killed_before_its_end_is_told(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    run = tmp_path / "run"
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    compare(models, None, run, load_config(CompareConfig, {"max_new_tokens": 5, "engine": CPU}))
    table = run / "evaluate" / "answers.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:300])
    for reads in (lambda: judge([run], None, settings(tiny_model)), lambda: write_report(run)):
        with pytest.raises(UserError, match=r"answers\.parquet: damaged or cut short"):
            reads()
    table.write_bytes(whole)
    (run / "evaluate" / "results.json").unlink()
    with pytest.raises(UserError, match="its comparison was not finished; give the same `sftkit evaluate compare` command again"):
        judge([run], None, settings(tiny_model))


def test_the_teacher_as_judge_is_told(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    run = tmp_path / "run"
    compare(
        {"base": str(tiny_model), "sft": str(trained_model)}, None, run, load_config(CompareConfig, {"max_new_tokens": 5, "engine": CPU})
    )
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"distill:\n  teacher: {trained_model}\n")
    told = judge([run], None, settings(trained_model)).warnings
    assert "the judge is sft itself: judges prefer their own answers" in told
    assert any("the judge is the teacher of this run" in each for each in told)


def test_a_judge_that_writes_nonsense_is_an_error_with_its_words(tmp_path: Path, tiny_model: Path) -> None:
    files = [answers(tmp_path / f"{name}.jsonl", ["one", "two"]) for name in ("a", "b")]
    with pytest.raises(UserError, match="gave no verdict on any of 2 pairs; the first: not a verdict: '"):
        judge(files, None, settings(tiny_model, parse=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("RUN",), "no judge was given: expected --judge MODEL"),
        (("--verdicts", "A"), "no judge was given: expected --judge MODEL"),
        (("A", "--judge", "TINY"), "is one file of answers; expected two"),
        (("--judge", "TINY"), "expected a run with compared answers or two files of answers, found 0 names"),
        (("RUN", "--judge", "TINY"), "has no stored answers"),
        (("A", "A", "--judge", "TINY"), "is given twice; expected the answers of two models"),
        (("A", "B", "--judge", "TINY"), "none of 2 questions was answered by both"),
        (("A", "A2", "--judge", "TINY", "--rubric", "nice"), "rubric 'nice': expected one of helpfulness"),
        (("A", "A2", "--judge", "TINY", "--calibrate", "A"), "row 1 has no column 'input'"),
        (("A", "A2", "--judge", "TINY", "--calibrate", "NULL"), "null.jsonl: row 1 has no output_2; expected a text"),
        (("A", "A2", "--judge", "TINY", "--limit", "0"), "limit: expected 1 or more, found 0"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str, cli: Cli, tmp_path: Path, tiny_model: Path) -> None:
    places = {
        "TINY": tiny_model,
        "RUN": tmp_path,
        "A": answers(tmp_path / "a.jsonl", ["one"]),
        "A2": answers(tmp_path / "a2.jsonl", ["two"]),
    }
    places["NULL"] = write(tmp_path / "null.jsonl", [{"input": "a", "output_1": "b", "output_2": None, "label": 1}])
    places["B"] = write(tmp_path / "b.jsonl", [{"prompt": "Another?", "response": "Yes"}])
    code, _, error = cli("evaluate", "judge", *(places.get(each, each) for each in arguments))
    assert code == 1
    assert words in error
    assert len(error.strip().splitlines()) <= 2
