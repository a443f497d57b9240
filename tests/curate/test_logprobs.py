"""Log-probabilities are asked for where they are wanted, and of the first answers; what reads them says what to do without."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.config import load_config
from sftkit.core.engines.base import NOT_FINITE, Completion, Request
from sftkit.core.errors import TooManyFailures, UserError
from sftkit.core.run import Run
from sftkit.core.store import SampleStore
from sftkit.curate import distill as distill_module
from sftkit.curate import teacher_rank
from sftkit.curate.best import best
from sftkit.curate.build import check_early
from sftkit.curate.config import BuildConfig, DistillConfig, RankConfig, ScoreConfig
from sftkit.curate.decide_config import BestConfig, SelectConfig
from sftkit.curate.distill import distill
from sftkit.curate.score import score, summary
from sftkit.curate.selection import select

SERVED = {"engine": "openai", "base_url": "http://localhost:1/v1"}
UNTOLD = "the teacher told none: give model=TEACHER, which computes it, or distill into a new folder with --logprobs"


class Served:
    """A server that tells the log-probabilities it is asked for; those of the broken prompts are no numbers, which only they show."""

    identity, chat, context_length, steps = "openai:m", None, None, 0

    def __init__(self, broken: Iterable[int] = ()) -> None:
        self.asked: list[Request] = []
        self.broken = set(broken)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            number = int(request.messages[-1]["content"].split()[-1])
            if number in self.broken and request.logprob:
                yield Completion(key=request.key, finish_reason="error", error=f"{NOT_FINITE} for one of its tokens")
            else:
                told = -1.0 - number if request.logprob else None
                yield Completion(key=request.key, text=f"answer {number}", num_tokens=2, logprob=told)

    def close(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Served:
    found = Served()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: found)
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What about {number}"}) + "\n" for number in range(60)))
    return path


def config(**changes: Any) -> DistillConfig:
    return load_config(DistillConfig, {"teacher": "m", "k": 2, "engine": SERVED, **changes})


def stored(run: Path) -> pl.DataFrame:
    with SampleStore(run / "curate" / "samples.sqlite") as store:
        return store.frame()


def test_they_are_asked_of_the_first_answers_alone_and_not_stored_of_some(tmp_path: Path, prompts: Path, server: Served) -> None:
    distill(prompts, tmp_path / "run", config())
    asked = [each.messages[-1]["content"] for each in server.asked if each.logprob]
    assert asked == [f"What about {number}" for number in range(50)]  # the first of their two samples
    assert len(server.asked) == 120
    assert stored(tmp_path / "run")["logprob"].null_count() == 120


def test_they_are_asked_of_all_where_they_are_wanted_and_decide_no_key(
    tmp_path: Path, prompts: Path, server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    distill(prompts, tmp_path / "with", config(logprobs=True))
    assert all(each.logprob for each in server.asked)
    assert sorted(set(stored(tmp_path / "with")["logprob"])) == sorted(-1.0 - number for number in range(60))
    assert "no log-probability" not in caplog.text
    distill(prompts, tmp_path / "without", config())
    assert stored(tmp_path / "with").drop("logprob").equals(stored(tmp_path / "without").drop("logprob"))


def test_samples_that_are_stored_are_not_made_again_for_them(
    tmp_path: Path, prompts: Path, server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    distill(prompts, tmp_path / "run", config())
    assert distill(prompts, tmp_path / "run", config(logprobs=True)).new_samples == 0
    assert "120 of 120 samples have no log-probability: they were stored without, and are not made again" in caplog.text
    distill(prompts, tmp_path / "run", config(k=3, logprobs=True))
    told = stored(tmp_path / "run").group_by("sample_index").agg(pl.col("logprob").is_null().all()).sort("sample_index")["logprob"]
    assert told.to_list() == [True, True, False]


def test_an_engine_that_has_them_for_nothing_stores_them(tmp_path: Path, prompts: Path, tiny_model: Path) -> None:
    engine = {"engine": "transformers", "dtype": "float32", "device": "cpu"}
    distill(prompts, tmp_path / "run", config(teacher=str(tiny_model), engine=engine, max_new_tokens=4))
    assert stored(tmp_path / "run")["logprob"].null_count() == 0


def test_a_model_without_finite_probabilities_is_noticed_before_the_rest_is_asked(tmp_path: Path, prompts: Path, server: Served) -> None:
    server.broken = set(range(60)) - {3}
    with pytest.raises(UserError, match=f"^m: {NOT_FINITE} for tokens of 49 of the first 50 answers: its weights are damaged, or"):
        distill(prompts, tmp_path / "run", config(k=4))
    assert len(server.asked) < 240
    assert set(stored(tmp_path / "run")["text"]) <= {f"answer {number}" for number in range(60)}


def test_who_bears_any_failure_is_not_stopped_by_numbers(tmp_path: Path, prompts: Path, server: Served) -> None:
    server.broken = set(range(60))
    result = distill(prompts, tmp_path / "run", config(logprobs=True, max_failed=1.0))
    assert (result.samples, sum(result.failed.values())) == (0, 120)


def test_the_few_that_failed_so_before_say_nothing_of_the_model_when_they_are_asked_again(
    tmp_path: Path, prompts: Path, server: Served
) -> None:
    server.broken = set(range(25))
    wanted = config(k=8, logprobs=True, max_failed=0.5)
    before = distill(prompts, tmp_path / "run", wanted)
    assert sum(before.failed.values()) == 200
    again = distill(prompts, tmp_path / "run", wanted)  # asks these 200 alone, and all fail once more
    assert (again.samples, again.failed, again.new_samples) == (before.samples, before.failed, 0)
    assert len(server.asked) == 480 + 200


def test_they_are_asked_of_the_first_answers_of_a_command_and_not_of_each_round(tmp_path: Path, prompts: Path, server: Served) -> None:
    with distill_module.distillation(prompts, tmp_path / "run", config()) as work:
        for place in range(0, 120, 20):
            work.generate(work.missing()[:20], label=f"round {place}")
    assert [each.logprob for each in server.asked].count(True) == 50


def test_single_answers_without_a_finite_probability_fail_where_they_are_asked_for(tmp_path: Path, prompts: Path, server: Served) -> None:
    server.broken = {7, 55}
    with pytest.raises(TooManyFailures, match=rf"4 of 120 samples failed, .* most often with: {NOT_FINITE}"):
        distill(prompts, tmp_path / "run", config(logprobs=True))
    failed = Run.open(tmp_path / "run").ledger.read().filter(pl.col("action") == "failed")
    assert set(failed["rule"]) == {f"error: {NOT_FINITE} for one of its tokens"}


def test_what_reads_them_says_in_one_line_what_to_do(
    tmp_path: Path, prompts: Path, server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    distill(prompts, tmp_path / "run", config())
    with Run.create(tmp_path / "run") as run:
        (line,) = summary("logprob", score(run, ScoreConfig(scorers={"logprob": {}}))["logprob"]).splitlines()
        assert line.startswith(f"logprob: none of 120 rows has a value (detail of the first: {UNTOLD}")
        best(run, BestConfig(by=("logprob",)))
        assert f"none of 120 rows has a score 'logprob', so it puts none before another; {UNTOLD}" in caplog.text
        with pytest.raises(
            UserError, match=r"none of 60 rows has a score 'logprob', .* `sftkit curate score .*run --with logprob` says why"
        ):
            select(run, SelectConfig(budget=3, method="top", by=("logprob",)))


CHOSEN_BY = [
    {"best": {"by": ["logprob"]}},
    {"best": {"by": ["random"], "gate": ["logprob>-1"]}},
    {"select": {"budget": 3, "method": "top", "by": ["-logprob"]}},
    {"filter": {"where": ["num_tokens < 9 and logprob > -1"]}},
    {"filter": {"min_score": {"logprob": -1}}},
    {"score": {"scorers": {"likely": {"scorer": "logprob"}}}},
]


@pytest.mark.parametrize("steps", CHOSEN_BY, ids=[str(each) for each in CHOSEN_BY])
def test_a_build_that_chooses_by_them_is_told_before_it_costs_anything(tmp_path: Path, steps: dict[str, Any]) -> None:
    def built(**changes: Any) -> BuildConfig:
        return load_config(
            BuildConfig, {"distill": {"teacher": "m", "engine": SERVED, **changes}, "decontaminate": None, "dedup": None, **steps}
        )

    with pytest.raises(UserError, match=r"the score logprob is asked for, .* with distill: \{logprobs: true\}"):
        check_early(tmp_path / "run", built())
    check_early(tmp_path / "run", built(logprobs=True))
    check_early(tmp_path / "run", built(engine={"engine": "transformers"}))


def test_a_build_that_computes_them_asks_the_teacher_for_none(tmp_path: Path, tiny_model: Path) -> None:
    steps = {"score": {"scorers": {"logprob": {"model": str(tiny_model)}}}, "best": {"by": ["logprob"]}}
    check_early(tmp_path / "run", load_config(BuildConfig, {"distill": {"teacher": "m", "engine": SERVED}, **steps, "dedup": None}))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({}, False), ({"scorers": {"logprob": {}}, "accept": "logprob>=-1"}, True), ({"scorers": {"num_chars": {}}}, False)],
)
def test_teachers_are_compared_by_them_where_they_accept_an_answer(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], asked: bool
) -> None:
    class Asked(Exception):
        pass

    def caught(source: Path, out: Path, config: DistillConfig) -> None:
        assert config.logprobs is asked
        raise Asked

    monkeypatch.setattr(teacher_rank, "distill", caught)
    with pytest.raises(Asked):
        teacher_rank.rank_teachers(prompts, tmp_path / "rank", load_config(RankConfig, {"teachers": {"m": "m@http://x/v1"}, **settings}))
