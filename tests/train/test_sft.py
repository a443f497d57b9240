"""Training a tiny model for real: it learns, it goes on after any stop as if nothing had happened, and what is saved stops."""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.config import load_config, read_yaml
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.train.checkpoints import last_checkpoint
from sftkit.train.config import CLASSIC, TrainConfig, recipe_settings
from sftkit.train.sft import TrainResult, train
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger(__name__)


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 3e-3, "epochs": 2.0, "validation": 0.1, "dtype": "float32", **settings})  # type: ignore[arg-type]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[TrainResult, Path]:
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"Calculate {n}+{n}."}, {"role": "assistant", "content": f"The answer is {2 * n}."}]
        for n in range(120)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
    return train(path, str(tiny_model), folder / "run", config(epochs=6.0)), path


def test_it_learns_and_says_so(trained: tuple[TrainResult, Path]) -> None:
    result, _ = trained
    assert result.validation is not None
    before, after = result.validation
    assert after < before - 2
    assert (result.rows, result.steps) == (108, 84)
    lines = metrics(result.run)
    steps = [line for line in lines if "loss" in line]
    assert (steps[0]["step"], steps[-1]["step"]) == (1, 84)
    assert steps[-1]["num_tokens"] == result.tokens
    assert all(line["tokens_per_second"] > 0 for line in steps)
    assert f"{result.tokens:,} tokens" in result.summary()
    assert {each.name for each in (result.run / "train").iterdir()} == {
        "plan.json", "preview.html", "ledger.parquet", "metrics.jsonl", "final", "results.json", "done.json",
    }  # fmt: skip


def test_validation_loss_is_that_of_all_tokens_divided_once(trained: tuple[TrainResult, Path], tiny_model: Path) -> None:
    from sftkit.core.formats import read_examples
    from sftkit.train.account import prepare
    from sftkit.train.final import answer_loss

    result, path = trained
    chat = load_chat(resolve_model(tiny_model))
    data = prepare(read_examples(path), chat, config(epochs=6.0), context=512)
    assert result.validation is not None
    assert answer_loss(load_model(resolve_model(tiny_model)), data.validation) == pytest.approx(result.validation[0], rel=1e-5)
    assert answer_loss(load_model(resolve_model(result.model)), data.validation) == pytest.approx(result.validation[1], rel=1e-4)


def test_the_saved_model_renders_as_it_was_trained_and_stops(trained: tuple[TrainResult, Path], tiny_model: Path) -> None:
    result, _ = trained
    started, saved = (load_chat(resolve_model(each)) for each in (tiny_model, result.run))
    assert saved.fingerprint() == started.fingerprint()
    generation = json.loads((result.model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(started.stop_ids)
    assert generation["pad_token_id"] == started.pad_id
    assert started.pad_id not in generation["eos_token_id"]
    assert json.loads((result.model / "sftkit.json").read_text())["template"] == started.fingerprint()
    engine = open_engine(str(result.run), EngineConfig(engine="transformers", device="cpu"))
    prompts = [[{"role": "user", "content": f"Calculate {n}+{n}."}] for n in range(200, 208)]
    requests = [
        Request(
            key=str(n), prompt_ids=tuple(saved.prompt(each)), messages=each, sampling=Sampling(temperature=0, max_new_tokens=40), seed=0
        )
        for n, each in enumerate(prompts)
    ]
    answers = list(engine.generate(requests))
    assert [each.finish_reason for each in answers] == ["stop"] * 8
    assert all(each.text.startswith("The answer is ") for each in answers)


def test_done_is_done(trained: tuple[TrainResult, Path], tiny_model: Path) -> None:
    result, path = trained
    before = (result.model / "model.safetensors").stat().st_mtime_ns
    assert train(path, str(tiny_model), result.run, config(epochs=6.0)) == result
    assert (result.model / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"another run \(train\.epochs was 6\.0, now 5\.0\)"):
        train(path, str(tiny_model), result.run, config(epochs=5.0))
    path.write_text(path.read_text().replace("The answer", "An answer", 1))
    with pytest.raises(UserError, match=r"another run \(train\.rows was"):
        train(path, str(tiny_model), result.run, config(epochs=6.0))
    other = path.with_name("other.jsonl")
    other.write_text(path.read_text())
    with pytest.raises(UserError, match=r"another run \(train\.data was '.*chats\.jsonl', now '.*other\.jsonl'; train\.rows was"):
        train(other, str(tiny_model), result.run, config(epochs=6.0))


def test_steps_in_many_forward_passes_equal_those_in_one_to_the_token(tmp_path: Path, tiny_model: Path, chats) -> None:
    data = chats(27)  # 27 rows in steps of 8: the last window is not full
    runs = {}
    for name, tokens in (("whole", 4096), ("parts", 1)):
        settings = config(batch_size=8, batch_tokens=tokens, validation=0.0, logging_steps=1, epochs=1.0, seed=5)
        runs[name] = train(data, str(tiny_model), tmp_path / name, settings)
    losses = {name: [line["loss"] for line in metrics(result.run) if "loss" in line] for name, result in runs.items()}
    assert len(losses["whole"]) == 4
    assert losses["parts"] == pytest.approx(losses["whole"], abs=2e-5)
    whole, parts = (load_model(resolve_model(runs[name].model)).state_dict() for name in ("whole", "parts"))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-3  # AdamW divides rounding by rounding


def test_an_adapter_is_merged_and_saved_beside_the_model(tmp_path: Path, tiny_model: Path, chats) -> None:
    result = train(chats(40), str(tiny_model), tmp_path / "run", config(lora=True, learning_rate=1e-2))
    adapter = result.run / "train" / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()
    assert not (result.model / "adapter_config.json").exists()
    assert result.validation is not None
    assert result.validation[1] < result.validation[0]
    from peft import PeftModel

    ids = torch.tensor([load_chat(resolve_model(tiny_model)).prompt([{"role": "user", "content": "hi"}])])
    with torch.no_grad():
        apart = PeftModel.from_pretrained(load_model(resolve_model(tiny_model)), adapter).eval()(ids).logits
        merged = load_model(resolve_model(result.run))(ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)
    # the adapter was asked outside of autocast, as the merged model is
    assert json.loads((result.model / "sftkit.json").read_text())["merged"]["kl"] < 1e-6


@pytest.mark.parametrize(("init", "kept"), [("prune:1", [0, 2, 3, 4, 5]), ("prune:0-1,4", [2, 3, 5])])
def test_layers_are_taken_out_of_the_start(tmp_path: Path, tiny_model: Path, chats, init: str, kept: list[int]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    load_chat(resolve_model(tiny_model)).save(tmp_path / "six")
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).save_pretrained(tmp_path / "six")
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"init": init, "stop_check": 0, "validation": 0.0, "dtype": "float32"}))
    result = train(chats(12), str(tmp_path / "six"), tmp_path / "run", load_config(TrainConfig, read_yaml(settings), str(settings)))
    assert json.loads((result.model / "config.json").read_text())["num_hidden_layers"] == len(kept)
    before, start, after = (
        load_model(resolve_model(each)).state_dict() for each in (tmp_path / "six", result.run / "train" / "start", result.model)
    )
    assert start.keys() == after.keys()
    assert len({name.split(".")[2] for name in start if ".layers." in name}) == len(kept)
    for name, weight in start.items():
        part = name.split(".")
        if "layers" in part:
            part[2] = str(kept[int(part[2])])
        assert torch.equal(weight, before[".".join(part)]), name
        assert (after[name] - weight).abs().max() < 1e-3, name  # trained on from there: two steps of 2e-5
    assert not all(torch.equal(weight, after[name]) for name, weight in start.items())


def test_killed_at_any_instant_and_gone_on_it_is_the_run_in_one_piece_to_the_last_digit(tmp_path: Path, tiny_model: Path, chats) -> None:
    data, run = chats(150), tmp_path / "run"
    settings = config(logging_steps=1, save_minutes=1e-6)  # a checkpoint after every step
    whole = train(data, str(tiny_model), tmp_path / "whole", config(logging_steps=1))
    seed = random.SystemRandom().randrange(10**6)  # training seeds the other one
    log.warning("seed %d", seed)  # shown where the test fails
    drawn = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sftkit.train.sft", "sftkit.train.trainer"])  # imported once
    for step in sorted(drawn.sample(range(whole.steps - 8), 2)):  # 0: before the first checkpoint, perhaps
        process = context.Process(target=train, args=(data, str(tiny_model), run, settings))
        process.start()
        deadline = time.monotonic() + 90
        while not (run / "train" / "metrics.jsonl").exists() or last_step(run) < step:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(drawn.uniform(0, 0.15))  # within a step, or within a checkpoint that is being written
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        log.warning("killed from step %d on: the last whole checkpoint is %d", step, last_step(run))
    gone_on = train(data, str(tiny_model), run, settings)
    told = [[{name: line[name] for name in line if name not in TIMED} for line in metrics(each)] for each in (whole.run, run)]
    assert told[0] == told[1]
    assert len(told[0]) == whole.steps + 3
    one, other = (load_model(resolve_model(each.model)).state_dict() for each in (whole, gone_on))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


TIMED = {"seconds", "tokens_per_second"}


def last_step(run: Path) -> int:
    last = last_checkpoint(run / "train" / "checkpoints")
    return int(last.name.partition("-")[2]) if last else 0


def test_experts_that_were_trained_are_gone_on_from(tmp_path: Path, tiny_model: Path, chats, monkeypatch) -> None:
    """Checkpoints of transformers name each expert as the Hub's files do, by names that its trainer reads none of."""
    from sftkit.train.watch import Watch
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    start = load_chat(resolve_model(tiny_model))
    start.save(tmp_path / "start")
    MixtralForCausalLM(MixtralConfig(vocab_size=1024, num_local_experts=2, num_experts_per_tok=1, **shape)).save_pretrained(
        tmp_path / "start"
    )
    data, settings = chats(16), config(epochs=1.0, logging_steps=1, batch_size=4, validation=0.0, stop_check=0, learning_rate=1e-2)
    whole = train(data, str(tmp_path / "start"), tmp_path / "whole", settings)
    plain = Watch.on_step_end

    def stop(self: Watch, args: object, state, control: object, **told: object) -> None:
        self.stopped = state.global_step == 2
        plain(self, args, state, control, **told)

    monkeypatch.setattr(Watch, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(data, str(tmp_path / "start"), tmp_path / "run", settings)
    monkeypatch.undo()
    assert train(data, str(tmp_path / "start"), tmp_path / "run", settings).last_loss == pytest.approx(whole.last_loss, abs=1e-5)


def test_asked_to_stop_it_saves_first(tmp_path: Path, tiny_model: Path, chats) -> None:
    run = tmp_path / "run"
    arguments = [chats(400), "--model", tiny_model, "-o", run, "--epochs", 20, "--learning-rate", 1e-3]
    command = [sys.executable, "-m", "sftkit", "train", "sft", *map(str, arguments)]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 90
    while not (run / "train" / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "goes on from here" in err
    saved = last_checkpoint(run / "train" / "checkpoints")
    assert saved is not None
    assert int(saved.name.split("-")[1]) == metrics(run)[-1]["step"]


def test_asked_to_stop_after_the_last_step_the_model_is_saved_and_nothing_is_trained_again(
    tmp_path: Path, tiny_model: Path, chats, monkeypatch, caplog
) -> None:
    from sftkit.train import final, sampling, sft, trainer
    from sftkit.train.stops import AFTER_SAVING

    def asked(number: int, calls: list[str], name: str, real):
        def call(*arguments: object, **named: object):
            calls.append(name)
            if calls.count(name) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments, **named)

        return call

    caplog.set_level("INFO", logger="sftkit")
    data, calls = chats(40), []
    places = {"evaluate": (trainer.Trainer, 2), "save_model": (final, 1), "check_stops": (sampling, 1)}  # 2: after the last step
    for name, (place, number) in places.items():
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, asked(number, calls, name, getattr(place, name)))
            with pytest.raises(KeyboardInterrupt):
                train(data, str(tiny_model), tmp_path / name, config(epochs=1.0))
        told = [each for each in caplog.messages if each.startswith("stopping ")]
        assert told == ([] if name == "check_stops" else [AFTER_SAVING])
        assert (tmp_path / name / "train" / "saved.json").exists()
        with monkeypatch.context() as patch:
            patch.setattr(sft, "_trained", lambda *_: pytest.fail("trained again"))
            result = train(data, str(tiny_model), tmp_path / name, config(epochs=1.0))
        assert (result.steps, result.stop_check is not None) == (5, True)
        assert not (tmp_path / name / "train" / "saved.json").exists()


def test_a_folder_in_which_nothing_was_trained_takes_other_settings(tmp_path: Path, tiny_model: Path, chats, monkeypatch, caplog) -> None:
    from sftkit.train import local

    caplog.set_level("INFO", logger="sftkit")
    with monkeypatch.context() as patch:
        patch.setattr(local, "run_trainer", lambda *_: pytest.fail("this way", pytrace=False))
        with pytest.raises(pytest.fail.Exception):
            train(chats(40), str(tiny_model), tmp_path / "run", config(init="prune:0"))
    result = train(chats(30), str(tiny_model), tmp_path / "run", config(init="prune:1", epochs=1.0))
    assert "nothing was trained here yet, it begins anew with other settings (epochs, init, rows)" in caplog.text
    kept, pruned = (load_model(resolve_model(each)).state_dict() for each in (tiny_model, result.run / "train" / "start"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(kept[name], pruned[name])


def test_a_run_that_is_refused_leaves_the_ledger_of_the_one_that_stands_there(tmp_path: Path, tiny_model: Path, chats) -> None:
    train(chats(12), str(tiny_model), tmp_path / "run", config(epochs=1.0))
    before = (tmp_path / "run" / "train" / "ledger.parquet").read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        train(chats(30), str(tiny_model), tmp_path / "run", config(epochs=1.0))
    assert (tmp_path / "run" / "train" / "ledger.parquet").read_bytes() == before
    assert not list((tmp_path / "run" / "train").glob(".*"))


def test_a_model_that_became_worse_is_not_said_to_need_more(tmp_path: Path, tiny_model: Path, chats, caplog) -> None:
    train(chats(40), str(tiny_model), tmp_path / "run", config(learning_rate=0.5, epochs=1.0))
    assert "validation loss rose from" in caplog.text
    assert "train longer" not in caplog.text


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, tiny_model: Path, chats) -> None:
    for settings, message in (
        ({"init": "prune:0-1"}, "all 2 layers would be taken out"),
        ({"init": "prune:7"}, "there is no layer 7"),
        ({"init": "shrink"}, "expected prune:FIRST-LAST"),
        ({"init": "prune:0-99999999999"}, "expected prune:FIRST-LAST"),  # which took all memory there was
    ):
        with pytest.raises(UserError, match=message):
            train(chats(20), str(tiny_model), tmp_path / "run", config(**settings))
        assert not (tmp_path / "run").exists()
    wrong = {"epochs": 0.0, "learning_rate": -1.0, "validation": 1.0, "batch_size": 0, "max_grad_norm": -1.0, "seed": 2**32}
    for settings in ({name: value} for name, value in wrong.items()):
        with pytest.raises(UserError, match=next(iter(settings))):
            config(**settings)


def test_the_classic_recipe() -> None:
    assert recipe_settings("classic", gpu=True) == CLASSIC
    assert recipe_settings("classic", gpu=False) == {**CLASSIC, "limit": 100}
    classic = TrainConfig(**CLASSIC)
    assert (classic.rate, classic.epochs, classic.batch_size, classic.logging_steps) == (8e-5, 1.0, 8, 2)
    assert not classic.gradient_checkpointing
    with pytest.raises(UserError, match="did you mean 'classic'"):
        recipe_settings("clasic", gpu=True)


def test_layers_that_share_weights_are_not_taken_out_and_nothing_is_written() -> None:
    from sftkit.train.init import check_init
    from transformers import AutoConfig

    for kind in ("gemma3n_text", "gemma4_text"):
        settings = AutoConfig.for_model(kind)
        with pytest.raises(UserError, match=f"layers of {kind} cannot be taken out, they share"):
            check_init("prune:1-2", settings)
    check_init("prune:1-2", AutoConfig.for_model("gemma3_text"))
