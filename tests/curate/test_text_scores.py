"""Statistics as scores: the numbers that the filter's rules measure, neighbours equal to brute force, clusters by their seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import embed
from sftkit.curate.config import ScoreConfig
from sftkit.curate.decide_config import FilterConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.score import parse_scorers, score, summary
from sftkit.curate.similarity import exact_cosines, unit_vectors

ToyRun = Callable[..., Run]


def column(run: Run, *texts: str) -> dict[str, list[tuple[float | None, str]]]:
    scorers = parse_scorers(list(texts))
    return {name: list(frame.select("value", "detail").iter_rows()) for name, frame in score(run, ScoreConfig(scorers=scorers)).items()}


def test_language_is_a_number_and_its_name(toy_run: ToyRun) -> None:
    run = toy_run(
        [
            {"prompt": str(n), "response": text}
            for n, text in enumerate(["請用繁體中文說明", "请用简体中文说明", "The cat sat on the mat.", "42", None])
        ]
    )
    found = column(run, "language", "language:wanted=zh-Hant,name=traditional", "language:wanted=zh,name=chinese")
    assert [detail for _, detail in found["language"]] == ["zh-Hant", "zh-Hans", "en", "no language is clear", "no response"]
    assert [value for value, _ in found["traditional"]] == [1, 0, 0, None, None]
    assert [value for value, _ in found["chinese"]] == [1, 1, 0, None, None]


def test_a_summary_names_the_few_things_that_were_found(toy_run: ToyRun) -> None:
    texts = ["請用繁體中文說明", "The cat sat on the mat.", "42"] * 2 + ["The dog lay on the mat."] * 3
    run = toy_run([{"prompt": str(n), "response": text} for n, text in enumerate(texts)])
    (frame,) = score(run, ScoreConfig(scorers={"language": {}})).values()
    assert summary("language", frame).splitlines()[1] == "  5 en, 2 no language is clear, 2 zh-Hant"


def test_repetition_refusal_and_truncation_are_what_the_filter_measures(
    toy_run: ToyRun, rejections: Callable[[Run, str], dict[str, tuple[str, float | None, float | None, str | None]]]
) -> None:
    texts = [
        "one two three four five six seven eight nine ten " * 8,
        "yes it is so " * 30,
        "I'm sorry, but I can't help with that.",
        "A sound answer.",
    ]
    rows = [{"id": f"r{n}", "prompt": str(n), "response": text, "finish_reason": "stop"} for n, text in enumerate(texts)]
    run = toy_run(
        [
            *rows,
            {"id": "cut", "prompt": "c", "response": "It was", "finish_reason": "length"},
            {"id": "x", "prompt": "d", "response": "It is"},
        ]
    )
    found = column(run, "repetition", "refusal", "truncated")
    assert list(found) == ["repetition", "top_ngram", "refusal", "truncated"]
    filter_rows(run, FilterConfig())
    rejected = rejections(run, "filter")
    assert rejected["r0"][:2] == ("repetition:duplicate_ngrams", found["repetition"][0][0])
    assert found["top_ngram"][1][0] == 1.0
    assert [value for value, _ in found["refusal"]] == [0, 0, 1, 0, 0, 0]
    assert found["refusal"][2][1].startswith("I'm sorry")
    assert rejected["r2"][0] == "refusal"
    assert [value for value, _ in found["truncated"]] == [0, 0, 0, 0, 1, None]
    assert rejected["cut"][0] == "truncated"
    assert found["repetition"][3] == (0.0, "")


@pytest.fixture
def toy_vectors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let embed_rows give vectors of our choice: what is asked of an embedder is tested elsewhere."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(embed, "embed_rows", lambda run, rows, on, config: told["vectors"][: len(rows)])
    return told


def test_the_neighbour_is_that_of_brute_force(toy_run: ToyRun, toy_vectors: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftkit.curate.similarity.BLOCK", 7)
    monkeypatch.setattr("sftkit.curate.similarity.TILE", 11)
    random = np.random.default_rng(0)
    vectors = unit_vectors(random.normal(size=(40, 6)))
    vectors[[5, 17, 30]] = vectors[5]  # three alike: the first of the others counts
    toy_vectors["vectors"] = vectors
    run = toy_run([{"id": f"r{n}", "prompt": str(n), "response": "a"} for n in range(40)])
    found = column(run, "neighbour")["neighbour"]
    for row in range(40):
        others = np.array([each for each in range(40) if each != row])
        cosines = exact_cosines(vectors, np.full(39, row), others)
        assert found[row] == (cosines.max(), f"r{others[int(np.argmax(cosines))]}")
    assert [found[row][1] for row in (5, 17, 30)] == ["r17", "r5", "r5"]


def test_one_row_has_no_neighbour(toy_run: ToyRun, toy_vectors: dict[str, Any]) -> None:
    toy_vectors["vectors"] = unit_vectors([[1.0, 0.0]])
    run = toy_run([{"prompt": "a", "response": "b"}])
    assert column(run, "neighbour", "cluster") == {"neighbour": [(None, "there is no other row")], "cluster": [(0.0, "")]}


def test_clusters_are_those_of_the_vectors_and_follow_the_seed(toy_run: ToyRun, toy_vectors: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    group = np.arange(60) % 3
    toy_vectors["vectors"] = unit_vectors(np.eye(3)[group] + random.normal(scale=0.05, size=(60, 3)))
    run = toy_run([{"prompt": str(n), "response": "a"} for n in range(60)])
    found = column(run, "cluster:clusters=3", "cluster:clusters=3,name=again", "cluster:clusters=3,seed=4,name=other")
    labels = np.array([value for value, _ in found["cluster"]])
    assert all(len(set(labels[group == each])) == 1 for each in range(3))
    assert len(set(labels)) == 3
    assert found["again"] == found["cluster"]
    assert len({value for value, _ in found["other"]}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neighbour:on=answer", "unknown value for on 'answer'"),
        ("cluster:clusters=few", "clusters: expected a whole number, found 'few'"),
    ],
)
def test_wrong_options(toy_run: ToyRun, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        column(toy_run([{"prompt": "a", "response": "b"}]), text)
