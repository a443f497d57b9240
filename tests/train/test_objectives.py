"""What is learned from a row, in numbers: weights, dynamic fine-tuning, noise, an order by score, and mixtures."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.ledger import Ledger
from sftkit.core.models import load_model, resolve_model
from sftkit.train.account import prepare
from sftkit.train.attention import use_packed_attention
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.head import LinearCrossEntropy, loss_sum
from sftkit.train.mixture import parse_mixture, read_mixture
from sftkit.train.packing import Packs
from sftkit.train.prepared import Preparation, load_rows
from sftkit.train.sft import train

RANDOM = np.random.default_rng(0)


def row(length: int, name: int = 0, *, weight: float = 1.0, score: float = 0.0) -> Row:
    made = Row((str(name), None), RANDOM.integers(4, 900, length).tolist(), [place >= length // 3 for place in range(length)])
    made.weight, made.score = weight, score
    return made


def pack(rows: list[Row], **more: Any) -> dict[str, Any]:
    return {**Packs(rows, batch_size=len(rows), batch_tokens=1 << 20, seed=0, pad=1)[0], **more}


@pytest.fixture
def model(tiny_model):
    made = load_model(resolve_model(tiny_model), dtype="float32").train()
    use_packed_attention(made)
    return made


def scored(name: str, values: list[float], text: str = "Calculate") -> list[dict[str, Any]]:
    """Rows with a column of numbers."""
    return [
        {"messages": [{"role": "user", "content": f"{text} {n}."}, {"role": "assistant", "content": f"It is {n}."}], name: value}
        for n, value in enumerate(values)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def token_losses(model: Any, each: Row) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([each.ids])).logits[0, :-1].float()
    labels = torch.tensor(each.labels[1:])
    losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return losses[labels != -100]


def test_the_loss_of_weighted_rows_is_their_weighted_mean(model) -> None:
    rows = [row(30, 0, weight=2.0), row(50, 1, weight=0.5), row(17, 2, weight=0.0)]
    batch = pack(rows)
    found = float(loss_sum(model, batch)) / batch["weight"]
    losses = [token_losses(model, each) for each in rows]
    weighted = sum(each.weight * float(part.sum()) for each, part in zip(rows, losses, strict=True))
    assert found == pytest.approx(weighted / sum(each.weight * len(part) for each, part in zip(rows, losses, strict=True)), rel=1e-5)
    assert "weights" not in pack([row(30, 0), row(50, 1)])
    static = Packs(rows, batch_size=3, batch_tokens=1 << 20, seed=0, pad=1)
    static.pad_to(static.largest_shape())
    assert float(loss_sum(model, {**static[0], "alone": False})) / static[0]["weight"] == pytest.approx(found, rel=1e-5)


def test_a_weighted_run_is_one_on_repeated_rows(tmp_path, tiny_model) -> None:
    """A row of weight 3 counts as three copies of it: the losses of the steps say so, whatever the forward passes are."""
    rows = scored("quality", [3.0, 1.0, 1.0, 1.0])
    told: dict[str, Any] = {
        "validation": 0.0,
        "dtype": "float32",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "stop_check": 0,
        "epochs": 3.0,
    }
    data = write(tmp_path / "rows.jsonl", rows)
    runs = {}
    for name, settings in {
        "weighted": {"weight_by": "quality", "batch_size": 4},
        "in parts": {"weight_by": "quality", "batch_size": 4, "batch_tokens": 1},
    }.items():
        runs[name] = train(data, str(tiny_model), tmp_path / name, TrainConfig(**told, **settings)).run
    copies = write(tmp_path / "copies.jsonl", [rows[0], rows[0], *rows])
    runs["copies"] = train(copies, str(tiny_model), tmp_path / "copies", TrainConfig(**told, batch_size=6)).run
    lines = {name: map(json.loads, (run / "train" / "metrics.jsonl").read_text().splitlines()) for name, run in runs.items()}
    losses = {name: [line["loss"] for line in each if "loss" in line] for name, each in lines.items()}
    assert losses["weighted"] == pytest.approx(losses["copies"], abs=1e-4)
    assert losses["in parts"] == pytest.approx(losses["weighted"], abs=1e-4)


def test_weights_that_are_no_numbers_name_their_row(tiny_model, tmp_path) -> None:
    chat = load_chat(resolve_model(tiny_model))
    for value, message in ((None, "rows.jsonl:2: expected a number in the column 'quality', found None"), (-1.0, "weight is 0 or more")):
        data = write(tmp_path / "rows.jsonl", scored("quality", [1.0, value, 2.0]))  # type: ignore[list-item]
        with pytest.raises(UserError, match=message):
            prepare(read_examples(data), chat, TrainConfig(weight_by="quality"), context=512)
    data = write(tmp_path / "rows.jsonl", scored("quality", [0.0, 0.0]))
    with pytest.raises(UserError, match="all rows have the weight 0"):
        prepare(read_examples(data), chat, TrainConfig(weight_by="quality"), context=512)
    with pytest.raises(UserError, match="columns with numbers: quality"):
        prepare(read_examples(data), chat, TrainConfig(weight_by="qualty"), context=512)
    table = tmp_path / "rows.csv"  # which has no numbers, only texts
    table.write_text("prompt,completion,quality,mark\nSay 1.,1.,0.5,good\nSay 2.,2.,2,nan\n")
    made = prepare(read_examples(table), chat, TrainConfig(weight_by="quality", curriculum="-quality"), context=512)
    assert [(row.weight, row.score) for row in made.train] == [(0.5, -0.5), (2.0, -2.0)]
    for place, found in (("2", "good"), ("3", "nan")):
        if place == "3":
            table.write_text(table.read_text().replace("good", "1"))
        with pytest.raises(UserError, match=rf"rows.csv:{place}: expected a number in the column 'mark', found '{found}'"):
            prepare(read_examples(table), chat, TrainConfig(weight_by="mark"), context=512)


def test_scores_of_a_run_are_weights_and_an_order_of_its_rows(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.train.prepared.LEAST_ROWS", 1)
    chat, run = load_chat(resolve_model(tiny_model)), tmp_path / "run"
    (run / "curate" / "scores").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    ids = [f"{n:016x}" for n in range(12)]
    turns = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}."}] for n in range(12)]
    rows = [{"id": f"{name}/2", "messages": each, "source": "p:1", "meta": {}} for name, each in zip(ids, turns, strict=True)]
    write(run / "curate" / "dataset.jsonl", rows)

    def score(values: list[float | None]) -> None:
        every = [(name, index, value if index == 2 else -1.0) for name, value in zip(ids, values, strict=True) for index in range(4)]
        schema = {"example_id": pl.String, "sample_index": pl.Int32, "value": pl.Float64}
        pl.DataFrame(every, schema=schema, orient="row").write_parquet(run / "curate" / "scores" / "quality.parquet")

    def prepared(**settings: str) -> list[tuple[str, float, float]]:
        told = TrainConfig(validation=0.0, **settings)  # type: ignore[arg-type]
        return [(each.key[0], each.weight, each.score) for each in load_rows(run, chat, told, context=512, cache=tmp_path / "cache").train]

    for values in ([float(n) for n in range(12)], [float(n % 5) for n in range(12)]):  # the second time others: the cache is not asked
        score(values)
        for _ in range(2):
            assert prepared(weight_by="quality", curriculum="-quality") == [
                (name, each, -each) for name, each in zip(ids, values, strict=True)
            ]
    score([1.0, None, *[1.0] * 10])
    with pytest.raises(UserError, match="expected a number in the column 'quality', found None"):
        prepared(weight_by="quality")
    with pytest.raises(UserError, match="run: its rows have no column 'qualty' and no such score; scores are quality"):
        prepared(curriculum="-qualty")


@pytest.mark.parametrize("weighted", [False, True])
def test_dynamic_fine_tuning_is_its_formula(weighted: bool, monkeypatch) -> None:
    """Loss -sg(p) log p, so that the gradient by the logits is that of -log p times p (arXiv 2508.05629, equation 8)."""
    monkeypatch.setattr("sftkit.train.head.ELEMENTS", 37 * 50)  # in pieces
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (100,))
    targets[::9] = -100
    shares = torch.rand(100) if weighted else None
    logp = (hidden @ weight.T).log_softmax(-1)[torch.arange(100), targets.clamp(min=0)]
    expected = -(logp.detach().exp() * logp * (targets >= 0) * (shares if shares is not None else 1)).sum()
    wanted = torch.autograd.grad(expected, [hidden, weight])
    found = LinearCrossEntropy.apply(hidden, weight, None, targets, 0.0, 1.0, False, shares, True)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(torch.autograd.grad(found, [hidden, weight]), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dynamic_fine_tuning_of_a_model_row_by_row_and_end_to_end(model) -> None:
    rows = [row(30, 0), row(50, 1)]
    by_hand = sum(float((part * (-part).exp()).sum()) for part in (token_losses(model, each) for each in rows))
    assert float(loss_sum(model, pack(rows, dft=True))) == pytest.approx(by_hand, rel=1e-5)
    alone = Packs(rows, batch_size=2, batch_tokens=1 << 20, seed=0, pad=1, alone=True)
    assert sum(float(loss_sum(model, {**alone[place], "dft": True})) for place in range(2)) == pytest.approx(by_hand, rel=1e-5)


def test_noise_reaches_as_far_as_its_paper_says_by_the_length_of_each_row(model, monkeypatch) -> None:
    short, long = row(16, 0), row(100, 1)
    batch = pack([short, long], neftune=5.0)
    embed, seen = model.get_input_embeddings(), {}
    plain = embed(batch["input_ids"])
    backbone = model.base_model.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        seen["noise"] = kwargs["inputs_embeds"] - plain
        return backbone(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", look)
    loss_sum(model, batch)
    bounds = batch["cu_seq_lens_q"].tolist()
    for first, last in pairwise(bounds):
        reach = 5.0 / np.sqrt((last - first) * 64)
        noise = seen["noise"][0, first:last].abs()
        assert float(noise.max()) <= reach
        assert float(noise.max()) > 0.95 * reach
        assert float(noise.mean()) == pytest.approx(reach / 2, rel=0.1)
    monkeypatch.undo()
    model.eval()
    assert float(loss_sum(model, batch)) == float(loss_sum(model, pack([short, long])))


def test_rows_come_in_the_order_of_their_scores_however_few_they_are() -> None:
    rows = [row(int(RANDOM.integers(5, 60)), n, score=float(RANDOM.integers(1, 9))) for n in range(30)]
    made = Packs(rows, batch_size=4, batch_tokens=1 << 20, seed=0, pad=1, epochs=2)
    for epoch in (0, 1):
        order = [place for update in range(8) for place in made.update(8 * epoch + update)]
        assert sorted(order) == list(range(30))
        assert [rows[place].score for place in order] == sorted(each.score for each in rows)
    assert [made.update(place) for place in range(8)] != [made.update(place) for place in range(8, 16)]  # among equals by chance


def test_a_curriculum_is_read_from_its_column(tiny_model, tmp_path) -> None:
    chat = load_chat(resolve_model(tiny_model))
    data = write(tmp_path / "rows.jsonl", scored("difficulty", [3.0, 1.0, 2.0]))
    for name, wanted in (("difficulty", [3.0, 1.0, 2.0]), ("-difficulty", [-3.0, -1.0, -2.0])):
        made = prepare(read_examples(data), chat, TrainConfig(curriculum=name, validation=0.0), context=512)
        assert [each.score for each in made.train] == wanted


def test_a_mixture_has_its_proportions_and_as_many_rows_as_it_can(tmp_path, tiny_model) -> None:
    one = write(tmp_path / "one.jsonl", scored("x", [1.0] * 90, "One"))
    two = write(tmp_path / "two.jsonl", scored("x", [1.0] * 60, "Two"))
    examples, mixture = read_mixture([f"{one}:0.7", f"{two}:0.3"], seed=0)
    kept = [example for place, example in enumerate(examples) if place not in mixture.beyond]
    sources = [Path(each.source).name.partition(":")[0] for each in kept]
    assert (sources.count("one.jsonl"), sources.count("two.jsonl")) == (90, 39)
    assert read_mixture([f"{one}:0.7", f"{two}:0.3"], seed=0)[1] == mixture
    assert read_mixture([f"{one}:0.7", f"{two}:0.3"], seed=1)[1] != mixture
    assert len(read_mixture([str(one), str(two)], seed=0)[0]) == 150
    both = read_mixture([str(one), str(one)], seed=0)[0]
    assert len({each.id for each in both}) == 180
    chat = load_chat(resolve_model(tiny_model))
    made = prepare(examples, chat, TrainConfig(validation=0.0), context=512, ledger=tmp_path / "ledger.parquet", mixture=mixture)
    assert made.report.rejected == {"over_share": 21}
    assert not made.report.warnings
    assert made.report.sources == {"one.jsonl": 90, "two.jsonl": 39}
    assert len(Ledger(tmp_path / "ledger.parquet").read()) == 150
    few = Preparation([f"{one}:0.7", f"{two}:0.3"], chat, TrainConfig(validation=0.0, limit=20), context=512).rows()
    assert few.report.sources == {"one.jsonl": 14, "two.jsonl": 6}
    for wrong, message in (
        ([f"{one}:0.7", str(two)], "has no share, and others have"),
        ([f"{one}:-1", f"{two}:1"], "0 or more"),
        ([f"{one}:0", f"{two}:0"], "all 0"),
    ):
        with pytest.raises(UserError, match=message):
            parse_mixture(wrong)


def test_proportions_that_cannot_be_met_are_told_of(tmp_path, tiny_model) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", scored("x", [1.0] * 50, name)) for name in ("one", "two"))
    few = write(tmp_path / "few.jsonl", scored("x", [1.0] * 5, "few"))
    blank = write(tmp_path / "blank.jsonl", scored("x", [1.0] * 50, "blank"))
    rows = [json.loads(line) for line in blank.read_text().splitlines()]
    for row in rows[:30]:
        row["messages"][-1]["content"] = ""
    write(blank, rows)
    chat = load_chat(resolve_model(tiny_model))

    def warnings(*sources: str, **settings: object) -> str:
        config = TrainConfig(**{"validation": 0.0, **settings})  # type: ignore[arg-type]
        return " | ".join(Preparation(sources, chat, config, context=512).rows().report.warnings)

    assert warnings(f"{one}:0.5", f"{two}:0.5") == ""
    told = f"{few} has 5 rows, and with its share of 50.0% the mixture has 10 of 55 rows: give it a smaller share, or more rows"
    assert warnings(f"{one}:0.5", f"{few}:0.5") == told
    assert told in warnings(f"{one}:0.5", f"{few}:0.5", limit=20)
    assert warnings(f"{one}:0.5", f"{few}:0.5", limit=6) == ""
    assert f"0 of 10 rows are from {few}, 0.0%, where its share is 1.0%" in warnings(f"{one}:0.99", f"{few}:0.01", limit=10)
    assert f"20 of 70 rows are from {blank}, 28.6%, where its share is 50.0%" in warnings(f"{one}:0.5", f"{blank}:0.5")


def test_a_limit_is_met_where_the_first_rows_of_a_mixture_are_too_many(tmp_path, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.train.rendering.CHUNK", 8)
    (tmp_path / "other").mkdir()
    one, two = (write(tmp_path / name / "rows.jsonl", scored("x", [1.0] * 40, name)) for name in (".", "other"))
    chat = load_chat(resolve_model(tiny_model))
    made = Preparation([f"{one}:0.1", f"{two}:0.9"], chat, TrainConfig(validation=0.0, limit=30), context=512).rows()
    assert made.report.sources == {str(two): 27, str(one): 3}  # files of one name told apart
    assert made.report.rejected == {"over_share": 50}


def test_a_mixture_is_looked_at_and_planned_as_it_is_trained_on(cli, tmp_path, tiny_model) -> None:
    one, other = (write(tmp_path / name, scored("x", [1.0] * 40, text=name)) for name in ("a.jsonl", "b.jsonl"))
    mixed = (f"{one}:0.75", f"{other}:0.25")
    code, out, _ = cli("train", "preview", *mixed, "--model", tiny_model, "-n", 0)
    assert code == 0
    assert "80 read, 50 to train on, 3 to validate on" in " ".join(out.split())
    code, out, _ = cli("train", "plan", *mixed, "--model", tiny_model, "--gpu", "T4")
    assert code == 0
    assert "T4: 15.6 GB; 50 rows" in out
    assert cli("train", "plan", *mixed, "--data", one, "--model", tiny_model, "--gpu", "T4")[0] == 2


def test_the_command_trains_on_a_mixture(cli, tmp_path, tiny_model) -> None:
    one = write(tmp_path / "one.jsonl", scored("x", [1.0] * 20, "One"))
    two = write(tmp_path / "two.jsonl", scored("x", [1.0] * 20, "Two"))
    arguments = ["--model", tiny_model, "-o", tmp_path / "run", "--loss", "dft", "--neftune", 5, "--weight-by", "x", "--curriculum", "x"]
    code, out, err = cli("train", "sft", f"{one}:0.5", f"{two}:0.5", *arguments)
    assert code == 0, err
    assert "38 rows" in out
    assert "training loss, a token's times its p: " in out
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "one.jsonl:0.5" in settings
    card = (tmp_path / "run" / "train" / "final" / "README.md").read_text()
    assert "| one.jsonl | 20 |" in card
    assert "neftune: 5.0" in card
    assert "(nats a token of the answers, each times its probability)" in card
