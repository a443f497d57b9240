"""The verifier on real answers: 5,276 solutions of four models to GSM8K's test questions, labelled by those who published them."""

import gzip
import json
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from sftkit.core.run import Run
from sftkit.curate.best import best
from sftkit.curate.config import ImportConfig, ScoreConfig
from sftkit.curate.decide_config import BestConfig
from sftkit.curate.intake import take_in
from sftkit.curate.score import score

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def test_accuracies_are_the_published_ones_and_no_label_is_contradicted(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "gsm8k_model_solutions" / "example_model_solutions.jsonl.gz"
    labels = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    with closing(Run.create(tmp_path / "run")) as run:
        take_in(path, run, ImportConfig(samples=MODELS))
        scores = score(run, ScoreConfig(scorers={"numeric": {}}))["numeric"]
        outcome = best(run, BestConfig(by=("numeric",)))
    means = scores.group_by("sample_index").agg(pl.col("value").mean()).sort("sample_index")["value"].to_list()
    assert [round(100 * mean, 1) for mean in means] == [21.7, 39.0, 34.7, 56.3]
    ids = scores["example_id"].unique(maintain_order=True).to_list()
    found = {(row["example_id"], row["sample_index"]): row for row in scores.iter_rows(named=True)}
    disagreements = [
        (place, name, found[example_id, index]["detail"])
        for place, example_id in enumerate(ids)
        for index, name in enumerate(MODELS)
        if bool(found[example_id, index]["value"]) != labels[place][name]["is_correct"]
    ]
    assert disagreements == []
    right = scores.group_by("example_id").agg(pl.col("value").max())["value"].sum()
    assert right == 887  # of 1,319: 67.25 %
    chosen = outcome.kept.select("example_id", "sample_index").join(
        scores.select("example_id", "sample_index", "value"), on=["example_id", "sample_index"]
    )
    assert len(chosen) == 1319
    assert chosen["value"].sum() == pytest.approx(887)  # best of four by the verifier is right wherever one of the four is
