"""What a model says as scores: grades and tags; what cannot be read is a row without a value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.run import Run
from sftkit.curate.config import ScoreConfig
from sftkit.curate.judge_scores import read_tags
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
