"""The memory plan: what a replay counts is what real tensors take, layers follow from a few, and a run keeps to what was chosen."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from sftkit.core.errors import UserError
from sftkit.core.models import load_settings, resolve_model
from sftkit.train import head, memory, plan, trainer
from sftkit.train.config import PreferenceConfig, TrainConfig
from sftkit.train.data import DataReport
from sftkit.train.head import loss_sum
from sftkit.train.memory import Load, bare_model, decoder_layers, predict, saved_by
from sftkit.train.plan import Card, choose, find_card, rated_flops
from sftkit.train.preference import pair_losses
from sftkit.train.sft import train
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    tie_word_embeddings=False,
)  # fmt: skip
GEMMA3 = AutoConfig.for_model(
    "gemma3_text", vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
    head_dim=32, sliding_window=64,
)  # fmt: skip
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4}
MIXTRAL = AutoConfig.for_model("mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
DEEPSEEK = AutoConfig.for_model(
    "deepseek_v3", **SMALL, num_key_value_heads=4, moe_intermediate_size=48, n_routed_experts=8, n_group=2, topk_group=1,
    num_experts_per_tok=2, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=1,
)  # fmt: skip
GPT_OSS = AutoConfig.for_model("gpt_oss", **SMALL, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
HALF = torch.bfloat16


def load(**settings: object) -> Load:
    return Load(**{"tokens": 300, "scored": 200, "accumulates": False, **settings})  # type: ignore[arg-type]


def saved_on_real_tensors(settings: object, asked: Load) -> int:
    """Count what the last layer saves in a real forward pass on the CPU, attention standing for the kernel of the GPU."""
    model = bare_model(settings, asked)
    model.to_empty(device="cpu")
    model.tie_weights()
    batch = memory._batch(asked)
    half = asked.half if asked.half is not asked.dtype or asked.adapter else None  # as an adapter is trained
    computing = torch.autocast("cpu", dtype=half) if half is not None else nullcontext()
    with saved_by(decoder_layers(model)[-1], {each.untyped_storage()._cdata for each in model.parameters()}) as found, computing:
        loss = loss_sum(model, batch)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("settings", [LLAMA, QWEN3, GEMMA3, MIXTRAL, DEEPSEEK], ids=["llama", "qwen3", "gemma3", "mixtral", "deepseek"])
@pytest.mark.parametrize(
    "how",
    [{}, {"half": None}, {"dtype": HALF, "half": None}, {"adapter": True, "dtype": HALF}],
    ids=["mixed", "float32", "bfloat16", "lora"],
)
def test_what_a_replay_says_is_saved_is_what_real_tensors_save(settings, how) -> None:
    asked = load(**how)
    assert predict(settings, asked).saved_layer == pytest.approx(saved_on_real_tensors(settings, asked), rel=0.02)


@pytest.mark.parametrize("settings", [LLAMA, GEMMA3, MIXTRAL, DEEPSEEK], ids=["llama", "gemma3", "mixtral", "deepseek"])
@pytest.mark.parametrize("how", [{}, {"accumulates": True}, {"checkpointing": True}, {"adapter": True, "dtype": HALF}], ids=str)
def test_all_layers_follow_from_a_few(settings, how, monkeypatch) -> None:
    few = predict(settings, load(**how))
    monkeypatch.setattr(memory, "replayed", lambda _kinds: (6,))
    whole = predict(settings, load(**how))
    assert few.peak == pytest.approx(whole.peak, rel=1e-3)
    assert (few.weights, few.optimizer, few.gradients) == (whole.weights, whole.optimizer, whole.gradients)


@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        ("a" * 24, (2, 4)),
        ("a" * 25, (2, 4)),
        ("a" * 3, (3,)),
        ("aaa" + "b" * 58, (5, 7)),  # DeepSeek-V3
        ("lllf" * 12, (4, 8)),  # Qwen3-Next
        ("ab" * 5 + "a", (3, 5)),  # ends as the whole does
        ("abcdef", (6,)),
    ],
)
def test_replays_have_all_kinds_of_layers_and_end_as_the_model_does(kinds: str, counts: tuple[int, ...]) -> None:
    assert memory.replayed(list(kinds)) == counts


@pytest.mark.parametrize("settings", [MIXTRAL, DEEPSEEK], ids=["mixtral", "deepseek"])
def test_experts_stand_whole_and_a_token_takes_its_own(settings) -> None:
    model = bare_model(settings, load(dtype=HALF, half=None))
    number = model.num_parameters()
    found = predict(settings, load(dtype=HALF, half=None))
    assert (found.weights, found.gradients, found.optimizer) == pytest.approx((2 * number, 2 * number, 4 * number), rel=0.02)
    experts = sum(each.numel() for each in memory.expert_weights(model))
    idle = experts * (1 - settings.num_experts_per_tok / (settings.n_routed_experts if settings is DEEPSEEK else 4))
    embedding = model.get_input_embeddings().weight.numel()
    small = sum(each.numel() for each in model.parameters() if each.dim() == 1)
    assert memory.token_flops(model, 0) == pytest.approx(6 * (number - idle - embedding - small), rel=1e-6)


def test_experts_by_another_name_end_no_training() -> None:
    gemma = AutoConfig.for_model(
        "gemma4_text", **SMALL, num_key_value_heads=1, head_dim=16, enable_moe_block=True, num_experts=8, top_k_experts=2,
        moe_intermediate_size=32, vocab_size_per_layer_input=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gemma)
    assert memory.experts_taken(gemma) == 2
    assert 0 < memory.token_flops(model, 0) < 6 * model.num_parameters()


@pytest.mark.parametrize("settings", [MIXTRAL, AutoConfig.for_model("lfm2", **SMALL, num_key_value_heads=2)], ids=["mixtral", "lfm2"])
def test_what_compiled_code_keeps_is_taken_only_of_layers_it_was_seen_for(settings) -> None:
    assert predict(settings, load(compiled=True)).saved_layer == predict(settings, load()).saved_layer
    assert predict(LLAMA, load(compiled=True)).saved_layer < predict(LLAMA, load()).saved_layer


def test_standing_memory_is_that_of_the_weights() -> None:
    number = bare_model(LLAMA, load()).num_parameters()
    assert predict(LLAMA, load()).weights == pytest.approx(4 * number, rel=0.02)
    assert predict(LLAMA, load()).optimizer == pytest.approx(8 * number, rel=0.02)
    assert predict(LLAMA, load(dtype=HALF, half=None)).weights == pytest.approx(2 * number, rel=0.02)
    lora = predict(LLAMA, load(adapter=True, dtype=HALF, rank=2))
    assert lora.optimizer < 0.3 * lora.weights
    assert predict(LLAMA, load(adapter=True, quantised=True, dtype=HALF, rank=2)).weights < 0.6 * lora.weights


def test_less_is_taken_where_less_is_kept() -> None:
    plain = predict(LLAMA, load(tokens=4000, scored=3000)).peak
    assert predict(LLAMA, load(tokens=4000, scored=3000, checkpointing=True)).peak < 0.8 * plain
    assert predict(LLAMA, load(tokens=4000, scored=3000, compiled=True)).peak < plain
    assert predict(LLAMA, load(tokens=2000, scored=1500)).peak < plain
    assert predict(LLAMA, load(tokens=4000, scored=3000, accumulates=True)).peak > plain


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "tokens", "dtype", "measured"),
    [
        (896, 4864, 24, 14, 32_768, torch.float32, 32.2e9),
        (896, 4864, 24, 14, 32_768, HALF, 28.3e9),  # with the loss in smaller pieces, which took less
        (1536, 8960, 28, 12, 16_384, torch.float32, 50.9e9),
    ],
)
def test_peaks_measured_on_an_h200_are_predicted(width, inner, layers, heads, tokens, dtype, measured) -> None:
    """The figures stand in docs/training-speed.md: compiled, two or four passes an update, two tokens of three learned."""
    settings = Qwen2Config(
        vocab_size=151936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    asked = Load(
        tokens=tokens, scored=round(tokens * 0.67), accumulates=True, compiled=True, dtype=dtype, half=HALF if dtype != HALF else None
    )
    assert predict(settings, asked).peak == pytest.approx(measured, rel=0.03)


REPORT = DataReport(
    rows=1000, train_rows=1000, validation_rows=0, rejected={}, tokens=400_000, trained_tokens=200_000, longest=900, max_length=2048,
    end_of_turn="<|im_end|>",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "half", "stand"),
    [
        (TrainConfig(compile=True), HALF, True),
        (TrainConfig(), HALF, False),  # not compiled
        (TrainConfig(compile=True), torch.float16, False),
        (TrainConfig(compile=True, gradient_checkpointing=True), HALF, False),
        (TrainConfig(compile=True, gpus=2), HALF, True),
        (TrainConfig(compile=True, qlora=True), HALF, False),
        (PreferenceConfig(compile=True), HALF, False),
    ],
)
def test_gradients_stand_through_a_whole_updates_pass_where_it_is_recorded(config: TrainConfig, half: torch.dtype, stand: bool) -> None:
    assert plan.load_of(REPORT, config, 1 << 20, dtype=HALF, half=half).accumulates is stand


def test_the_largest_pass_that_fits_is_taken_and_activations_are_computed_twice_only_where_needed() -> None:
    config = TrainConfig(batch_size=64)
    settings = Qwen2Config(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2
    )
    found = {
        gigabytes: choose(settings, REPORT, config, Card("a card", gigabytes * 1e9, 0.0), dtype=torch.float32, half=HALF)
        for gigabytes in (80, 8, 3)
    }
    assert found[80].batch_tokens == plan.TOKENS[0]
    assert not found[80].checkpointing
    assert found[8].batch_tokens < found[80].batch_tokens
    assert not found[8].checkpointing
    assert found[3].checkpointing
    for gigabytes in (80, 8, 3):
        taken = found[gigabytes].memory
        assert taken is not None
        assert taken.peak < gigabytes * 1e9
    fixed = choose(
        settings, REPORT, TrainConfig(batch_size=64, batch_tokens=1024, gradient_checkpointing=False), Card("a card", 80e9, 0.0),
        dtype=torch.float32, half=HALF,
    )  # fmt: skip
    assert (fixed.batch_tokens, fixed.checkpointing) == (1024, False)


def test_several_cards_share_what_does_not_fit_one() -> None:
    settings = Qwen2Config(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2
    )
    found = {}
    for gigabytes, gpus in ((8, 8), (2.2, 1), (2.2, 8)):
        config = TrainConfig(batch_size=64, gpus=gpus, batch_tokens=2048, gradient_checkpointing=False)
        found[gigabytes, gpus] = choose(settings, REPORT, config, Card("a card", gigabytes * 1e9, 0.0), dtype=torch.float32, half=HALF)
    assert [each.parallel for each in found.values()] == ["ddp", "ddp", "fsdp"]
    alone, shared = found[2.2, 1].memory, found[2.2, 8].memory
    assert alone is not None
    assert shared is not None
    assert alone.peak * plan.SLACK > 2.2e9 - plan.CONTEXT >= shared.peak * plan.SLACK
    assert 8 * shared.weights == pytest.approx(alone.weights, rel=1e-6)
    assert 8 * shared.optimizer == pytest.approx(alone.optimizer, rel=1e-6)
    assert plan.ways(TrainConfig(gpus=8, qlora=True)) == ("ddp",)  # four bits are not taken apart
    with pytest.raises(UserError, match="fsdp does not take 4-bit weights apart"):
        TrainConfig(gpus=8, qlora=True, parallel="fsdp")


def test_where_nothing_fits_it_says_so(caplog) -> None:
    choice = choose(LLAMA, REPORT, TrainConfig(), Card("a small card", 0.61e9, 0.0), dtype=torch.float32, half=HALF)
    assert choice.checkpointing
    assert "is expected to take" in caplog.text
    assert "a small card has 0.6" in caplog.text


def test_cards_are_known_by_name_and_by_memory() -> None:
    assert find_card("rtx 3080").name == find_card("3080").name == find_card("NVIDIA GeForce RTX 3080").name == "RTX 3080"
    assert find_card("24GB").memory == 24e9
    with pytest.raises(UserError, match="0GB"):
        find_card("0GB")
    assert not find_card("t4").bfloat16
    with pytest.raises(UserError, match="H200"):
        find_card("H20O")


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 0),
     ("NVIDIA GeForce RTX 3080", 59.5), ("NVIDIA GeForce RTX 3080 Laptop GPU", 0), ("Tesla T4", 65), ("NVIDIA A10G", 0)],
)  # fmt: skip
def test_what_a_data_sheet_promises_is_known_by_a_cards_own_name(device: str, teraflops: float) -> None:
    assert rated_flops(device) == teraflops * 1e12


def test_a_recorded_pass_may_be_shorter_before_the_card_waits_for_its_host() -> None:
    usual = {"method": "full", "dtype": "float32", "checkpointing": False, "memory": predict(LLAMA, load()), "room": 1e9, "hours": 1.0}

    def waits(tokens: int, launched: bool) -> bool:
        return plan.Option(**usual, batch_tokens=tokens, tokens_per_second=400_000.0, launched=launched).waits

    assert [waits(tokens, True) for tokens in (1_024, 4_096, 65_536)] == [True, True, False]
    assert [waits(tokens, False) for tokens in (1_024, 4_096, 65_536)] == [True, False, False]
    recorded = plan._option(LLAMA, REPORT, TrainConfig(compile=True, gradient_checkpointing=False), find_card("H200"), 512, "float32", {})
    assert not recorded.launched
    twice = plan._option(LLAMA, REPORT, TrainConfig(compile=True, gradient_checkpointing=True), find_card("H200"), 512, "float32", {})
    assert twice.launched


def test_the_command_prints_what_fits(cli, tiny_model, chats) -> None:
    code, out, err = cli("train", "plan", "--data", chats(40), "--model", tiny_model, "--gpu", "RTX 3080")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert {line[0] for line in lines if line} >= {"full", "LoRA", "QLoRA"}
    assert all("yes" in line for line in lines if line and line[0] == "LoRA")
    assert "not measured on this card" in out
    assert "<: passes so short that the card waits for its host" in out  # a tiny model's, on any card
    several = cli("train", "plan", chats(40), "--model", tiny_model, "--gpu", "24GB", "--gpu", "T4")[1]
    assert several.count("?") > 2
    assert [line.split(":")[0] for line in several.splitlines() if "tokens an epoch" in line] == ["a card of 24 GB", "T4"]
    said = cli("train", "plan", chats(40), "--model", tiny_model, "--gpu", "24GB", "--gpu", "A100")[2]
    assert said.count("rows to train on") == 1  # the rows are looked at once
    assert cli("train", "plan", "--model", tiny_model, "--gpu", "T4")[0] == 2


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "train" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_out_of_memory_in_the_middle_the_losses_are_those_of_smaller_passes(tmp_path, tiny_model, chats, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", logger="sftkit")
    settings = {"epochs": 2.0, "dtype": "float32", "learning_rate": 3e-3, "logging_steps": 1, "stop_check": 0, "batch_size": 12}
    data = chats(80)
    small = train(data, str(tiny_model), tmp_path / "small", TrainConfig(**settings, batch_tokens=200))
    compute, failed = trainer.Trainer.compute_loss, []

    def short(self, model, inputs, *args, **kwargs):
        if self.state.global_step >= 5 and inputs["num_tokens"] > 200:
            failed.append(self.state.global_step)
            raise torch.OutOfMemoryError("injected")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", short)
    # a checkpoint before the memory runs out: it goes on from there with more passes an update
    run = train(data, str(tiny_model), tmp_path / "run", TrainConfig(**settings, batch_tokens=1000, save_minutes=1e-6))
    assert failed
    assert "out of memory: going on with at most" in caplog.text
    assert "going on from step 5" in caplog.text
    assert len(losses(run.run)) == len(losses(small.run))
    assert losses(run.run) == pytest.approx(losses(small.run), abs=1e-4)
    assert json.loads((run.run / "train" / "plan.json").read_text())["memory"]["batch_tokens"] < 1000


def test_on_a_cpu_the_plan_is_for_the_memory_that_is_named(tmp_path, tiny_model, chats) -> None:
    run = train(chats(20), str(tiny_model), tmp_path / "run", TrainConfig(memory_gb=4.0, stop_check=0)).run
    facts = json.loads((run / "train" / "plan.json").read_text())["memory"]
    assert facts["card_gb"] == 4.0
    assert 0 < facts["predicted_gb"] < 4
    assert load_settings(resolve_model(run)).vocab_size == 1024


def test_a_model_that_cannot_be_replayed_is_trained_all_the_same(tmp_path, tiny_model, chats, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise memory.NotReplayed("aten._local_scalar_dense.default")

    monkeypatch.setattr(plan, "predict", refuse)
    run = train(chats(20), str(tiny_model), tmp_path / "run", TrainConfig(memory_gb=4.0, stop_check=0)).run
    assert "memory: cannot be planned for llama (aten._local_scalar_dense.default)" in caplog.text
    assert json.loads((run / "train" / "plan.json").read_text())["memory"] == {
        "batch_tokens": 2048,
        "gradient_checkpointing": False,
        "parallel": "ddp",
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_take_what_is_planned_for_rows(compiled, monkeypatch) -> None:
    """Their log-probabilities are made once more, beside a frozen head whose plan has little room."""
    settings = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 128_000})
    asked = load(tokens=2048, scored=1024, adapter=True, compiled=compiled, dtype=HALF)
    facts = {"row_of": torch.zeros(1024, dtype=torch.long), "lengths": torch.ones(16), "reference": torch.zeros(16), "num_pairs": 8}
    rows = predict(settings, asked).peak

    def of_pairs(model, batch):
        return pair_losses(model, {**batch, **facts, "objective": "sigmoid", "beta": 0.1})[0]

    monkeypatch.setattr(head, "loss_sum", of_pairs)
    assert predict(settings, asked).peak < plan.SLACK * rows + 8e7


def test_what_cannot_be_replayed_is_one_line(tiny_model, chats, monkeypatch) -> None:
    from sftkit.train import plan as module

    told: list[object] = [GPT_OSS]
    monkeypatch.setattr(module, "load_settings", lambda _ref: told[0])
    with pytest.raises(UserError, match="memory cannot be planned for gpt_oss"):
        module.plan(chats(8), str(tiny_model), TrainConfig(), gpu="24GB")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("our own fault")

    told[0] = LLAMA
    monkeypatch.setattr(head.LinearCrossEntropy, "forward", fail)  # what is not the model's own code keeps its traceback
    with pytest.raises(RuntimeError, match="our own fault"):
        module.plan(chats(8), str(tiny_model), TrainConfig(), gpu="24GB")


def test_a_model_of_experts_is_planned_without_a_speed(tiny_model, chats, monkeypatch) -> None:
    from sftkit.train import plan as module

    monkeypatch.setattr(module, "load_settings", lambda _ref: MIXTRAL)
    found = module.plan(chats(8), str(tiny_model), TrainConfig(), gpu="H200")
    assert "speed: not known for a model of experts" in found.summary()
    assert all(each.tokens_per_second != each.tokens_per_second for each in found.options)
