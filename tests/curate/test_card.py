"""The data-set card: where rows come from, what removed the others, what benchmarks were found, and what the rows are like."""

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.decide_config import DecontaminateConfig, FilterConfig
from sftkit.curate.decontaminate import decontaminate
from sftkit.curate.embed import embedded_text, stored_vectors
from sftkit.curate.filters import filter_rows
from sftkit.curate.plots import histogram, scatter, two_directions
from sftkit.curate.rows import load_rows, row_ids

QUESTION = "A shepherd counts 48 sheep in the morning and half as many again in the evening, how many does he count altogether?"


def card(run: Run) -> str:
    return (run.path / "curate" / "README.md").read_text(encoding="utf-8")


def bars(path: Path, colour: str) -> list[float]:
    return [float(each.attrib["height"]) for each in ElementTree.parse(path).getroot() if each.attrib.get("fill") == colour]


def test_the_card_shows_lengths_and_what_benchmarks_were_found(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {place} | {place}", "response": "word " * (place + 1), "num_tokens": place + 1} for place in range(20)]
    run = toy_run([*rows, {"prompt": QUESTION, "response": "72", "num_tokens": 1}])
    test_set = tmp_path / "mine.jsonl"
    test_set.write_text(json.dumps({"prompt": QUESTION}) + "\n")
    filter_rows(run, FilterConfig(repetition=False, min_words=2))
    assert "## Benchmarks" not in card(run), "nothing was looked for yet"
    filter_rows(run, FilterConfig(repetition=False, where=("num_tokens < 16",)))
    decontaminate(run, DecontaminateConfig(benchmarks=(str(test_set),)))
    text = card(run)
    assert "| filter | 21 | 16 | num_tokens < 16 5 |" in text
    assert "| decontaminate | 16 | 15 | contaminated:mine 1 |" in text
    assert "| mine | 1 | 1 | 22 words |" in text
    assert "![Lengths of the answers in tokens: grey all rows, blue those kept](lengths.svg)" in text
    everything, kept = (bars(run.path / "curate" / "lengths.svg", colour) for colour in ("#c3c9d4", "#1f6feb"))
    assert len(everything) == len(kept) == 4, "1–2, 3–6, 7–14, 15–30"
    assert [round(a / max(everything) * 8) for a in everything] == [3, 4, 8, 6]
    assert [round(a / max(everything) * 8) for a in kept] == [2, 4, 8, 1]


def test_rows_that_were_embedded_are_drawn_by_their_vectors(toy_run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    run = toy_run([{"prompt": f"p {place}", "response": "r" * (place + 1)} for place in range(12)])
    folder = run.path / "curate"
    assert not (folder / "clusters.svg").exists()
    settings = {"identity": "toy", "max_seq_length": 256, "dtype": "float32"}
    run.configure("embed", settings)
    texts = [embedded_text(messages, "pair") for messages in load_rows(run)["messages"]]
    names = [hashlib.sha256(f"{json.dumps(list(settings.values()))}\n{text}".encode()).hexdigest()[:32] for text in texts]
    pl.DataFrame({"name": names}).write_parquet(folder / "embeddings.parquet")
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32))
    filter_rows(run, FilterConfig(repetition=False, min_chars=5))
    circles = [each.attrib["fill"] for each in ElementTree.parse(folder / "clusters.svg").getroot() if each.tag.endswith("circle")]
    assert (circles.count("#c3c9d4"), circles.count("#1f6feb")) == (4, 8)
    assert "](clusters.svg)" in card(run)

    for name, min_chars in (("embeddings.npy", 4), ("embeddings.parquet", 6)):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        (folder / "clusters.svg").touch()
        filter_rows(run, FilterConfig(repetition=False, min_chars=min_chars))
        assert f"{name}: damaged or cut short" in caplog.text
        assert row_ids(load_rows(run)) == row_ids(load_rows(run, all=True))[min_chars - 1 :]
        assert not (folder / "clusters.svg").exists()
        with pytest.raises(UserError, match="damaged or cut short"):
            stored_vectors(folder)
    (folder / "embeddings.parquet").unlink()  # as after a kill while another embedder's vectors are written
    filter_rows(run, FilterConfig(repetition=False, min_chars=3))
    assert not (folder / "clusters.svg").exists()


def test_plots_are_whole_and_in_their_frame() -> None:
    rng = np.random.default_rng(0)
    values, kept = np.array([0.0, 1, 5, 5, 900, 10**7]), np.array([True, False, True, True, False, True])
    root = ElementTree.fromstring(histogram(values, kept, "tokens & <more>"))
    assert root.attrib["width"] == "640"
    points = two_directions(rng.normal(size=(50, 6)))
    circles = [each for each in ElementTree.fromstring(scatter(points, rng.random(50) < 0.5)) if each.tag.endswith("circle")]
    assert len(circles) == 50
    assert all(0 <= float(each.attrib["cx"]) <= 640 and 0 <= float(each.attrib["cy"]) <= 260 for each in circles)
    same = ElementTree.fromstring(scatter(np.zeros((3, 2)), np.array([True] * 3)))
    assert "nan" not in ElementTree.tostring(same).decode()


def test_two_directions_are_those_of_most_spread() -> None:
    rng = np.random.default_rng(1)
    wide = rng.normal(size=(200, 5)) * [10, 0.1, 3, 0.1, 0.1]
    found = two_directions(wide)
    assert abs(np.corrcoef(found[:, 0], wide[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(found[:, 1], wide[:, 2])[0, 1]) > 0.99
