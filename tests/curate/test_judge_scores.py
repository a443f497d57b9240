"""What a model says as scores: grades and tags; what cannot be read is a row without a value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.run import Run
from sftkit.curate.config import ScoreConfig
from sftkit.curate.judge_scores import in_a_circle, read_tags
from sftkit.curate.score import score

ToyRun = Callable[..., Run]


def options(model: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "dtype": "float32", "device": "cpu", **more}


def column(run: Run, **scorers: Any) -> dict[str, list[tuple[float | None, str]]]:
    return {name: list(frame.select("value", "detail").iter_rows()) for name, frame in score(run, ScoreConfig(scorers=scorers)).items()}


def test_a_judge_grades_rows_and_what_it_cannot_grade_fails_alone(
    toy_run: ToyRun, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftkit.core.judge.LEAST_MASS", 0.0)  # of a model of random weights
    run = toy_run([{"prompt": "a", "response": "b"}, {"prompt": "c"}, {"prompt": "d", "response": "word " * 9999}])
    found = column(
        run, judge=options(tiny_model, rubric="correctness", scale="5"), read={"scorer": "judge", **options(tiny_model, parse=True)}
    )
    assert 1 < (found["judge"][0][0] or 0) < 5
    questions = column(run, judge=options(tiny_model, rubric="complexity"))["judge"]
    assert all(value is not None for value, _ in questions)  # of the question alone: an answer is not needed, nor too long
    assert found["judge"][1] == (None, "no response")
    assert "do not fit the context" in found["judge"][2][1]
    assert found["read"][0][0] is None
    assert found["read"][0][1].startswith("not a number from 1 to 6: ")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('["Poem", "rhyme  scheme", "poem"]', (2.0, "poem; rhyme scheme")),
        ('Thinking of ["a"], I say:\n```json\n["b", "c"]\n```', (2.0, "b; c")),
        ("poem, rhyme", (None, "not a list of tags: 'poem, rhyme'")),
        ("[1, 2]", (None, "not a list of tags: '[1, 2]'")),
        ("[]", (None, "not a list of tags: '[]'")),
    ],
)
def test_tags_are_read(written: str, expected: tuple[float | None, str]) -> None:
    assert read_tags(written) == expected


def test_a_model_that_writes_no_tags_leaves_the_row_without_a_value(toy_run: ToyRun, tiny_model: Path) -> None:
    ((value, detail),) = column(toy_run([{"prompt": "Write {a} poem"}]), tags=options(tiny_model))["tags"]
    assert value is None
    assert detail.startswith("not a list of tags: ")


def test_everybody_meets_as_many_and_nobody_twice() -> None:
    assert in_a_circle([7], 3) == []
    assert in_a_circle([7, 8], 3) == [(7, 8)]
    for count in range(2, 12):
        for opponents in range(1, 6):
            pairs = in_a_circle(range(count), opponents)
            assert len({frozenset(pair) for pair in pairs}) == len(pairs)
            times = [sum(number in pair for pair in pairs) for number in range(count)]
            assert set(times) == {min(2 * opponents, count - 1)}


def test_answers_to_a_prompt_are_compared_with_one_another(toy_run: ToyRun, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.core.judge.LEAST_MASS", 0.0)
    rows = [{"id": "q", "index": index, "prompt": "What is 1+1?", "response": text} for index, text in enumerate(("2", "3", "the sea"))]
    run = toy_run([*rows, {"id": "alone", "prompt": "b", "response": "c"}, {"id": "mute", "prompt": "What is 1+1?"}])
    found = column(run, pairwise=options(tiny_model))["pairwise"]
    assert found[3:] == [(None, "no other answer to its prompt"), (None, "no response")]
    shares = [value for value, _ in found[:3]]
    assert sum(value for value in shares if value is not None) == pytest.approx(1.5)  # three meetings, each worth one
    for value, detail in found[:3]:
        won, tied, lost = (int(each.split()[0]) for each in detail.split(", "))
        assert won + tied + lost == 2
        assert value == (won + tied / 2) / 2
    said = column(run, pairwise=options(tiny_model, parse=True))["pairwise"]
    assert all(value is None and detail.startswith("not a verdict: ") for value, detail in said[:3])
