"""Ranking teachers: the same prompts for all, what an accepted answer takes, intervals that hold, and no more than is missing."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Request
from sftkit.core.errors import UserError
from sftkit.core.store import SampleStore
from sftkit.curate.config import RankConfig
from sftkit.curate.teacher_rank import TeacherRank, _difference, _ratio, rank_teachers, tell

from .teachers import Server

TINY = {"engine": "transformers", "dtype": "float32", "device": "cpu"}
LETTER = {"letter": {"scorer": "regex", "pattern": "[aeiou]{2}"}}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {number} plus 1?", "answer": str(number + 1)}) + "\n" for number in range(60))
    )
    return path


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with sharper weights: it answers otherwise."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "other"


@pytest.fixture
def config(tiny_model: Path, other: Path) -> Callable[..., RankConfig]:
    def make(**changes: Any) -> RankConfig:
        teachers = {"tiny": str(tiny_model), "sharp": str(other)}
        return load_config(RankConfig, {"teachers": teachers, "max_new_tokens": 30, "prompts": 20, "engine": TINY, **changes})

    return make


def test_what_an_accepted_answer_takes(tmp_path: Path, prompts: Path, tiny_model: Path, config: Callable[..., RankConfig]) -> None:
    out = tmp_path / "rank"
    wanted = config(k=2, scorers=LETTER, student=str(tiny_model), prices={"tiny": [1.0, 2.0]})
    ranking = rank_teachers(prompts, out, wanted)
    by_name = {each.name: each for each in ranking}
    assert ranking[0].accepted.value >= ranking[1].accepted.value  # type: ignore[operator]
    asked = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [each["messages"][0]["content"] for each in asked] == [f"What is {number} plus 1?" for number in range(0, 60, 3)]
    for name, each in by_name.items():
        with SampleStore(out / "teachers" / name / "curate" / "samples.sqlite") as store:
            samples = store.frame()
        passes = samples["text"].str.contains("[aeiou]{2}") & (samples["finish_reason"] == "stop")
        assert (each.answers, each.failed) == (40, 0)
        assert each.accepted.value == pytest.approx(passes.sum() / 40)
        assert each.stopped.value == pytest.approx((samples["finish_reason"] == "stop").mean())
        assert each.tokens.value == pytest.approx(samples["num_tokens"].mean())
        if passes.sum():
            assert each.tokens_per_accepted.value == pytest.approx(samples["num_tokens"].sum() / passes.sum())
            scores = pl.read_parquet(out / "teachers" / name / "curate" / "scores" / "student_logprob.parquet")
            joined = samples.with_columns(passes.alias("passes")).join(scores, on=["example_id", "sample_index"])
            assert each.student_logprob.value == pytest.approx(joined.filter("passes")["value"].mean())
        if name == "tiny" and passes.sum():
            cost = (samples["prompt_tokens"].sum() * 1.0 + samples["num_tokens"].sum() * 2.0) / 1e6
            assert each.cost_per_accepted.value == pytest.approx(cost / passes.sum())
    assert by_name["sharp"].cost_per_accepted.value is None
    assert json.loads((out / "ranking.json").read_text())[0]["name"] == ranking[0].name
    before = {name: (out / "teachers" / name / "curate" / "samples.sqlite").read_bytes() for name in by_name}
    assert rank_teachers(prompts, out, wanted) == ranking
    assert {name: (out / "teachers" / name / "curate" / "samples.sqlite").read_bytes() for name in by_name} == before
    assert f"1. {ranking[0].name} (" in tell(ranking)


def test_the_command(tmp_path: Path, prompts: Path, tiny_model: Path, other: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"engine": TINY, "prompts": 4}))
    arguments = [
        "curate",
        "teacher-rank",
        str(prompts),
        "-o",
        str(tmp_path / "rank"),
        "--teacher",
        f"a={tiny_model}",
        "--config",
        str(settings),
    ]
    arguments += [
        "--teacher",
        f"b={other}",
        "--with",
        "num_words",
        "--accept",
        "num_words>=0",
        "--max-new-tokens",
        "12",
        "--price",
        "a=0,1",
    ]
    result = CliRunner().invoke(sftkit, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "tokens an accepted answer" in result.stdout
    assert "behind the first by" in result.stdout


def test_intervals_are_over_prompts_and_paired() -> None:
    chance = np.random.default_rng(5)
    good = {"accepted": chance.binomial(4, 0.7, 150).astype(float), "wanted": np.full(150, 4.0)}
    bad = {"accepted": np.maximum(good["accepted"] - chance.binomial(1, 0.3, 150), 0), "wanted": np.full(150, 4.0)}
    share = _ratio(good, "accepted", "wanted")
    error = np.std(good["accepted"] / 4, ddof=1) / 150**0.5
    assert share.low is not None
    assert share.high is not None
    assert share.value == pytest.approx(good["accepted"].sum() / 600)
    assert share.high - share.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    difference = _difference(good, bad)
    assert difference.low is not None
    assert difference.low > 0  # although their own intervals overlap
    assert _ratio(bad, "accepted", "wanted").high > share.low  # type: ignore[operator]
    none = {"accepted": np.zeros(20), "wanted": np.ones(20), "tokens": np.full(20, 9.0)}
    assert _ratio(none, "accepted", "wanted").high == pytest.approx(0.161, abs=0.001)  # Wilson's, 0 of 20
    assert _ratio(none, "tokens", "accepted").value is None


def test_what_cannot_be_ranked(tmp_path: Path, prompts: Path, config: Callable[..., RankConfig]) -> None:
    for changes, message in [
        ({"accept": "numeric"}, "accept: no score 'numeric' is asked for; add --with numeric"),
        ({"prices": {"tinny": [1, 2]}}, "price: there is no teacher 'tinny'; teachers are tiny, sharp"),
        ({"scorers": {"numerik": {}}}, "unknown scorer 'numerik'"),
    ]:
        with pytest.raises(UserError, match=message):
            rank_teachers(prompts, tmp_path / "rank", config(**changes))
    with pytest.raises(UserError, match="price of tiny: expected two numbers"):
        config(prices={"tiny": [1]})
    base = ["curate", "teacher-rank", str(prompts), "-o", str(tmp_path / "rank")]
    for arguments, message in [
        (["--teacher", "tiny"], "--teacher 'tiny': expected NAME=TEACHER"),
        (["--teacher", "a=x", "--teacher", "a=y"], "--teacher: 'a' is there twice"),
        (["--teacher", "a=x", "--price", "a=1"], "price '1': expected IN,OUT"),
        ([], "missing setting teachers"),
    ]:
        result = CliRunner().invoke(sftkit, [*base, *arguments])
        assert message in str(result.exception), result.output


def test_a_teacher_without_accepted_answers_is_last_and_says_so(tmp_path: Path, prompts: Path, config: Callable[..., RankConfig]) -> None:
    ranking: list[TeacherRank] = rank_teachers(
        prompts, tmp_path / "rank", config(prompts=3, scorers={"never": {"scorer": "regex", "pattern": "$^"}})
    )
    assert all(each.accepted.value == 0 for each in ranking)
    assert all(each.tokens_per_accepted.value is None for each in ranking)
    assert "that may be chance" in tell(ranking)
    assert "tokens an accepted answer –" in tell(ranking)


def test_prompts_that_one_teacher_cannot_take_count_for_all(tmp_path: Path, other: Path, config: Callable[..., RankConfig]) -> None:
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 4096}))
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "word " * (700 if number % 2 else 1) + str(number)}) + "\n" for number in range(8)))
    anything = {"some": {"scorer": "regex", "pattern": ""}}
    ranking = rank_teachers(path, tmp_path / "rank", config(k=2, scorers=anything, accept="some>=0"))
    by_name = {each.name: each for each in ranking}
    assert {name: (each.answers, each.failed, each.not_asked) for name, each in by_name.items()} == {"tiny": (8, 0, 8), "sharp": (16, 0, 0)}
    with SampleStore(tmp_path / "rank" / "teachers" / "tiny" / "curate" / "samples.sqlite") as store:
        stopped = (store.frame()["finish_reason"] == "stop").sum()
    assert by_name["tiny"].stopped.value == pytest.approx(stopped / 16)
    assert by_name["tiny"].accepted.value == pytest.approx(stopped / 16)
    assert "8 not asked, which count as not accepted" in tell(ranking)


def test_a_folder_keeps_to_its_prompts(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.curate.distill.open_engine", lambda *arguments, **keywords: Server())
    server = {"engine": "openai", "base_url": "http://localhost:1/v1"}

    def rank(count: int) -> int:
        config = load_config(RankConfig, {"teachers": {"a": "m"}, "prompts": count, "engine": server})
        return rank_teachers(prompts, tmp_path / "rank", config)[0].answers

    assert (rank(10), rank(20)) == (10, 20)
    before = (tmp_path / "rank" / "prompts.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"answered 20 prompts, of which 15 are not among the 15 now .* same file and --prompts 20"):
        rank(15)
    assert (tmp_path / "rank" / "prompts.jsonl").read_bytes() == before
    assert rank(20) == 20


def test_an_answer_without_a_word_is_not_accepted(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for place, completion in enumerate(super().generate(requests)):
                yield replace(completion, text="<think>So?</think>" if place % 4 == 0 else completion.text)

    monkeypatch.setattr("sftkit.curate.distill.open_engine", lambda *arguments, **keywords: Silent())
    server = {"engine": "openai", "base_url": "http://localhost:1/v1"}
    for changes in ({}, {"scorers": {"any": {"scorer": "regex", "pattern": ""}}}):
        config = load_config(RankConfig, {"teachers": {"a": "m"}, "prompts": 20, "engine": server, **changes})
        (ranked,) = rank_teachers(prompts, tmp_path / "rank", config)
        assert (ranked.answers, ranked.stopped.value, ranked.accepted.value) == (20, 1.0, 0.75)
