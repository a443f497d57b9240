"""The law of conservation, the order of stages, and what the ledger says about a row."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.example import Decision
from sftkit.core.ledger import SCHEMA, ConservationError, Ledger, RowKey, check_conservation

ROWS: list[RowKey] = [("a1", 0), ("a1", 1), ("b2", None)]


def kept(stage: str, rows: Sequence[RowKey] = ROWS) -> list[Decision]:
    return [Decision(*row, stage, "kept") for row in rows]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.parquet")


def test_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.read().schema == pl.Schema(SCHEMA)
    assert ledger.stages() == []
    assert ledger.summary().is_empty()
    assert not ledger.holds("import", [])


def test_what_is_recorded_reads_back(ledger: Ledger) -> None:
    decisions = [
        Decision("a1", 0, "filter", "kept"),
        Decision("a1", 1, "filter", "rejected", "max_words", 120.0, 100.0),
        Decision("b2", None, "filter", "failed", "error: timeout", witness_id="a1/0"),
    ]
    assert ledger.record("filter", ROWS, decisions) == []
    assert ledger.read().rows() == [
        (0, "filter", "a1", 0, "kept", "", None, None, None),
        (0, "filter", "a1", 1, "rejected", "max_words", 120.0, 100.0, None),
        (0, "filter", "b2", None, "failed", "error: timeout", None, None, "a1/0"),
    ]
    assert ledger.summary().sort("action").select("action", "rule", "rows").rows() == [
        ("failed", "error: timeout", 1),
        ("kept", "", 1),
        ("rejected", "max_words", 1),
    ]


@pytest.mark.parametrize(
    ("decisions", "told"),
    [
        (kept("s", ROWS[:2]), "'lost': ['b2']"),
        (kept("s", [*ROWS, ("c3", 4)]), "'invented': ['c3/4']"),
        (kept("s", [*ROWS, ROWS[0]]), "'repeated': ['a1/0']"),
        (kept("s", [ROWS[0], ROWS[2], ("a1", None)]), "'lost': ['a1/1'], 'invented': ['a1']"),
        ([*kept("s", ROWS[:2]), Decision("b2", None, "s", "rejected")], "b2 was rejected without a rule"),
        ([*kept("s", ROWS[:2]), Decision("b2", None, "other", "kept")], "carries the stage 'other'"),
        ([*kept("s", ROWS[:2]), Decision("b2", None, "s", None)], "b2 was None, which is none of kept"),  # type: ignore[arg-type]
    ],
)
def test_a_row_that_goes_missing_is_named(decisions: list[Decision], told: str, ledger: Ledger) -> None:
    ledger.record("before", ROWS, kept("before"))
    with pytest.raises(ConservationError) as error:
        ledger.record("s", ROWS, decisions)
    assert told in str(error.value)
    assert str(error.value).startswith("s: ")
    assert ledger.stages() == ["before"], "nothing of a broken stage is written"


def test_an_input_with_a_row_twice_is_a_fault_too() -> None:
    with pytest.raises(ConservationError, match=r"'repeated': \['b2'\]"):
        check_conservation("s", [*ROWS, ROWS[2]], kept("s", [*ROWS, ROWS[2]]))


def test_recording_a_stage_again_makes_the_later_ones_void(ledger: Ledger) -> None:
    for stage in ("import", "filter", "dedup", "select"):
        assert ledger.record(stage, ROWS, kept(stage)) == []
    assert ledger.stages() == ["import", "filter", "dedup", "select"]
    assert ledger.record("filter", ROWS, [Decision(*ROWS[0], "filter", "rejected", "empty"), *kept("filter", ROWS[1:])]) == [
        "dedup",
        "select",
    ]
    assert ledger.stages() == ["import", "filter"]
    assert ledger.read().filter(pl.col("stage") == "filter")["action"].to_list() == ["rejected", "kept", "kept"]
    assert ledger.record("select", ROWS[1:], kept("select", ROWS[1:])) == []
    assert ledger.read().select("stage", "step").unique().sort("step").rows() == [("import", 0), ("filter", 1), ("select", 2)]


def test_it_says_whether_decisions_stand_there_already(ledger: Ledger) -> None:
    decisions = [*kept("s", ROWS[:2]), Decision("b2", None, "s", "rejected", "max_words", 120, 100)]
    assert not ledger.holds("s", decisions)
    ledger.record("s", ROWS, decisions)
    ledger.record("later", ROWS[:2], kept("later", ROWS[:2]))
    assert ledger.holds("s", decisions)
    assert not ledger.holds("s", decisions[:2])
    assert not ledger.holds("s", [*decisions[:2], Decision("b2", None, "s", "rejected", "max_words", 121, 100)])
    assert not ledger.holds("s", decisions[::-1]), "the order is that of the rows"
    assert not ledger.holds("later", decisions)


def test_why_takes_an_id_its_beginning_or_one_sample(ledger: Ledger) -> None:
    rows: list[RowKey] = [("abcd", 0), ("abcd", 1), ("abcd~2", 0), ("abff", None)]
    ledger.record("distill", rows, kept("distill", rows))
    ledger.record("best", rows, [Decision("abcd", 0, "best", "rejected", "lower_score", 0.0, 1.0, "abcd/1"), *kept("best", rows[1:])])

    def decided(wanted: str) -> list[tuple[str, str, int | None, str]]:
        return ledger.why(wanted).select("stage", "example_id", "sample_index", "action").rows()

    assert decided("abff") == [("distill", "abff", None, "kept"), ("best", "abff", None, "kept")]
    assert decided("abf") == decided("abff")
    assert decided("abcd/0") == [("distill", "abcd", 0, "kept"), ("best", "abcd", 0, "rejected")]
    assert [row[2] for row in decided("abcd")] == [0, 1, 0, 1], "an id that is one stands for itself, though another begins with it"
    assert decided("abcd~") == decided("abcd~2")
    for wanted, told in (
        ("ab", "ab is the beginning of 3 ids: give more of it, as abcd"),
        ("x", "no decision about 'x'; ids stand in curate/dataset.jsonl"),
        ("abcd/7", "no decision about 'abcd/7'"),
    ):
        with pytest.raises(UserError) as error:
            ledger.why(wanted)
        assert told in str(error.value)
