"""What is held out is chosen by its content, leaves with all its answers, and is in no data set afterwards."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sftkit.core.errors import UserError
from sftkit.core.ledger import Ledger
from sftkit.core.run import Run
from sftkit.curate.build import build
from sftkit.curate.config import BuildConfig
from sftkit.curate.decide_config import FilterConfig, HeldoutConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.heldout import hold_out


def ids(run: Run, name: str) -> list[str]:
    return [json.loads(line)["id"] for line in (run.path / "curate" / name).read_text().splitlines()]


def rows(prompts: range, k: int = 2) -> list[dict[str, object]]:
    return [{"prompt": f"q{n}", "response": f"a{n}{index}", "index": index} for n in prompts for index in range(k)]


def test_whole_prompts_are_held_out(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = toy_run(rows(range(20)))
    outcome = hold_out(run, HeldoutConfig(prompts=5))
    held, left = ids(run, "heldout.jsonl"), ids(run, "dataset.jsonl")
    assert (len(held), len(left), outcome.removed) == (10, 30, {"heldout": 10})
    assert not {each.split("/")[0] for each in held} & {each.split("/")[0] for each in left}
    assert rejections(run, "heldout") == dict.fromkeys(held, ("heldout", None, None, None))


def test_other_rows_do_not_move_a_prompt(toy_run: Callable[..., Run]) -> None:
    held, all_ids = {}, {}
    for name, prompts in (("few", range(20)), ("back", range(19, -1, -1)), ("more", range(40))):
        run = toy_run(rows(prompts), name=name)
        all_ids[name] = set(ids(run, "dataset.jsonl"))
        hold_out(run, HeldoutConfig(prompts=10))
        held[name] = set(ids(run, "heldout.jsonl"))
    assert held["back"] == held["few"]
    assert held["more"] & all_ids["few"] <= held["few"]


def test_answers_that_were_imported_each_by_itself_leave_together(toy_run: Callable[..., Run]) -> None:
    """Each is a conversation of its own, with an id of its own: the prompt would be trained on that it is tested on."""
    run = toy_run([{**each, "index": None} for each in rows(range(20))])
    hold_out(run, HeldoutConfig(prompts=5))
    asked = [
        {json.loads(line)["messages"][0]["content"] for line in (run.path / "curate" / name).read_text().splitlines()}
        for name in ("heldout.jsonl", "dataset.jsonl")
    ]
    assert [len(each) for each in asked] == [5, 15]
    assert not asked[0] & asked[1]
    assert len(ids(run, "heldout.jsonl")) == 10


def test_conversations_without_a_prompt_are_not_one(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"messages": [{"role": "assistant", "content": f"a{n}"}], "id": f"{n:016x}"} for n in range(10)])
    assert hold_out(run, HeldoutConfig(prompts=3)).removed == {"heldout": 3}


def test_something_has_to_be_left(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="5 prompts are left, too few to hold out 5"):
        hold_out(toy_run(rows(range(5))), HeldoutConfig(prompts=5))


def test_rows_that_are_in_the_data_set_again_are_not_left_as_held_out(toy_run: Callable[..., Run]) -> None:
    run = toy_run(rows(range(20)))
    hold_out(run, HeldoutConfig(prompts=5))
    filter_rows(run, FilterConfig(where=("sample_index == 0",)))
    assert (run.path / "curate" / "heldout.jsonl").exists()  # a step after it leaves it be
    run.close()
    build(None, run.path, BuildConfig(decontaminate=None, dedup=None, filter=FilterConfig()))
    assert len(ids(run, "dataset.jsonl")) == 40
    assert not (run.path / "curate" / "heldout.jsonl").exists()


def test_killed_as_it_is_decided_anew_no_held_out_row_is_in_the_data_set(
    toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(rows(range(20)))
    filter_rows(run, FilterConfig())
    hold_out(run, HeldoutConfig(prompts=5))
    with monkeypatch.context() as patch:

        def killed(ledger: Ledger, *given: Any) -> None:
            enter(ledger, *given)
            raise KeyboardInterrupt

        enter = Ledger.record
        patch.setattr(Ledger, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            filter_rows(run, FilterConfig(where=("sample_index == 0",)))
    filter_rows(run, FilterConfig(where=("sample_index == 0",)))
    assert len(ids(run, "dataset.jsonl")) == 20
    assert not (run.path / "curate" / "heldout.jsonl").exists()
