"""What the plan of a run takes for known of its passes, its cards and of what several GPUs send each other."""

import random

import pytest
import torch
from sftkit.core.errors import UserError
from sftkit.train import collective, plan
from sftkit.train.config import TrainConfig
from sftkit.train.data import DataReport, Row
from sftkit.train.memory import Load, Memory, bare_model, copied
from sftkit.train.packing import Packs
from sftkit.train.plan import Card, choose, find_card, load_of, pass_tokens
from transformers import AutoConfig, LlamaConfig

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
MIXTRAL = AutoConfig.for_model("mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
HALF = torch.bfloat16


def report_of(lengths: list[int]) -> DataReport:
    return DataReport(
        rows=len(lengths), train_rows=len(lengths), validation_rows=0, rejected={}, tokens=sum(lengths), trained_tokens=sum(lengths) // 2,
        longest=max(lengths), max_length=None, end_of_turn="<|im_end|>",
    )  # fmt: skip


@pytest.mark.parametrize("gpus", [1, 4])
def test_passes_are_as_large_as_is_foretold(gpus: int) -> None:
    drawn = random.Random(0)
    lengths = [min(900, max(8, int(drawn.lognormvariate(4.3, 0.8)))) for _ in range(600)]
    rows = [Row((str(place), 0), [1] * length, [True] * length) for place, length in enumerate(lengths)]
    for batch_size in (8, 64, 256, 1000):
        for most in (1024, 4096, 1 << 20):
            packs = Packs(rows, batch_size=batch_size, batch_tokens=most, seed=0, pad=0, workers=gpus)
            largest = max(sum(lengths[row] for row in pack) for pack in packs.rows())
            told = pass_tokens(most, report_of(lengths), TrainConfig(batch_size=batch_size, gpus=gpus))
            assert largest <= 1.01 * told, (batch_size, most)
            assert told <= 1.3 * largest or told == most, (batch_size, most)  # only the largest updates were split


def test_a_pass_has_whole_rows_and_rows_in_the_order_of_a_score_may_be_the_longest() -> None:
    assert pass_tokens(2_048, report_of([300] * 640), TrainConfig(batch_size=16)) == 6 * 300  # of three passes
    lengths = [100] * 600 + [900] * 40
    rows = [Row((str(place), 0), [1] * length, [True] * length) for place, length in enumerate(lengths)]
    for row in rows:
        row.score = float(len(row))
    packs = Packs(rows, batch_size=16, batch_tokens=1 << 20, seed=0, pad=0)
    largest = max(sum(lengths[row] for row in pack) for pack in packs.rows())
    assert largest == pass_tokens(1 << 20, report_of(lengths), TrainConfig(batch_size=16, curriculum="length")) == 16 * 900


def test_one_pass_on_each_gpu_adds_to_no_gradients() -> None:
    report = report_of([100] * 800)
    for gpus, stand in ((1, True), (8, False)):  # 800 tokens in passes of at most 128
        config = TrainConfig(batch_size=8, gpus=gpus, compile=False)
        tokens = pass_tokens(128, report, config)
        assert load_of(report, config, tokens, dtype=torch.float32, half=HALF).accumulates is stand


def test_passes_of_experts_that_gpus_share_are_launched() -> None:
    report = report_of([100] * 800)
    for parallel, recorded in (("ddp", True), ("fsdp", False)):
        config = TrainConfig(batch_size=8, gpus=8, compile=True, parallel=parallel)
        choice = choose(MIXTRAL, report, config, Card("a card", 80e9, 0.0), dtype=torch.float32, half=HALF)
        load = load_of(report, config, 128, dtype=torch.float32, half=HALF, experts=True)
        assert (load.recorded, load.accumulates) == (recorded, recorded)
        assert choice.memory is not None
        few = plan._option(MIXTRAL, report, config, find_card("H200"), 128, "float32", {})
        assert few.launched is not recorded


def test_the_copy_in_which_gradients_are_averaged_is_counted(monkeypatch) -> None:
    load = Load(tokens=128, scored=64, accumulates=False)
    sizes = [each.numel() for each in bare_model(LLAMA, load).parameters()]
    assert copied(LLAMA, load, shared=False) == 4 * sum(sizes)  # all at once, in float32
    monkeypatch.setattr(collective, "SENT", max(sizes))
    assert max(sizes) * 4 >= copied(LLAMA, load, shared=False) > 2 * max(sizes)
    assert copied(LLAMA, load, shared=True) == 0  # FSDP2 sends them itself
    adapter = Load(tokens=128, scored=64, accumulates=False, adapter=True, dtype=HALF)
    assert copied(LLAMA, adapter, shared=True) == copied(LLAMA, adapter, shared=False) > 0

    step = Memory(weights=100, gradients=100, optimizer=200, activations=100 + (1 << 30), saved_layer=1, peak=400 + (1 << 30))
    assert step.averaged(1000, recorded=False).peak == step.peak  # by then activations are gone
    assert step.averaged(1 << 31, recorded=False).peak > 400 + (1 << 31)
    assert step.averaged(1000, recorded=True).peak == step.peak + 1000
    monkeypatch.undo()
    alone, four = (
        choose(LLAMA, report_of([100] * 800), TrainConfig(batch_size=8, gpus=gpus, compile=True, parallel="ddp", batch_tokens=100),
               Card("a card", 80e9, 0.0), dtype=torch.float32, half=HALF).memory
        for gpus in (1, 4)
    )  # fmt: skip
    assert alone is not None
    assert four is not None
    assert four.peak == alone.peak + 4 * sum(sizes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("NVIDIA A100-SXM4-80GB", "A100"), ("A100 80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("A100 40 GB", "A100-40GB")),
        *(("NVIDIA H100 80GB HBM3", "H100"), ("RTX 3080 10GB", "RTX 3080"), ("Tesla V100-SXM2-16GB", "V100"), ("Tesla T4", "T4")),
        *(("V100 32GB", None), ("RTX 3060 8GB", None), ("RTX 3080 12GB", None), ("RTX 4080", None), ("H100 PCIe", None)),
    ],
)
def test_cards_are_known_by_their_own_names_and_not_taken_for_larger_ones(text: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(UserError, match="its memory, as 24GB"):
            find_card(text)
    else:
        assert find_card(text).name == name


def test_the_plan_says_how_many_cards_it_is_for_and_keeps_to_the_passes_asked_for(cli, tiny_model, chats, tmp_path) -> None:
    (tmp_path / "passes.yaml").write_text("batch_tokens: 100\n")
    told = cli("train", "plan", chats(40), "--model", tiny_model, "--gpu", "T4", "--gpus", "2", "--config", tmp_path / "passes.yaml")[1]
    assert told.startswith("2 x T4: 15.6 GB each; ")
    table = [line.split() for line in told.splitlines() if line.startswith(("full", "LoRA", "QLoRA"))]
    assert all("100" in line for line in table)
    assert len(table) == 6
