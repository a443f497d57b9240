"""Pairs: the same masks as fine-tuning, DPO's own loss, updates that do not depend on the memory, and a run that goes on as it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.ledger import Ledger
from sftkit.core.models import load_model, resolve_model
from sftkit.train.account import prepare
from sftkit.train.attention import use_own_attention
from sftkit.train.checkpoints import last_checkpoint
from sftkit.train.config import PreferenceConfig, TrainConfig
from sftkit.train.data import Row, fingerprint
from sftkit.train.final import answer_loss
from sftkit.train.preference import PairPacks, PreferenceTrainer
from sftkit.train.sft import train
from sftkit.train.trainer import make_trainer
from sftkit.train.watch import Watch
from trl import DPOConfig, DPOTrainer


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    turns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in turns.items()}


@pytest.fixture
def pairs(tmp_path: Path):
    """Write `count` pairs, then those given, as JSONL in TRL's conversational format."""

    def write(count: int, *more: dict[str, Any]) -> Path:
        made = [
            pair(f"Calculate {n}+{n}." + " Please." * (n % 4), f"The answer is {2 * n}.", "I do not know." + " Sorry." * (n % 3))
            for n in range(count)
        ]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*made, *more]))
        return path

    return write


def config(**settings: object) -> PreferenceConfig:
    told = {"learning_rate": 3e-4, "epochs": 2.0, "validation": 0.1, "dtype": "float32", "logging_steps": 1, "stop_check": 0}
    return PreferenceConfig(**{**told, **settings})  # type: ignore[arg-type]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in metrics(run) if "loss" in line}


def test_pairs_are_rendered_as_rows_are_and_those_without_a_lesson_are_left_out(pairs, tiny_model, tmp_path, caplog) -> None:
    chat = load_chat(resolve_model(tiny_model))
    data = pairs(
        20, pair("same?", "yes", "yes"), pair("empty?", "yes", ""), {"prompt": "hi", "completion": "no pair"}, pair("long", "x " * 600, "y")
    )
    made = prepare(read_examples(data), chat, config(validation=0.0), context=512, ledger=tmp_path / "ledger.parquet")
    assert made.report.rejected == {"same_answers": 1, "empty_answer": 1, "no_pair": 1, "over_max_length": 1}
    assert "nothing can be learned from a pair of like answers" in caplog.text
    assert "give a model with more context than 512 tokens" in caplog.text
    assert "overlong: split" not in caplog.text
    single = prepare(read_examples(data), chat, TrainConfig(validation=0.0), context=512)
    assert single.report.warnings[-1].startswith("22 rows with a rejected answer, too, which is not learned from")
    for row in made.train:
        assert isinstance(row.rejected, Row)
        assert row.prompt() == row.rejected.prompt()
        for side in row.sides():
            assert side.answer()[-1] == chat.end_of_turn
        assert chat.decode(row.answer().tolist()).startswith("The answer is")
        assert chat.decode(row.rejected.answer().tolist()).startswith("I do not know.")
    alone = [chat.render(row.messages, train_on="last") for row in made.train]
    assert [row.ids for row in made.train] == [each.ids for each in alone]
    assert [row.mask for row in made.train] == [each.mask for each in alone]
    assert made.report.tokens == sum(len(side) for row in made.train for side in row.sides())
    assert len(Ledger(tmp_path / "ledger.parquet").read()) == 24
    swapped = made.train[0]
    before = fingerprint(made.train)
    swapped.rejected = made.train[1].rejected
    assert fingerprint(made.train) != before


def perturbed_trainer(rows: list[Row], validation: list[Row], model: Path, tmp_path: Path, **settings: Any) -> PreferenceTrainer:
    """Return a trainer on `rows` whose reference is known, and whose model has moved away from it."""
    chat = load_chat(resolve_model(model))
    watch = Watch(tmp_path / "metrics.jsonl", chat, save_minutes=1e9)
    trainer = make_trainer(
        load_model(resolve_model(model), dtype="float32"), chat, rows, validation, config(**settings), checkpoints=tmp_path, device="cpu",
        half=None, batch_tokens=10_000, watch=watch, kind=PreferenceTrainer,
    )  # fmt: skip
    trainer.create_optimizer()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return trainer  # type: ignore[return-value]


def test_the_loss_is_that_of_the_paper_and_every_objective_that_of_trl(pairs, tiny_model, tmp_path, monkeypatch) -> None:
    """DPO's equation 7, by hand: -log sigmoid(beta · (gain of the better answer - gain of the worse)); gradients as TRL's."""
    chat = load_chat(resolve_model(tiny_model))
    rows = prepare(read_examples(pairs(6)), chat, config(validation=0.0), context=512).train
    trainer = perturbed_trainer(rows, [], tiny_model, tmp_path, beta=0.2, batch_size=6)
    start = load_model(resolve_model(tiny_model), dtype="float32")
    batch = next(iter(trainer.get_train_dataloader()))
    found = float(trainer.model(packed={**batch, **trainer.learning})[0].detach()) / 6

    def gain(row: Row) -> float:
        likelihoods = [-answer_loss(each, [row]) * sum(row.mask[1:]) for each in (trainer.model, start)]
        return likelihoods[0] - likelihoods[1]

    margins = torch.tensor([gain(row) - gain(row.rejected) for row in rows if row.rejected])
    assert found == pytest.approx(float(-torch.nn.functional.logsigmoid(0.2 * margins).mean()), abs=2e-5)

    told = {"prompt_ids": [row.ids[: row.answer_start] for row in rows], "chosen_ids": [row.answer().tolist() for row in rows]}
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset)
    theirs = DPOTrainer(
        model=load_model(resolve_model(tiny_model), dtype="float32"),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.2, bf16=False, use_cpu=True, max_length=None, report_to="none",
                       per_device_train_batch_size=6, gradient_checkpointing=False, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_dict({**told, "rejected_ids": [row.rejected.answer().tolist() for row in rows if row.rejected]}),
        processing_class=chat.tokenizer,
    )  # fmt: skip
    theirs.model.load_state_dict(trainer.model.state_dict())
    padded = next(iter(theirs.get_train_dataloader()))
    for objective in ("sigmoid", "ipo", "hinge"):
        theirs.loss_types = [objective]
        right = theirs.compute_loss(theirs.model, padded)
        mine = trainer.model(packed={**batch, **trainer.learning, "objective": objective})[0] / 6
        assert float(mine.detach()) == pytest.approx(float(right.detach()), rel=1e-5), objective
        slopes = [torch.autograd.grad(loss, list(each.model.parameters())) for loss, each in ((right, theirs), (mine, trainer))]
        for one, other in zip(*slopes, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), objective


def test_pairs_in_one_shape_and_each_alone_have_the_same_loss(pairs, tiny_model, tmp_path) -> None:
    """As compiled code and as models that mix rows take them, with packs that hold no pair."""
    chat = load_chat(resolve_model(tiny_model))
    rows = prepare(read_examples(pairs(5)), chat, config(validation=0.0), context=512).train
    trainer = perturbed_trainer(rows, rows[:2], tiny_model, tmp_path, batch_size=4)
    packed = float(trainer.evaluate()["eval_loss"])
    assert trainer.validation is not None
    trainer.validation.pad_to(trainer.validation.largest_shape())
    shaped = trainer.validation[0]
    assert shaped["input_ids"].shape[1] % 128 == 0
    assert len(shaped["cu_seq_lens_q"]) > 5  # two pairs, and what fills up
    assert float(trainer.evaluate()["eval_loss"]) == pytest.approx(packed, abs=1e-5)
    apart = PairPacks(rows[:2], batch_size=2, batch_tokens=1, seed=0, pad=chat.pad_id, alone=True, workers=4)
    apart.reference = trainer.validation.reference
    trainer.validation = apart
    assert len(apart) == 4
    assert [batch["num_pairs"] for batch in map(apart.__getitem__, range(4))] == [1, 1, 0, 0]
    use_own_attention(trainer.model)
    assert float(trainer.evaluate()["eval_loss"]) == pytest.approx(packed, abs=1e-5)


def test_an_answer_without_a_prompt_does_not_end_with_the_first_token_of_the_other() -> None:
    better, worse = Row(("a", None), [5, 6, 7], [True] * 3), Row(("a", None), [8, 9], [True] * 2)
    better.rejected = worse
    pack = PairPacks([better], batch_size=1, batch_tokens=9, seed=0, pad=0)[0]
    assert pack["targets"].tolist() == [6, 7, 9]
    assert pack["row_of"].tolist() == [0, 0, 1]


def test_it_learns_the_better_answer_and_the_saved_model_is_the_trained_one(pairs, tiny_model, cli, tmp_path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("{validation: 0.1, stop_check: 4, learning_rate: 1e-3, epochs: 3}")  # in 16 bits, where the processor can
    code, out, err = cli("train", "preference", pairs(60), "--model", tiny_model, "-o", tmp_path / "run", "--config", settings)
    assert code == 0, err
    assert "validation pairs: the better answer gained on the worse in 100%" in out
    results = json.loads((tmp_path / "run" / "train" / "results.json").read_text())
    assert results["validation"][0] == pytest.approx(math.log(2), abs=1e-6)  # nothing is preferred yet
    assert results["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert results["validation"][1] < 0.5
    assert "loaded again by a fresh process, its loss" in err
    card = (tmp_path / "run" / "train" / "final" / "README.md").read_text()
    assert "- dpo" in card
    assert "sftkit train preference" in card
    assert (tmp_path / "run" / "train" / "done.json").exists()


def test_an_update_does_not_depend_on_the_memory(pairs, tiny_model, tmp_path) -> None:
    data = pairs(30)  # 30 pairs in updates of 8: the last is not full
    runs = {}
    for name, tokens in (("whole", 8192), ("parts", 1)):
        run = train(data, str(tiny_model), tmp_path / name, config(batch_size=8, batch_tokens=tokens, validation=0.0, epochs=1.0)).run
        runs[name] = losses(run)
        assert "(of a pair)" in (run / "train" / "final" / "README.md").read_text()  # though none was validated on
    assert len(runs["whole"]) == 4
    assert list(runs["parts"].values()) == pytest.approx(list(runs["whole"].values()), abs=1e-5)


def test_stopped_and_gone_on_the_losses_are_those_of_a_run_in_one_piece(pairs, tiny_model, tmp_path, monkeypatch) -> None:
    data = pairs(50)
    whole = train(data, str(tiny_model), tmp_path / "whole", config()).run
    end = Watch.on_step_end

    def stop(self: Watch, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.stopped = state.global_step == 4
        end(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(data, str(tiny_model), tmp_path / "run", config())
    assert str(last_checkpoint(tmp_path / "run" / "train" / "checkpoints")).endswith("checkpoint-4")
    monkeypatch.setattr(Watch, "on_step_end", end)
    run = train(data, str(tiny_model), tmp_path / "run", config()).run
    assert losses(run) == pytest.approx(losses(whole), abs=1e-6)
    assert [line["num_tokens"] for line in metrics(run) if "loss" in line] == [
        line["num_tokens"] for line in metrics(whole) if "loss" in line
    ]


def test_an_adapter_is_held_against_its_base(pairs, tiny_model, tmp_path) -> None:
    run = train(pairs(40), str(tiny_model), tmp_path / "run", config(lora=True, learning_rate=1e-2)).run
    results = json.loads((run / "train" / "results.json").read_text())
    assert results["validation"][0] == pytest.approx(0.6931, abs=1e-3)
    assert results["validation"][1] < results["validation"][0]
    assert (run / "train" / "adapter" / "adapter_model.safetensors").exists()


def test_data_and_settings_that_make_no_sense_are_refused(chats, tiny_model, tmp_path) -> None:
    with pytest.raises(UserError, match=r"none of the 12 rows can be trained on: no_pair 12.*chosen and a rejected answer"):
        train(chats(12), str(tiny_model), tmp_path / "run", config())
    with pytest.raises(UserError, match="beta: expected more than 0"):
        config(beta=0.0)
    with pytest.raises(UserError, match="not for pairs"):
        config(overlong="split")


def test_the_help_says_the_rates_of_pairs_and_not_those_of_single_answers(cli) -> None:
    code, out, _ = cli("train", "preference", "--help")
    told = " ".join(out.split())
    assert code == 0
    assert "1e-6, with LoRA 1e-5, when not given" in told
    assert (PreferenceConfig().rate, PreferenceConfig(lora=True).rate) == (1e-6, 1e-5)
    assert "2e-" not in told
