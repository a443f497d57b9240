"""A distillation keeps what it has, whatever changes, fails or interrupts; every row has its place in the ledger."""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core import patterns
from sftkit.core.chat import load_chat
from sftkit.core.config import load_config
from sftkit.core.engines import transformers_engine
from sftkit.core.engines.base import Completion, EngineConfig, Request
from sftkit.core.engines.replicas import Replicas
from sftkit.core.errors import TooManyFailures, UserError
from sftkit.core.example import Decision
from sftkit.core.models import model_identity, resolve_model
from sftkit.core.run import Run
from sftkit.core.store import SampleStore, sample_key
from sftkit.curate import distill as distill_module
from sftkit.curate import estimate as estimate_module
from sftkit.curate.best import best
from sftkit.curate.cache import explain
from sftkit.curate.config import DistillConfig, format_pattern
from sftkit.curate.decide_config import BestConfig
from sftkit.curate.distill import distill
from sftkit.curate.estimate import estimate
from sftkit.curate.rows import load_rows

open_real_engine = distill_module.open_engine


def prompts(path: Path, count: int, first: int = 0) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {number} plus {number}?"}) + "\n" for number in range(first, first + count)))
    return path


@pytest.fixture
def settings(tiny_model: Path) -> Callable[..., DistillConfig]:
    def make(**changes: Any) -> DistillConfig:
        engine = {"engine": "transformers", "dtype": "float32", "device": "cpu", **changes.pop("engine", {})}
        return load_config(DistillConfig, {"teacher": str(tiny_model), "max_new_tokens": 12, "engine": engine, **changes})

    return make


class Between:
    """Stands between a distillation and the real engine: counts what is asked, and breaks what the test wants broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Request] = []
        self.opened = 0
        self.fails: Callable[[Request], str | None] = lambda request: None
        self.interrupt_after: int | None = None
        monkeypatch.setattr(distill_module, "open_engine", self.open)

    def open(self, *arguments: Any, **keywords: Any) -> "Between":
        self.opened += 1
        self.engine = open_real_engine(*arguments, **keywords)
        self.identity, self.chat, self.context_length = self.engine.identity, self.engine.chat, self.engine.context_length
        return self

    def close(self) -> None:
        self.engine.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        failed: list[Completion] = []

        def seen() -> Iterator[Request]:
            for request in requests:
                self.asked.append(request)
                if error := self.fails(request):
                    failed.append(Completion(key=request.key, finish_reason="error", error=error))
                else:
                    yield request

        for number, completion in enumerate(self.engine.generate(seen())):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield completion
        yield from failed


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Between:
    return Between(monkeypatch)


def stored(run: Path) -> pl.DataFrame:
    with SampleStore(run / "curate" / "samples.sqlite") as store:
        return store.frame()


def data_set(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "curate" / "dataset.jsonl").read_text().splitlines()]


def ledger(run: Path, stage: str) -> pl.DataFrame:
    return Run.open(run).ledger.read().filter(pl.col("stage") == stage)


def test_k_samples_of_each_prompt_and_all_of_them_in_the_ledger(tmp_path: Path, settings: Any) -> None:
    run = tmp_path / "run"
    result = distill(prompts(tmp_path / "p.jsonl", 5), run, settings(k=3, system="Be brief."))
    assert (result.prompts, result.samples, result.new_samples, result.failed, result.over_budget) == (5, 15, 15, {}, 0)
    samples = stored(run)
    assert sorted(samples.group_by("example_id").agg("sample_index")["sample_index"].to_list()) == [[0, 1, 2]] * 5
    assert samples["text"].n_unique() > 10  # three streams of random numbers, not one
    assert result.tokens == samples["num_tokens"].sum() == result.new_tokens
    assert result.cut == samples.filter(pl.col("finish_reason") == "length").height
    assert ledger(run, "prompts")["action"].to_list() == ["kept"] * 5
    decided = ledger(run, "distill")
    asked = pl.read_parquet(run / "curate" / "prompts.parquet")["example_id"].to_list()
    assert decided.select("example_id", "sample_index").rows() == [(name, index) for name in asked for index in range(3)]
    told = {(row["example_id"], row["sample_index"]): row for row in samples.iter_rows(named=True)}
    kept = [row for row in decided.select("example_id", "sample_index").rows() if told[row]["finish_reason"] == "stop"]
    assert 0 < len(kept) < 15
    assert decided.filter(pl.col("action") == "kept").select("example_id", "sample_index").rows() == kept
    assert decided.filter(pl.col("action") != "kept").select("action", "rule", "score").unique().rows() == [("rejected", "truncated", 12)]
    rows = data_set(run)
    assert [each["id"] for each in rows] == [f"{name}/{index}" for name, index in kept]  # cut answers are in no data set
    system, user, answer = rows[0]["messages"]
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert (user["role"], user["content"]) == ("user", f"What is {asked.index(kept[0][0])} plus {asked.index(kept[0][0])}?")
    assert answer == {"role": "assistant", "content": told[kept[0]]["text"]}
    assert samples["model"].unique().to_list() == [str(settings().teacher)]


def test_the_same_seed_gives_the_same_answers_however_they_are_batched(tmp_path: Path, settings: Any) -> None:
    path = prompts(tmp_path / "p.jsonl", 12)
    runs = {"whole": {}, "small": {"batch_tokens": 128}}
    for name, engine in runs.items():
        distill(path, tmp_path / name, settings(k=2, engine=engine))
    assert data_set(tmp_path / "whole") == data_set(tmp_path / "small")
    distill(path, tmp_path / "other", settings(k=2, seed=1))
    assert data_set(tmp_path / "whole") != data_set(tmp_path / "other")


def test_an_interruption_keeps_what_finished_and_the_same_call_goes_on(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run, config = prompts(tmp_path / "p.jsonl", 20), tmp_path / "run", settings(k=2, engine={"batch_tokens": 256})
    distill(path, tmp_path / "whole", config)
    between.interrupt_after = 13
    with pytest.raises(KeyboardInterrupt):
        distill(path, run, config)
    committed = stored(run)
    assert committed.height == 13
    with pytest.raises(UserError, match="the distillation has not finished"):
        load_rows(Run.open(run))
    between.interrupt_after, between.asked = None, []
    result = distill(path, run, config)
    assert (result.new_samples, result.samples) == (27, 40)
    assert {each.key for each in between.asked}.isdisjoint(committed["key"])
    assert stored(run).join(committed, on=committed.columns, how="semi", nulls_equal=True).height == 13  # unchanged to the last column
    assert data_set(run) == data_set(tmp_path / "whole")  # the same rows in the same order as without the interruption


def test_nothing_missing_opens_no_engine_and_leaves_later_stages_alone(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run"
    distill(path, run, settings(k=2))
    opened = Run.open(run)
    rows = opened.ledger.read().filter(pl.col("stage") == "distill").select("example_id", "sample_index").rows()
    opened.ledger.record("filter", rows, [Decision(*row, "filter", "kept") for row in rows])
    assert between.opened == 1
    result = distill(path, run, settings(k=2, max_failed=0.5))
    assert between.opened == 1
    assert (result.new_samples, result.samples) == (0, 6)
    assert opened.ledger.stages() == ["prompts", "distill", "filter"]
    distill(path, run, settings(k=3))
    assert opened.ledger.stages() == ["prompts", "distill"]  # other rows: what stood on the former ones is void


def test_topping_up_generates_only_the_new_samples(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 4), tmp_path / "run"
    distill(path, run, settings(k=2))
    before = stored(run)
    between.asked = []
    result = distill(path, run, settings(k=5))
    assert (result.new_samples, result.samples, len(between.asked)) == (12, 20, 12)
    assert stored(run).filter(pl.col("sample_index") < 2).equals(before)
    distill(path, tmp_path / "whole", settings(k=5))
    assert data_set(run) == data_set(tmp_path / "whole")
    fewer = distill(path, run, settings(k=2))
    assert (fewer.samples, fewer.new_samples, ledger(run, "distill").height, stored(run).height) == (8, 0, 8, 20)


def test_other_settings_are_refused_in_the_same_folder_and_have_other_keys_in_a_new_one(tmp_path: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run"
    distill(path, run, settings())
    config = (run / "config.yaml").read_text()
    changes = {"system": "Be brief.", "temperature": 0.5, "top_p": 0.5, "max_new_tokens": 9, "seed": 7}
    keys = set(stored(run)["key"])
    for name, value in changes.items():
        with pytest.raises(UserError, match=rf"this folder holds another run \(distill.{name} was .*, now {value!r}\)"):
            distill(path, run, settings(**{name: value}))
        distill(path, tmp_path / name, settings(**{name: value}))
        others = set(stored(tmp_path / name)["key"])
        assert len(others) == 3
        assert others.isdisjoint(keys)
        keys |= others
    assert (run / "config.yaml").read_text() == config


def test_another_system_prompt_alone_is_asked_anew_where_curator_serves_the_stale_row(
    tmp_path: Path, settings: Any, between: Between
) -> None:
    """curator's key leaves the system prompt out: changed, it answers from its cache, as the former one had it."""
    path, rows = prompts(tmp_path / "p.jsonl", 3), []
    for name, system in {"plain": None, "brief": "Be brief.", "pirate": "Talk like a pirate.", "space": "Be brief. "}.items():
        between.asked = []
        result = distill(path, tmp_path / name, settings(system=system))
        assert (result.new_samples, len(between.asked)) == (3, 3)
        assert [each.messages[:-1] for each in between.asked] == [[] if system is None else [{"role": "system", "content": system}]] * 3
        rows.append(stored(tmp_path / name))
    keys = [key for each in rows for key in each["key"]]
    assert len(set(keys)) == len(keys) == 12
    assert rows[0]["text"].to_list() != rows[1]["text"].to_list() != rows[2]["text"].to_list()  # and the answers do differ
    with pytest.raises(UserError, match=r"this folder holds another run \(distill.system was 'Be brief.', now 'Talk like a pirate.'\)"):
        distill(path, tmp_path / "brief", settings(system="Talk like a pirate."))
    assert stored(tmp_path / "brief").equals(rows[1])
    own = tmp_path / "own.jsonl"  # a row's own system message counts as much
    own.write_text(
        "".join(
            json.dumps({"messages": [{"role": "system", "content": system}, {"role": "user", "content": "What is 0 plus 0?"}]}) + "\n"
            for system in ("Be brief.", "Talk like a pirate.")
        )
    )
    distill(own, tmp_path / "own", settings())
    same = stored(tmp_path / "own")["key"]
    assert [len(set(same) & set(rows[each]["key"])) for each in range(4)] == [0, 1, 1, 0]  # and where it stands does not


def copy_with_other_weights(model: Path, to: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_other_weights_under_the_same_path_leave_no_stale_row(tmp_path: Path, tiny_model: Path, settings: Any) -> None:
    path, run, teacher = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher)
    distill(path, run, settings(teacher=str(teacher)))
    keys = set(stored(run)["key"])

    moved = distill(path, run, settings())  # the same weights by another path are the same teacher
    assert (moved.new_samples, moved.samples) == (0, 3)

    shutil.rmtree(teacher)
    copy_with_other_weights(tiny_model, teacher)
    with pytest.raises(UserError, match=r"distill.teacher_identity was 'sha256:.*', now 'sha256:"):
        distill(path, run, settings(teacher=str(teacher)))
    assert set(stored(run)["key"]) == keys
    distill(path, tmp_path / "new", settings(teacher=str(teacher)))
    assert set(stored(tmp_path / "new")["key"]).isdisjoint(keys)


def test_prompts_that_are_not_asked_have_their_reason(tmp_path: Path, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, run = tmp_path / "p.jsonl", tmp_path / "run"
    question = {"role": "user", "content": "What is 1 plus 1?"}
    rows = [
        {"messages": [question]},
        {"messages": [{"role": "assistant", "content": "Hello."}]},
        {"messages": [question, {"role": "assistant", "content": "2"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, question]},
        {"prompt": "word " * 700},
        {"messages": [question]},
        {"prompt": " \n"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO, logger="sftkit"):
        result = distill(path, run, settings(system="Be brief."))
    assert result.prompts == 1
    assert result.rejected == {"duplicate_prompt": 3, "blank_prompt": 2, "no_user_turn": 1, "prompt_too_long": 1}
    decided, again = ledger(run, "prompts"), "duplicate_prompt"
    assert decided["rule"].to_list() == ["", "no_user_turn", again, again, "prompt_too_long", again, "blank_prompt", "blank_prompt"]
    first = decided["example_id"][0]
    assert decided["witness_id"].to_list() == [None, None, first, first, None, first, None, None]
    assert decided["threshold"][4] == 512
    assert decided["score"][4] > 512 + 12
    assert "7 of 8 prompts are not asked: 3 duplicate_prompt, 2 blank_prompt, 1 no_user_turn, 1 prompt_too_long" in caplog.text
    asked = pl.read_parquet(run / "curate" / "prompts.parquet")
    assert asked["reference"].to_list() == [None, None, "2", *[None] * 5]
    assert asked["source"].to_list()[2].endswith("p.jsonl:3")


def test_no_prompt_left_is_an_error_that_says_why(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 700}) + "\n")
    with pytest.raises(UserError, match="no prompt is left to be asked: 1 prompt_too_long"):
        distill(path, tmp_path / "run", settings())


def test_failures_are_kept_counted_and_tried_again(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 10), tmp_path / "run"
    between.fails = lambda request: "timed out\nafter 60 s" if "3 plus 3" in request.messages[-1]["content"] else None
    with pytest.raises(TooManyFailures, match=r"2 of 20 samples failed.*0\.01.*timed out after 60 s; the other 18 are kept") as caught:
        distill(path, run, settings(k=2))
    assert caught.value.exit_code == 3
    decided = ledger(run, "distill")
    failed = decided.filter(pl.col("action") == "failed")
    assert failed.select("sample_index", "rule").rows() == [(0, "error: timed out after 60 s"), (1, "error: timed out after 60 s")]
    assert decided.height == 20
    assert stored(run).height == 18

    tolerant = distill(path, run, settings(k=2, max_failed=0.1))
    assert tolerant.failed == {"timed out after 60 s": 2}
    with SampleStore(run / "curate" / "samples.sqlite") as store:
        assert store.failures()["times"].to_list() == [2, 2]

    between.fails, between.asked = lambda request: None, []
    healed = distill(path, run, settings(k=2))
    assert (len(between.asked), healed.new_samples, healed.samples, healed.failed) == (2, 2, 20, {})
    with SampleStore(run / "curate" / "samples.sqlite") as store:
        assert store.failures().is_empty()
    distill(path, tmp_path / "whole", settings(k=2))
    assert data_set(run) == data_set(tmp_path / "whole")


def test_one_of_four_samples_that_times_out_leaves_the_other_three_in_their_places(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open-r1 asks for all answers to a prompt at once and drops the row when one times out: here the three stay, with their numbers."""

    class Late(Server):
        late = -1

        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for number, each in enumerate(super().generate(requests)):
                yield replace(each, finish_reason="error", error="timed out after 60 s") if number == self.late else each

    server = Late()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    path, run, config = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run", settings(k=4, max_failed=0.1, **asked)
    distill(path, tmp_path / "whole", config)
    whole = {each["id"]: each for each in data_set(tmp_path / "whole")}
    server.late = 4 + 1  # the second sample of the second prompt
    late = list(whole)[server.late]
    result = distill(path, run, config)
    assert (result.samples, result.failed) == (11, {"timed out after 60 s": 1})
    kept = {each["id"]: each for each in data_set(run)}
    assert kept == {name: each for name, each in whole.items() if name != late}  # each answer with its own number and prompt
    decided = ledger(run, "distill")
    assert decided["action"].to_list() == ["failed" if name == late else "kept" for name in whole]
    assert decided.filter(pl.col("action") == "failed")["rule"].to_list() == ["error: timed out after 60 s"]
    chosen = best(Run.open(run), BestConfig(by=("random",), keep=4)).kept  # of three as of four
    assert Counter(f"{each}/1" for each in chosen["example_id"]) == {name: 3 if name == late else 4 for name in list(whole)[1::4]}


def test_one_poison_prompt_of_a_thousand_fails_alone(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-Juicer's batched operators keep none of a batch of a thousand rows that one of them breaks, and say nothing of it."""

    class Poisoned(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in super().generate(requests):
                poison = self.asked[-1].messages[-1]["content"] == "What is 707 plus 707?"
                yield replace(each, finish_reason="error", error="cannot read this") if poison else each

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Poisoned())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    result = distill(prompts(tmp_path / "p.jsonl", 1000), tmp_path / "run", settings(**asked))
    assert (result.samples, result.failed, len(data_set(tmp_path / "run"))) == (999, {"cannot read this": 1}, 999)
    failed = ledger(tmp_path / "run", "distill").with_row_index().filter(pl.col("action") == "failed")
    assert failed.select("index", "rule").rows() == [(707, "error: cannot read this")]


def test_a_budget_is_never_exceeded_and_its_leftovers_are_no_failures(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 20), tmp_path / "run"
    result = distill(path, run, settings(k=2, budget_tokens=200))
    assert 200 - 12 < result.tokens <= 200
    assert result.samples + result.over_budget == 40
    assert result.over_budget > 0
    left = ledger(run, "distill").filter(pl.col("action") == "failed")
    assert left["rule"].unique().to_list() == ["budget"]
    again = distill(path, run, settings(k=2, budget_tokens=200))  # the budget is of the folder, not of each call
    assert (again.new_samples, again.samples) == (0, result.samples)
    assert len(between.asked) == result.samples
    rest = distill(path, run, settings(k=2))
    assert (rest.samples, rest.new_samples, rest.over_budget) == (40, 40 - result.samples, 0)


def test_a_budget_of_cost_is_never_exceeded(tmp_path: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 30), tmp_path / "run"
    priced = {"price_input": 100.0, "price_output": 1000.0}
    dry = estimate(path, run, settings(k=4, max_new_tokens=40, **priced))
    assert dry.cost == pytest.approx((dry.prompt_tokens * 100 + dry.new_tokens * 1000) / 1e6)
    assert f"cost: about {dry.cost:,.4f}" in dry.summary()
    probe = stored(run)
    probed = (probe["prompt_tokens"].sum() * 100 + probe["num_tokens"].sum() * 1000) / 1e6
    first = probed + dry.cost * 0.4
    result = distill(path, run, settings(k=4, max_new_tokens=40, budget_cost=first, **priced))
    samples = stored(run)
    assert result.cost == pytest.approx((samples["prompt_tokens"].sum() * 100 + samples["num_tokens"].sum() * 1000) / 1e6)
    assert first * 0.6 < result.cost <= first
    assert result.over_budget > 0
    assert distill(path, run, settings(k=4, max_new_tokens=40, budget_cost=first, **priced)).new_samples == 0  # it is the folder's
    before = result.cost
    whole = distill(path, run, settings(k=4, max_new_tokens=40, **priced))
    assert whole.over_budget == 0
    assert whole.cost > before
    assert whole.cost - probed == pytest.approx(dry.cost, rel=0.15)
    timed = distill(path, tmp_path / "timed", settings(k=2, price_hour=3600.0, budget_cost=1e-9))
    assert timed.over_budget > 0
    for changes, message in [
        ({"budget_cost": 1.0}, "budget_cost: expected more than 0, and a price"),
        ({"price_hour": -1}, "price_hour: expected 0"),
    ]:
        with pytest.raises(UserError, match=message):
            settings(**changes)


def test_cut_answers_are_asked_once_more_and_go_on_where_they_were_cut(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 12), tmp_path / "run"
    first = distill(path, run, settings(k=2, max_new_tokens=6))
    before = {(row["example_id"], row["sample_index"]): row for row in stored(run).iter_rows(named=True)}
    cut = [key for key, row in before.items() if row["finish_reason"] == "length"]
    assert len(cut) == first.cut > 0
    second = distill(path, run, settings(k=2, max_new_tokens=6, retry_truncated=True))
    assert (second.samples, second.new_samples) == (24, len(cut))
    assert len(stored(run)) == 24 + len(cut)  # what was committed stays
    every = load_rows(Run.open(run), all=True, columns=["example_id", "sample_index", "response"])
    rows = {f"{name}/{index}": text for name, index, text in every.iter_rows()}
    assert len(rows) == 24
    assert len(data_set(run)) == 24 - second.cut > 24 - first.cut
    longer = {(row["example_id"], row["sample_index"]): row for row in stored(run).iter_rows(named=True) if row["num_tokens"] > 6}
    assert sorted(longer) == sorted(cut)
    for key, row in before.items():
        text = rows[f"{key[0]}/{key[1]}"]
        assert text == longer.get(key, row)["text"]
        assert text.startswith(row["text"].rstrip("\ufffd"))
    asked = len(between.asked)
    third = distill(path, run, settings(k=2, max_new_tokens=6, retry_truncated=True))
    assert (third.new_samples, len(between.asked)) == (0, asked)
    told = sorted(each.summary().partition("): ")[2] for each in explain(run, {}))
    assert told == ["asked once more for answers that were cut, and used in their place", "nothing differs, they would be used"]
    assert Counter(ledger(run, "distill")["action"]) == {"kept": 24 - second.cut, "rejected": second.cut}


def test_a_budget_of_time_stops_asking_and_is_no_failure(tmp_path: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 20), tmp_path / "run"
    result = distill(path, run, settings(k=2, budget_hours=1e-9))
    assert (result.failed, result.over_budget) == ({}, 40 - result.samples)
    assert result.over_budget > 0
    assert "a budget is used up" in result.summary()
    assert "GPU" not in result.summary()
    assert "(5 tokens/s, GPU busy 78% of the time)" in replace(result, new_samples=1, new_tokens=5, seconds=1.0, gpu_busy=0.777).summary()
    assert distill(path, run, settings(k=2)).samples == 40


@pytest.mark.parametrize(("hours", "given"), [(0.01, 4), (1.0, 9)])
def test_what_is_under_way_when_the_time_is_over_has_a_while_to_finish(
    hours: float, given: int, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes nine at once and answers one in 30 s, until the time is over and a minute, or a twentieth of it, besides."""
    now = 0.0
    monkeypatch.setattr(distill_module, "time", SimpleNamespace(monotonic=lambda: now))

    class Slow(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            nonlocal now
            taken = list(islice(requests, 9))
            for completion in super().generate(taken):
                now += 30.0
                yield completion
            if taken:
                now = 36_000.0

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Slow())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    result = distill(prompts(tmp_path / "p.jsonl", 20), tmp_path / "run", settings(budget_hours=hours, **asked))
    assert (result.samples, result.over_budget, result.failed) == (given, 20 - given, {})


def test_more_prompts_are_growth_and_other_prompts_are_refused(
    tmp_path: Path, settings: Any, between: Between, caplog: pytest.LogCaptureFixture
) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 4), tmp_path / "run"
    distill(path, run, settings(limit=2))
    first = stored(run)
    between.asked = []
    with caplog.at_level(logging.INFO, logger="sftkit"):
        grown = distill(path, run, settings())
    assert "2 prompts more than last time" in caplog.text
    assert (grown.samples, len(between.asked)) == (4, 2)
    assert stored(run).join(first, on="key", how="semi").equals(first)

    moved = prompts(tmp_path / "the same elsewhere.jsonl", 4)
    assert distill(moved, run, settings()).new_samples == 0
    for other in (prompts(tmp_path / "fewer.jsonl", 3), prompts(tmp_path / "other.jsonl", 4, first=1)):
        with pytest.raises(UserError, match=rf"holds other prompts: 1 of its 4 are not in .*{other.name}.*What is . plus .\?"):
            distill(other, run, settings())
    limited = distill(path, run, settings(limit=3))  # a limit is a wish for fewer
    assert (limited.samples, limited.new_samples, ledger(run, "distill").height, stored(run).height) == (3, 0, 3, 4)


def test_a_prompt_that_has_samples_stays_when_the_same_one_comes_before_it(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = tmp_path / "p.jsonl", tmp_path / "run"
    question = {"role": "user", "content": "What is 1 plus 1?"}
    path.write_text(json.dumps({"messages": [question]}) + "\n")
    distill(path, run, settings())
    path.write_text(json.dumps({"messages": [question, {"role": "assistant", "content": "2"}]}) + "\n" + path.read_text())
    result = distill(path, run, settings())
    assert (result.new_samples, result.samples, len(between.asked)) == (0, 1, 1)
    assert ledger(run, "prompts")["rule"].to_list() == ["duplicate_prompt", ""]
    assert ledger(run, "distill").height == 1


def test_settings_that_make_no_sense_are_refused(settings: Any) -> None:
    for changes, message in [
        ({"temperature": 0, "k": 2}, "k is 2 at temperature 0: all samples of a prompt would be the same"),
        ({"temperature": -1}, "temperature: expected 0 .greedy. or more, found -1"),
        ({"top_p": 0}, "top_p: expected a share above 0 and up to 1, found 0"),
        ({"k": 0}, "k: expected 1 or more, found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, found 0"),
        ({"max_failed": 1.5}, "max_failed: expected a share between 0 and 1"),
        ({"budget_tokens": 3}, "budget_tokens: expected 12 or more .one answer can take max_new_tokens., found 3"),
        ({"teecher": "x"}, "did you mean 'teacher'"),
    ]:
        with pytest.raises(UserError, match=message):
            settings(**changes)
    assert settings(temperature=0, k=1).k == 1


class Server:
    """An engine that renders for itself, as a server does: it takes messages and has no chat."""

    identity, chat, context_length = "openai:teacher", None, None

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            assert request.prompt_ids == ()
            yield Completion(key=request.key, text=f"{len(request.messages)} {request.seed}", num_tokens=2)

    def close(self) -> None:
        pass


def test_a_server_is_sent_messages_and_keyed_by_them(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    path = prompts(tmp_path / "p.jsonl", 3)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    distill(path, tmp_path / "run", settings(k=2, system="Be brief.", **asked))
    assert [each.messages[0] for each in server.asked] == [{"role": "system", "content": "Be brief."}] * 6
    assert len({each.seed for each in server.asked}) == len({each.key for each in server.asked}) == 6
    assert distill(path, tmp_path / "run", settings(k=2, system="Be brief.", **asked)).new_samples == 0
    distill(path, tmp_path / "other", settings(k=2, **asked))
    assert set(stored(tmp_path / "run")["key"]).isdisjoint(stored(tmp_path / "other")["key"])
    with pytest.raises(UserError, match="thinking: a server renders for itself"):
        distill(path, tmp_path / "thinking", settings(thinking=True, **asked))


def test_a_server_is_told_of_functions_which_decide_the_answer(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"prompt": "What is 1 plus 1?", **more} for more in ({}, {"tools": json.dumps([tool["function"]])}, {"tools": [tool]})]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    assert distill(path, tmp_path / "run", settings(**asked)).rejected == {"duplicate_prompt": 1}
    plain, told = server.asked
    assert (plain.tools, told.tools) == ((), (tool,))
    assert plain.key != told.key
    keyed = sample_key(prompt=plain.messages, model_identity=server.identity, sampling=plain.sampling, index=0)
    assert keyed == plain.key, "samples of prompts without functions are known as before there were any"


def test_thoughts_are_kept_apart_and_put_before_the_answer_when_asked(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = {
        0: {"text": "<think>\nTwo.\n</think>\n\nIt is 2."},
        1: {"text": "It is 2.", "reasoning": "Two."},  # the server keeps them apart
        2: {"text": "It is 2."},
        3: {"text": "Two.</think>It is 2."},  # the template wrote the opening tag
    }

    class Thinking(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for number, request in enumerate(requests):
                yield Completion(key=request.key, num_tokens=9, prompt_tokens=7, **replies[number])

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Thinking())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}, "k": 4}
    path, run = prompts(tmp_path / "p.jsonl", 1), tmp_path / "run"
    distill(path, run, settings(**asked))
    samples = stored(run)
    assert samples["text"].to_list() == ["It is 2."] * 4
    assert samples["reasoning"].to_list() == ["Two.", "Two.", None, "Two."]
    assert samples["prompt_tokens"].to_list() == [7] * 4
    assert [each["messages"][-1]["content"] for each in data_set(run)] == ["It is 2."] * 4
    assert distill(path, run, settings(**asked, reasoning="inline")).new_samples == 0
    inline = "<think>\nTwo.\n</think>\n\nIt is 2."
    assert [each["messages"][-1]["content"] for each in data_set(run)] == [inline, inline, "It is 2.", inline]
    rows = load_rows(Run.open(run), columns=["response"])
    assert rows["response"].to_list() == ["It is 2."] * 4  # scores are of the answer


def test_a_schema_decides_and_the_transformers_engine_refuses_it(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object",\n "properties": {"n": {"type": "integer"}}}')
    config = settings(json_schema=str(path))
    assert config.json_schema == settings(json_schema='{"properties": {"n": {"type": "integer"}}, "type": "object"}').json_schema
    assert sample_key(prompt=[1], model_identity="m", sampling=config.sampling, index=0) != sample_key(
        prompt=[1], model_identity="m", sampling=settings().sampling, index=0
    )
    with pytest.raises(UserError, match=r"json_schema: the transformers engine cannot hold an answer to a schema; take the engine vllm or"):
        distill(prompts(tmp_path / "p.jsonl", 2), tmp_path / "run", config)
    for given, message in [("[1]", "cannot be read"), (str(tmp_path / "none.json"), "cannot be read: No such file"), ("{", "is no JSON")]:
        with pytest.raises(UserError, match=message):
            settings(json_schema=given)


def test_an_engine_that_swallows_a_request_fails_it_by_name(tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from list(super().generate(requests))[1:]

    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Forgetful())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    with pytest.raises(TooManyFailures, match=r"1 of 3 samples failed.*the engine gave no answer"):
        distill(prompts(tmp_path / "p.jsonl", 3), tmp_path / "run", settings(**asked))
    assert stored(tmp_path / "run").height == 2


def test_a_dry_run_probes_fifty_prompts_and_wastes_nothing(tmp_path: Path, settings: Any, between: Between) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 100), tmp_path / "run"
    config = settings(k=2, max_new_tokens=40)
    found = estimate(path, run, config)
    assert (found.wanted, found.stored, found.probed, found.remaining, found.measured) == (200, 0, 50, 150, 50)
    numbers = [int(each.messages[-1]["content"].split()[2]) for each in between.asked]
    assert numbers == list(range(0, 100, 2))
    tokens = stored(run)["num_tokens"]
    assert found.new_tokens == pytest.approx(tokens.mean() * 150)
    assert found.standard_error == pytest.approx(tokens.std() / 50**0.5 * 150)
    assert found.seconds == pytest.approx(found.new_tokens / found.tokens_per_second)
    assert found.prompt_tokens == pytest.approx(len(between.asked[8].prompt_ids) * 150, rel=0.05)
    assert found.probe.cut == (stored(run)["finish_reason"] == "length").sum()
    assert len(found.probe.examples()) == 3

    between.asked = []
    result = distill(path, run, config)
    assert (len(between.asked), result.samples, result.new_samples) == (150, 200, 150)
    assert result.new_tokens == pytest.approx(found.new_tokens, rel=0.15)  # a tiny model, but its lengths vary as a real one's do
    distill(path, tmp_path / "whole", config)
    assert data_set(run) == data_set(tmp_path / "whole")
    after = estimate(path, run, config)
    assert (after.stored, after.probed, after.remaining, after.tokens_per_second) == (200, 0, 0, None)
    assert "to come: 0 samples" in after.summary()


def test_a_dry_run_of_much_work_takes_the_pace_of_a_full_engine(
    tmp_path: Path, settings: Any, between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "SECONDS_OF_PACE", 0.05)
    monkeypatch.setattr(transformers_engine, "WINDOW", 32)  # requests that it takes at once
    path, run = prompts(tmp_path / "p.jsonl", 300), tmp_path / "run"
    config = settings(k=4, max_new_tokens=8, engine={"batch_tokens": 256})
    found = estimate(path, run, config)
    assert found.full
    assert 50 < found.probed == stored(run).height <= 50 + 1150 // 2
    assert found.remaining == 1200 - found.probed
    assert found.seconds == pytest.approx(found.new_tokens / found.tokens_per_second + found.seconds_besides)
    assert "that it ran at for a while, after" in found.summary()
    paced = Counter(each.messages[-1]["content"] for each in between.asked[50:])
    assert max(paced.values()) <= 4
    assert len(set(list(paced)[:20]) & {f"What is {number} plus {number}?" for number in range(20)}) < 20  # not what stands first
    result = distill(path, run, config)
    assert result.new_samples == found.remaining
    assert result.new_tokens == pytest.approx(found.new_tokens, rel=0.15)


def test_answers_without_the_wanted_format_are_noticed_at_once(
    tmp_path: Path, settings: Any, between: Between, caplog: pytest.LogCaptureFixture
) -> None:
    path = prompts(tmp_path / "p.jsonl", 60)
    with caplog.at_level(logging.INFO, logger="sftkit"):
        result = distill(path, tmp_path / "run", settings(want_format="####", engine={"batch_tokens": 256}))
    assert result.samples == 60
    assert result.matched == 0
    assert "0.0% in the wanted format" in result.summary()
    (warning,) = [each.message for each in caplog.records if "in the wanted format '####': ask for it" in each.message]
    assert "only 0.0% of the answers are" in warning
    assert caplog.text.count("prompt: What is") == 3
    assert "of 50 answers" in caplog.text

    between.asked = []
    with pytest.raises(UserError, match=r"stopped after a probe, as stop_below 0\.5 asks: .*'boxed'.*Its answers are kept"):
        distill(path, tmp_path / "stopped", settings(want_format="boxed", stop_below=0.5))
    assert len(between.asked) == stored(tmp_path / "stopped").height == 50
    anything = settings(want_format="(?s).*", stop_below=0.0)
    assert distill(path, tmp_path / "stopped", anything).matched == 60
    with pytest.raises(UserError, match=r"want_format \(by name known: ####, boxed\): '\(' is not a regular expression"):
        settings(want_format="(")


def test_answers_that_do_not_follow_the_schema_are_noticed_at_once(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that knows no schemas leaves them out of account without a word."""
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: Server())
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}, "json_schema": '{"type": "object"}'}
    path = prompts(tmp_path / "p.jsonl", 60)
    distill(path, tmp_path / "run", settings(**asked))
    assert "only 0.0% of the answers are as the JSON schema says: cut ones seldom are, and some servers do not hold" in caplog.text
    with pytest.raises(UserError, match=r"stop_below 0\.9 asks: only 0\.0% of the answers are as the JSON schema says"):
        distill(path, tmp_path / "stopped", settings(stop_below=0.9, **asked))
    caplog.clear()
    distill(path, tmp_path / "numbers", settings(**{**asked, "json_schema": '{"not": {"type": "number"}}'}))
    assert "JSON schema" in caplog.text, "an answer that is no JSON follows no schema"
    with pytest.raises(UserError, match=r"json schema: is not valid at \$\.type: 'objct'"):
        settings(json_schema='{"type": "objct"}')


def test_a_wanted_format_that_would_backtrack_for_years_ends_and_costs_no_sample(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Long(Server):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in super().generate(requests):
                yield replace(each, text="x" * 4000)

    server = Long()
    monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: server)
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    asked = {"teacher": "m", "engine": {"engine": "openai", "base_url": "http://localhost:1/v1"}}
    path, endless = prompts(tmp_path / "p.jsonl", 30), {"want_format": r"(x+x+)+y"}  # which tries all ways to part an answer
    told = r"want_format '.*': took longer than 0\.1 s to search for in a text of 4,000 characters; write it without repeats within"
    with caplog.at_level(logging.INFO, logger="sftkit"):
        result = distill(path, tmp_path / "run", settings(**asked, **endless))
    assert (result.samples, result.matched) == (30, None)
    assert "in the wanted format" not in result.summary()
    warnings = [each.getMessage() for each in caplog.records if re.search(told, each.getMessage())]
    assert [each.partition("want_format")[0] for each in warnings] == [
        "warning: ",
        "warning: the answers in the wanted format were not counted: ",
    ]
    with pytest.raises(UserError, match=rf"stopped after a probe, as stop_below 0 asks: {told}.*Its answers are kept"):
        distill(path, tmp_path / "probed", settings(**asked, **endless, stop_below=0.0))
    assert stored(tmp_path / "probed").height == 30
    assert distill(path, tmp_path / "probed", settings(**asked, want_format="x")).matched == 30
    assert len(server.asked) == 60


@pytest.mark.parametrize(
    ("wanted", "answer", "holds"),
    [
        ("####", "so it is\n#### 42", True),
        ("####", "#### The end", False),
        ("boxed", r"the answer is \boxed{42}", True),
        ("boxed", "42", False),
        (r"^Answer: \w+$", "first\nAnswer: B", True),
    ],
)
def test_what_a_format_is(wanted: str, answer: str, holds: bool) -> None:
    pattern = format_pattern(wanted)
    assert pattern is not None
    assert (pattern.search(answer) is not None) == holds


def test_cache_explain_names_the_fields_that_differ(tmp_path: Path, tiny_model: Path, settings: Any) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 3), tmp_path / "run"
    distill(path, run, settings(k=2))
    (same,) = explain(run, {})
    assert (same.differs, same.samples) == ({}, 6)
    (warmer,) = explain(run, {"temperature": 1.0, "system": "Be brief."})
    assert warmer.differs == {"temperature": (0.8, 1.0), "system": (None, "Be brief.")}
    everything = {"temperature": 0.5, "top_p": 0.5, "max_new_tokens": 9, "seed": 3, "system": "x", "thinking": True, "json_schema": "{}"}
    for name, value in everything.items():
        (changed,) = explain(run, {name: value})
        assert changed.differs == {name: (getattr(settings(), name), value)}
        assert f"{name}: stored" in changed.summary()
    teacher = copy_with_other_weights(tiny_model, tmp_path / "teacher")
    (other,) = explain(run, {"teacher": str(teacher)})
    assert list(other.differs) == ["model"]
    shutil.copytree(tiny_model, tmp_path / "edited")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        if (tmp_path / "edited" / file).exists():
            text = (tmp_path / "edited" / file).read_text()
            (tmp_path / "edited" / file).write_text(text.replace("assistant", "helper"))
    (edited,) = explain(run, {"teacher": str(tmp_path / "edited")})
    assert "template" in edited.differs
    with pytest.raises(UserError, match="is not a run of sftkit"):
        explain(tmp_path, {})


def test_the_commands_say_what_happened(tmp_path: Path, tiny_model: Path) -> None:
    path, run = prompts(tmp_path / "p.jsonl", 70), tmp_path / "run"
    base = [
        "curate",
        "distill",
        str(path),
        "-o",
        str(run),
        "--teacher",
        str(tiny_model),
        "--max-new-tokens",
        "12",
        "--engine",
        "transformers",
    ]

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(sftkit, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    dry = call(*base, "-k", "2", "--dry-run")
    assert "140 samples wanted, 0 were there, 50 probed now and kept" in dry
    assert "to come: 90 samples" in dry
    assert "standard error" in dry
    assert dry.count("prompt: What is") == 3
    done = call(*base, "-k", "2")
    assert "140 of 140 samples of 70 prompts" in done
    assert "new: 90 samples" in done
    assert "cut at the longest length" in done
    assert str(run / "curate" / "dataset.jsonl") in done
    assert "new: none, everything that was asked for is there" in call(*base, "-k", "2")
    assert "140 samples of" in (told := call("curate", "cache", "explain", str(run), "--temperature", "1.0"))
    assert "temperature: stored 0.8, asked 1.0" in told
    assert "nothing differs" in call("curate", "cache", "explain", str(run))
    assert "140 samples" in call("curate", "cache", "export", str(run), "-o", str(tmp_path / "samples.parquet"))
    assert pl.read_parquet(tmp_path / "samples.parquet").height == 140


def test_a_config_file_speaks_below_the_options(tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "distill.yaml"
    config.write_text(f"teacher: {tiny_model}\nk: 3\nmax_new_tokens: 9\nengine:\n  dtype: float32\n")
    arguments = ["curate", "distill", str(prompts(tmp_path / "p.jsonl", 2)), "-o", str(tmp_path / "run"), "--config", str(config)]
    result = CliRunner().invoke(sftkit, [*arguments, "-k", "2", "--engine", "transformers"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    section = Run.open(tmp_path / "run").config()["distill"]
    assert (section["k"], section["max_new_tokens"]) == (2, 9)
    assert (section["engine"]["engine"], section["engine"]["dtype"]) == ("transformers", "float32")


def test_a_prompt_that_kills_the_engine_fails_and_the_run_finishes(
    tmp_path: Path, tiny_model: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines run in processes of their own, which die at one of the prompts each time."""
    path, run = tmp_path / "p.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"prompt": "~" if number == 7 else f"number {number}"}) + "\n" for number in range(40)))
    model = resolve_model(str(tiny_model))
    ids = [load_chat(model).prompt([{"role": "user", "content": text}]) for text in ("~", "number 1")]
    (tmp_path / "poison").write_text(f"kill {next(iter({*ids[0]}.difference(ids[1])))}")
    monkeypatch.setenv("SFTKIT_TEST_POISON", str(tmp_path / "poison"))
    monkeypatch.setenv("SFTKIT_TEST_IDENTITY", model_identity(model))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "core"))

    def open_poisoned(model: str, config: EngineConfig, revision: str | None) -> Replicas:
        return Replicas("poisoned_engine", model, config, revision=revision, chat=None)

    monkeypatch.setattr(distill_module, "open_engine", open_poisoned)
    result = distill(path, run, settings(k=2, engine={"replicas": 2}, max_failed=0.1))
    assert (result.samples, sum(result.failed.values())) == (78, 2)
    failed = ledger(run, "distill").filter(pl.col("action") == "failed")
    assert failed["example_id"].n_unique() == 1
    assert all("the engine was killed (SIGKILL) each of the" in rule for rule in failed["rule"])
    assert len(data_set(run)) == stored(run).height == 78
