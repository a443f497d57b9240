"""Verifiers as scores: formulas, JSON, instructions and programs, each with the reason where it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.checks import sandbox
from sftkit.core.checks.code import Verdict
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import verifiers
from sftkit.curate.config import ScoreConfig
from sftkit.curate.score import parse_scorers, score

ToyRun = Callable[..., Run]


def column(run: Run, *texts: str) -> list[tuple[float | None, str]]:
    (frame,) = score(run, ScoreConfig(scorers=parse_scorers(list(texts)))).values()
    return list(frame.select("value", "detail").iter_rows())


def test_formulas_that_are_equal_count_as_equal(toy_run: ToyRun) -> None:
    pytest.importorskip("math_verify")
    pairs = [("so it is $\\frac{2}{4}$", "1/2"), ("$x = 0.5$", "\\frac12"), ("I get $3$", "4"), ("no idea", "4"), ("it is 4", None)]
    found = column(toy_run([{"prompt": str(n), "response": text, "reference": gold} for n, (text, gold) in enumerate(pairs)]), "math")
    assert [value for value, _ in found] == [1, 1, 0, 0, None]
    assert found[4][1] == "no reference"


def test_json_is_held_against_a_schema(toy_run: ToyRun, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    texts = ['{"age": 7}', 'Here:\n```json\n{"age": 8}\n```', '{"age": "old"}', "seven", '{"age": 7, "size": NaN}']
    rows: list[dict[str, Any]] = [{"prompt": str(n), "response": text, "meta": {"own": schema}} for n, text in enumerate(texts)]
    run = toy_run([*rows, {"prompt": "x", "response": "{}"}])
    found = column(run, f"json_schema:schema={tmp_path / 'schema.json'}")
    assert [value for value, _ in found] == [1, 1, 0, 0, 0, 0]
    assert found[4][1] == "not JSON: NaN is no number of JSON"
    assert "'old' is not of type 'integer'" in found[2][1]
    assert found[3][1].startswith("not JSON")
    own = column(run, "json_schema:column=own")
    assert own == [*found[:5], (None, "no schema in the column 'own'")]
    (tmp_path / "wrong.json").write_text('{"type": "objct"}')
    with pytest.raises(UserError, match="json schema: is not valid at"):
        column(run, f"json_schema:schema={tmp_path / 'wrong.json'}")
    with pytest.raises(UserError, match="needs schema=FILE"):
        column(run, "json_schema")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        column(run, "json_schema:schema=nowhere.json")


def test_instructions_are_counted_and_those_not_followed_named(toy_run: ToyRun) -> None:
    wanted = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 3}],
    }
    texts = ["one two three", "one, two", "one two, three"]
    run = toy_run(
        [*({"prompt": str(n), "response": text, "meta": wanted} for n, text in enumerate(texts)), {"prompt": "x", "response": "y"}]
    )
    assert column(run, "ifeval") == [
        (1.0, ""),
        (0.0, "punctuation:no_comma, length_constraints:number_words"),
        (0.5, "punctuation:no_comma"),
        (None, "no instructions in the column 'instruction_id_list'"),
    ]


PROGRAMS = {
    "right": "```python\ndef add(a, b):\n    return a + b\n```",
    "wrong": "def add(a, b):\n    return a - b\n",
    "none": "I would add them.",
}
CHECKS = {"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}


def test_programs_are_run_against_tests_once(toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        sandbox.run([sandbox.Order("pass")])
    except UserError as error:
        pytest.skip(str(error))
    rows: list[dict[str, Any]] = [{"prompt": name, "response": text, "meta": CHECKS} for name, text in PROGRAMS.items()]
    run = toy_run([*rows, {"prompt": "untested", "response": "x = 1"}, {"prompt": "unanswered", "meta": CHECKS}])
    found = column(run, "unit_test")
    assert [value for value, _ in found] == [1, 0, 0, None, None]
    assert found[0][1] == ""
    assert found[1][1].startswith("wrong")
    assert [detail for _, detail in found[3:]] == ["no tests in the column 'test'", "no response"]
    monkeypatch.setattr("sftkit.curate.verifiers.run_tests", lambda *_, **__: pytest.fail("a program was run again"))
    assert column(run, "unit_test") == found


def test_without_a_sandbox_nothing_is_run_unless_it_is_asked_for(toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_mode", lambda: (None, "bubblewrap is not installed"))
    run = toy_run([{"prompt": name, "response": text, "meta": CHECKS} for name, text in PROGRAMS.items()])
    with pytest.raises(UserError, match="untrusted programs are not run: bubblewrap is not installed"):
        column(run, "unit_test")
    assert [value for value, _ in column(run, "unit_test:unsafe=true")] == [1, 0, 0]


@pytest.mark.parametrize(("seconds", "clock"), [(1, 30.0), (10, 30.0), (120, 360.0)])
def test_a_program_that_may_compute_for_long_is_not_ended_by_the_clock(
    seconds: int, clock: float, toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noted(*_: Any, limits: sandbox.Limits, **__: Any) -> Verdict:
        given.append((limits.cpu_seconds, limits.seconds))
        return Verdict(True, "passed")

    monkeypatch.setattr("sftkit.curate.verifiers.run_tests", noted)
    column(toy_run([{"prompt": "a", "response": PROGRAMS["right"], "meta": CHECKS}]), f"unit_test:seconds={seconds}")
    assert given == [(seconds, clock)]


def test_one_check_that_breaks_harms_no_other() -> None:
    def call(name: str) -> str:
        if name == "bad":
            raise RuntimeError("broken")
        return name

    found = dict(verifiers._run_all({str(number): ("bad" if number == 5 else "good",) for number in range(40)}, call))
    assert len(found) == 40
    assert str(found["5"]) == "broken"
    assert sum(value == "good" for value in found.values()) == 39
