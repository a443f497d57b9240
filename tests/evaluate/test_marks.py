"""Marks into metrics: means with intervals, paired comparisons, pass at k, majorities."""

from dataclasses import replace

import pytest
from sftkit.core.statistics import paired_difference, pass_at_k
from sftkit.evaluate.marks import adjust, compare_marks, measure
from sftkit.evaluate.tasks.base import Mark

DRAWN = {"resamples": 1000, "seed": 0}


def marks(*values: float) -> list[list[dict[str, Mark]]]:
    return [[{"m": Mark(value, answer=str(value))}] for value in values]


def test_five_questions_with_scores_are_too_few_to_find_any_difference() -> None:
    one, other = marks(0.1, 0.5, 0.2, 0.9, 0.4, 0.3), marks(0.3, 0.6, 0.5, 1.0, 0.5, 0.9)
    for n, enough in ((5, False), (6, True)):
        (found,) = compare_marks("t", "m", {"a": one[:n], "b": other[:n]}, [("a", "b")], [None] * n, DRAWN)
        assert (found.p_value <= 0.05, found.detectable is not None) == (enough, enough)


def test_questions_that_share_a_subject_count_less() -> None:
    values = [1.0] * 20 + [0.0] * 20
    alone = measure(marks(*values), "m", [None] * 40, DRAWN)
    together = measure(marks(*values), "m", [f"subject {number // 10}" for number in range(40)], DRAWN)
    assert alone.interval is not None
    assert together.interval is not None
    assert (alone.mean, together.mean, together.clusters) == (0.5, 0.5, 4)
    assert together.interval.high - together.interval.low > 1.5 * (alone.interval.high - alone.interval.low)
    same = measure(marks(*[1.0] * 40), "m", [f"subject {number // 10}" for number in range(40)], DRAWN)
    assert same.interval is not None
    assert same.interval.low < 0.6  # of four subjects
    one = measure(marks(1.0, 0.5), "m", ["subject", "subject"], DRAWN)
    assert one.interval is None


def test_where_all_subjects_are_alike_the_difference_is_not_certain() -> None:
    groups = [f"subject {number // 4}" for number in range(40)]
    for second, better in ((0.0, 0), (1.0, 10)):
        compared = compare_marks("t", "m", {"a": marks(*[0.0] * 40), "b": marks(*[second] * 40)}, [("a", "b")], groups, DRAWN)
        assert compared[0].interval == paired_difference(0, better, 10)  # of ten subjects
        assert compared[0].detectable is not None
        assert "nan" not in compared[0].told()


def test_where_all_scores_are_alike_they_are_not_certain() -> None:
    for values, groups in (([0.6] * 7, [None] * 7), ([1.0, 0.0] * 7, [f"subject {number // 2}" for number in range(14)])):
        found = measure(marks(*values), "m", groups, DRAWN)
        assert found.interval is not None
        assert (found.interval.low < found.mean - 0.1, found.interval.high > found.mean + 0.1) == (True, True)
    pairs = [f"subject {number // 2}" for number in range(14)]
    (compared,) = compare_marks("t", "m", {"a": marks(*[0.0] * 14), "b": marks(*[1.0, 0.0] * 7)}, [("a", "b")], pairs, DRAWN)
    assert compared.interval == paired_difference(0, 4, 7)


def test_comparisons_are_paired_and_adjusted_over_tasks() -> None:
    first, second = marks(*[0.0] * 30), marks(*[1.0] * 10, *[0.0] * 20)
    compared = compare_marks("t", "m", {"a": first, "b": second, "c": first}, [("a", "b"), ("a", "c")], [None] * 30, DRAWN)
    assert compared[0].p_value == pytest.approx(2 / 2**10)
    assert compared[1].p_value == 1.0
    scored = compare_marks("t", "m", {"a": marks(0.1, 0.2, 0.3), "b": marks(0.2, 0.3, 0.4)}, [("a", "b")], [None] * 3, DRAWN)
    assert scored[0].p_value == pytest.approx(0.25)
    assert scored[0].difference == pytest.approx(0.1)
    assert replace(compared[0], model="a-b", difference=-0.1).told().startswith("a-b − a: m −10.0 points (95 % ")
    assert adjust([]) == []


@pytest.mark.parametrize(
    ("n", "correct", "k", "value"), [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (5, 3, 3, 1.0), (2, 1, 2, 1.0)]
)
def test_pass_at_k(n: int, correct: int, k: int, value: float) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(value)


def majority(items: list[list[dict[str, Mark]]]) -> float | None:
    found = measure(items, "m", [None] * len(items), DRAWN).majority
    return found and found.value


def test_the_majority_answers_and_ties_are_shared() -> None:
    item = [{"m": Mark(1.0, True, "1")}, {"m": Mark(0.0, True, "2")}, {"m": Mark(1.0, True, "1")}]
    tied = [{"m": Mark(1.0, True, "1")}, {"m": Mark(0.0, True, "2")}, {"m": Mark(0.0, False)}]
    silent = [{"m": Mark(0.0, False)}] * 3
    assert majority([item]) == 1.0
    assert majority([tied]) == 0.5
    assert majority([silent, item]) == 0.5
    assert majority([[{"m": Mark(value, True, "ended", False)} for value in (1.0, 0.0, 1.0)]]) is None  # how programs ended
