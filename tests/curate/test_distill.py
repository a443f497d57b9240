"""A distillation keeps what it has, whatever changes, fails or interrupts; every row has its place in the ledger."""

import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from sftkit.core.chat import load_chat
from sftkit.core.engines.base import Completion, EngineConfig, Request
from sftkit.core.engines.replicas import Replicas
from sftkit.core.errors import TooManyFailures, UserError
from sftkit.core.example import Decision
from sftkit.core.models import model_identity, resolve_model
from sftkit.core.run import Run
from sftkit.core.store import SampleStore
from sftkit.curate import distill as distill_module
from sftkit.curate.best import best
from sftkit.curate.cache import explain
from sftkit.curate.decide_config import BestConfig
from sftkit.curate.distill import distill
from sftkit.curate.rows import load_rows
from sftkit.curate.show import show

from .teachers import Between, Server, copy_with_other_weights, data_set, ledger, prompts, stored


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
    assert show(run, rejected="error", console=Console(file=(told := io.StringIO()), width=80)) == 2
    assert (
        told.getvalue().count("user: What is 3 plus 3?") == told.getvalue().count("failed by error: timed out after 60 s in distill") == 2
    )

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
