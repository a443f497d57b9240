"""What a person does with a trained model: see whether it stops and what it says, read its card, and go on where a disk was full."""

import json
import logging
import math
import re
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from sftkit.core.chat import Chat, load_chat
from sftkit.core.config import to_mapping
from sftkit.core.engines.base import Completion
from sftkit.core.errors import UserError
from sftkit.core.files import read_json_lines, write_json_lines
from sftkit.core.formats import read_examples
from sftkit.core.models import load_model, load_tokenizer, resolve_model
from sftkit.train.account import prepare
from sftkit.train.checkpoints import last_checkpoint, mark_whole
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row
from sftkit.train.packing import Packs
from sftkit.train.parity import check_parity, checked
from sftkit.train.sampling import check_stops
from sftkit.train.sft import TrainResult, _check_settings, train
from sftkit.train.trainer import make_trainer
from sftkit.train.watch import Watch
from transformers import MixtralConfig, MixtralForCausalLM


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 3e-3, "epochs": 2.0, "validation": 0.1, "dtype": "float32", **settings})  # type: ignore[arg-type]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("sftkit"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sftkit")
    return caplog


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainResult:
    folder = tmp_path_factory.mktemp("after")
    path = folder / "sums.jsonl"
    rows = [
        {"messages": [user(f"Calculate {n}+{n}."), assistant(f"The answer is {2 * n}.")], "license": "MIT" if n % 2 else None}
        for n in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(path, str(tiny_model), folder / "run", config(epochs=6.0, samples=2, max_hours=1.0))


def test_a_model_that_stops_is_seen_to(trained: TrainResult) -> None:
    assert trained.stop_check is not None
    assert {key: trained.stop_check[key] for key in ("prompts", "stopped", "rate", "max_new_tokens", "held_out")} == {
        "prompts": 12, "stopped": 12, "rate": 1.0, "max_new_tokens": 64, "held_out": True,
    }  # fmt: skip
    assert "12 of 12 answers to held-out prompts ended within 64 tokens (100%)" in trained.summary()


def test_a_model_that_does_not_stop_is_warned_about(tiny_model: Path, chats, said: pytest.LogCaptureFixture) -> None:
    data = prepare(read_examples(chats(30)), load_chat(resolve_model(tiny_model)), config(validation=0.0), context=512)
    found = check_stops(tiny_model, data, None, "cpu")  # untrained
    assert found is not None
    assert not found.held_out
    assert found.rate < 0.5
    assert "ended within 64 tokens" in said.text
    assert "train longer or with a higher learning rate" in said.text
    assert "measured on training prompts" in said.text
    assert check_stops(tiny_model, data, 0, "cpu") is None


@pytest.mark.parametrize(("stopped", "worse"), [(30, False), (30, True), (31, False), (32, False)])
def test_a_stop_rate_below_95_percent_is_warned_about(
    tiny_model: Path, chats, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stopped: int, worse: bool
) -> None:
    """30 of 32 are 93.75 %, 31 are 96.9 %; the answers are made up, the count and the rule are not."""
    data = prepare(read_examples(chats(33)), load_chat(resolve_model(tiny_model)), config(validation=0.0), context=512)
    asked: list[int] = []

    def generate(requests):
        asked.extend(request.sampling.max_new_tokens for request in requests)
        reasons = ["stop"] * stopped + ["length"] * (32 - stopped)
        return [Completion(key=str(place), text="", token_ids=(), finish_reason=reason) for place, reason in enumerate(reasons)]

    monkeypatch.setattr("sftkit.train.sampling.open_engine", lambda *_: SimpleNamespace(generate=generate, close=lambda: None))
    found = check_stops(tiny_model, data, None, "cpu", worse=worse)
    assert found is not None
    assert asked == [64] * 32
    assert (found.prompts, found.stopped, found.rate) == (32, stopped, stopped / 32)
    warned = [each.getMessage() for each in said.records if each.levelno == logging.WARNING]
    if stopped >= 31:
        assert not warned
    else:
        cure = "" if worse else ": train longer or with a higher learning rate, or on rows whose answers are whole"
        told = "30 of 32 answers to training prompts ended within 64 tokens (94%); a model that has learned to stop does so in 95 %"
        assert warned == [told + cure]


def test_the_same_prompts_are_answered_at_each_evaluation(trained: TrainResult) -> None:
    lines = [json.loads(line) for line in (trained.run / "train" / "samples.jsonl").read_text().splitlines()]
    evaluations = [line for line in map(json.loads, (trained.run / "train" / "metrics.jsonl").open()) if "eval_loss" in line]
    assert [line["step"] for line in lines[::2]] == [line["step"] for line in evaluations]
    assert len({line["prompt"] for line in lines}) == 2
    assert lines[-1]["answer"].startswith("The answer is")
    assert not lines[0]["answer"].startswith("The answer is")
    assert lines[0]["source"].rpartition("/")[2].startswith("sums.jsonl:")


def test_samples_change_nothing_of_the_training(tmp_path: Path, tiny_model: Path, chats) -> None:
    runs = [
        train(
            chats(30),
            str(tiny_model),
            tmp_path / str(count),
            config(epochs=1.0, eval_steps=1, logging_steps=1, samples=count, stop_check=0, lora=True),
        )
        for count in (0, 3)
    ]
    losses = [[json.loads(line).get("loss") for line in (each.run / "train" / "metrics.jsonl").open()] for each in runs]
    assert losses[0] == losses[1]


def test_a_rate_that_ruins_the_model_is_told_of(tmp_path: Path, tiny_model: Path, chats, said: pytest.LogCaptureFixture) -> None:
    train(chats(16), str(tiny_model), tmp_path / "run", config(epochs=2.0, stop_check=0, learning_rate=0.5))
    assert "learning rate 0.5: is far above what models bear" in said.text
    assert "on rows that it did not learn from the model is worse than before; lower the learning rate" in said.text


def test_experts_are_saved_as_they_were_and_go_unbalanced_aloud(tmp_path: Path, tiny_model: Path, said: pytest.LogCaptureFixture) -> None:
    """SFTTrainer has a model of experts return its routers' logits for good; a saved one would raise when it generates."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=1024, num_local_experts=2, num_experts_per_tok=1, **shape))
    chat = load_chat(resolve_model(tiny_model))
    watch = Watch(tmp_path / "metrics.jsonl", chat, save_minutes=1.0)
    rows = [Row((str(n), None), list(range(n, n + 9)), [False] * 4 + [True] * 5) for n in range(4)]
    make_trainer(model, chat, rows, [], config(), checkpoints=tmp_path, device="cpu", half=None, batch_tokens=99, watch=watch)
    assert not model.config.output_router_logits
    assert model.config.router_aux_loss_coef == MixtralConfig().router_aux_loss_coef
    assert "experts are trained without a loss that balances them" in said.text


def test_what_is_sampled_can_be_read_in_any_script(tmp_path: Path) -> None:
    lines = [{"step": 0, "answer": "你好\u2028世界", "source": "caf\udce9.jsonl:1"}, {"step": 5, "answer": "\x85"}]
    write_json_lines(tmp_path / "samples.jsonl", lines)
    assert "你好" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert read_json_lines(tmp_path / "samples.jsonl") == lines


def test_the_card_tells_where_a_model_comes_from(trained: TrainResult) -> None:
    card = ModelCard((trained.model / "README.md").read_text())
    facts = card.data.to_dict()
    assert facts["pipeline_tag"] == "text-generation"
    assert "base_model" not in facts  # a folder is no model of the Hub
    assert "| sums.jsonl | 120 |" in card.text
    assert "60 rows of the data: MIT" in card.text
    assert "the highest learning rate was 0.003" in card.text
    assert "60 rows of the data say nothing of their licence" in card.text
    assert "learning_rate: 0.003" in card.text
    assert f"{trained.last_loss:.4f} at last" in card.text
    assert "| 84 | " in card.text
    assert "12 of 12 greedy answers" in card.text
    assert str(trained.run.parent) not in card.text  # nothing of this machine


def test_prompts_are_those_of_inference_and_their_digest_is_kept(trained: TrainResult, tiny_model: Path, chats) -> None:
    facts = json.loads((trained.model / "sftkit.json").read_text())
    assert facts["parity"]["rows"] == 32
    chat = load_chat(resolve_model(tiny_model))
    rows = prepare(read_examples(chats(5)), chat, config(validation=0.0), context=512).train
    assert check_parity(rows, chat) == check_parity(rows, load_chat(resolve_model(trained.model)))
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    thinking = Chat(tokenizer, name="thinking")
    rows = prepare(read_examples(chats(5)), thinking, config(validation=0.0), context=512).train
    with pytest.raises(UserError, match=r"chats\.jsonl:1: is trained on after a prompt that ends .*asked with one that ends .*<think>"):
        check_parity(rows, thinking)
    for count in (0, 1, 31, 32, 33, 63, 64, 1000):
        places = [row.key[1] for row in checked([Row(("a", place), [], []) for place in range(count)])]
        assert len(places) == min(count, 32)
        gaps = [right - left for left, right in pairwise([*places, count])]  # from the first to the end of the data
        assert not gaps or (places[0] == 0 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_long_conversations_are_cut_between_turns_and_never_in_an_answer(tiny_model: Path, chats) -> None:
    chat = load_chat(resolve_model(tiny_model))
    turns = [{"role": "system", "content": "Be brief."}]
    for n in range(8):
        turns += [user(f"Calculate {n}+{n}."), assistant(f"The answer is {2 * n}.")]
    path = chats(0, turns, [user("Explain."), assistant("It is even. " * 60)])
    data = prepare(read_examples(path), chat, config(validation=0.0, overlong="split", max_length=90), context=512)
    texts = [chat.tokenizer.decode(row.ids) for row in data.train]
    assert data.report.split == 1
    assert len(texts) > 1
    assert all(len(row.ids) <= 90 and text.startswith("<|im_start|>system\nBe brief.") for row, text in zip(data.train, texts, strict=True))
    answers = "".join(chat.tokenizer.decode([each for each in row.labels if each != -100]) for row in data.train)
    assert answers == "".join(f"The answer is {2 * n}.<|im_end|>" for n in range(8))
    assert data.report.rejected == {"over_max_length": 1}
    assert "one question and its answer alone are longer: shorten them, or raise max_length" in data.report.warnings[0]
    with pytest.raises(UserError, match="give a model with more context than 100 tokens, or give overlong: split"):
        prepare(read_examples(path), chat, config(validation=0.0), context=100)
    last = prepare(read_examples(path), chat, config(validation=0.0, overlong="split", max_length=90, train_on="last"), context=512).train
    assert [chat.tokenizer.decode([each for each in row.labels if each != -100]) for row in last] == ["The answer is 14.<|im_end|>"]
    assert "Calculate 6+6." in chat.tokenizer.decode(last[0].ids)


def test_validation_rows_that_repeat_a_training_prompt_are_named(tiny_model: Path, chats, said: pytest.LogCaptureFixture) -> None:
    rows = [[user("Calculate 1+1."), assistant(f"The answer is {n}.")] for n in range(20)]
    data = prepare(read_examples(chats(0, *rows)), load_chat(resolve_model(tiny_model)), config(), context=512)
    assert "2 rows to validate on ask what a training row asks" in said.text
    assert "sftkit curate dedup" in data.report.warnings[0]


def test_a_token_beyond_the_vocabulary_is_named_with_its_row(tiny_model: Path, chats) -> None:
    with pytest.raises(UserError, match=r"chats\.jsonl:1: its token .* is number \d+, and .* has room for 100; tokenizer and weights"):
        prepare(read_examples(chats(1)), load_chat(resolve_model(tiny_model)), config(), context=512, vocabulary=100)


def test_learning_rates_and_formats_that_cannot_work_are_said(said: pytest.LogCaptureFixture) -> None:
    for rate in (0.0, 10.0, math.nan):
        with pytest.raises(UserError, match=f"learning_rate: expected more than 0 and at most 1, found {rate:g}; 2e-5 is usual"):
            config(learning_rate=rate)
    _check_settings(config(learning_rate=0.5), "cpu", None)
    assert "learning rate 0.5: is far above what models bear" in said.text
    with pytest.raises(UserError, match="dtype bfloat16: this GPU does not compute in it; leave dtype out"):
        _check_settings(config(dtype="bfloat16"), "cuda", torch.float16)
    _check_settings(config(dtype="bfloat16"), "cpu", None)
    assert "this processor only imitates it" in said.text


def test_small_steps_are_not_lost_in_bfloat16(tmp_path: Path, tiny_model: Path, chats) -> None:
    learned = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"learning_rate": 2e-5, "dtype": dtype, "validation": 0.2, "stop_check": 0}
        before, after = train(chats(60), str(tiny_model), tmp_path / dtype, config(**settings)).validation
        learned[dtype] = before - after
    assert learned["bfloat16"] == pytest.approx(learned["float32"], rel=0.3)  # rounded to the nearest number it was less than a third


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path, tiny_model: Path, chats) -> None:
    run, data = tmp_path / "run", chats(32)
    told = {"validation": 0.0, "stop_check": 0, "save_minutes": 1e-6}
    with pytest.raises(KeyboardInterrupt, match=r"max_hours are over at step 1 of 8; a checkpoint is saved: the same command goes on"):
        train(data, str(tiny_model), run, config(**told, max_hours=1e-9))
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(to_mapping(config(**told))))
    command = [sys.executable, "-m", "sftkit", "train", "sft", data, "--model", tiny_model, "-o", run, "--config", settings]
    most = 200_000  # bytes in a file: less than the weights
    full = subprocess.run(
        [str(each) for each in command], cwd="/", capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "the disk or a quota is full; make room: the same command goes on from the last whole checkpoint" in full.stderr
    assert last_checkpoint(run / "train" / "checkpoints") == run / "train" / "checkpoints" / "checkpoint-1"
    assert train(data, str(tiny_model), run, config(**told)).steps == 8
    steps = [line["step"] for line in map(json.loads, (run / "train" / "metrics.jsonl").open()) if "loss" in line]
    assert sorted(set(steps)) == steps
    assert (steps[0], steps[-1]) == (1, 8)


def test_a_loss_that_is_no_number_names_the_rows(tmp_path: Path, tiny_model: Path, chats, monkeypatch) -> None:
    monkeypatch.setattr("sftkit.train.config.MOST_RATE", math.inf)
    wild = config(learning_rate=1e30, warmup=0.0, max_grad_norm=1e30, logging_steps=1, batch_size=4, validation=0.0)
    path = chats(16)
    with pytest.raises(UserError, match=r"is not a finite number .* it learned from .*chats\.jsonl:\d+") as error:
        train(path, str(tiny_model), tmp_path / "run", wild)
    assert "lower the learning rate" in str(error.value)
    assert not (tmp_path / "run" / "train" / "done.json").exists()
    step = int(str(error.value).split(":")[0].removeprefix("step "))
    data = prepare(read_examples(path), load_chat(resolve_model(tiny_model)), wild, context=512)
    packs = Packs(data.train, batch_size=4, batch_tokens=4096, seed=0, pad=0, epochs=2)
    assert packs.parts == 1
    packs.set_epoch((step - 1) // 4)
    rows = packs.rows()[(step - 1) % 4]
    assert {data.train[row].source for row in rows} == set(str(error.value).partition("it learned from ")[2].split(", "))


@pytest.mark.parametrize(("validation", "where"), [(0.0, r"step 1: loss .*the rows are .*chats\.jsonl:\d+"), (0.5, "step 0: eval_loss")])
def test_a_start_model_that_is_broken_is_told_from_a_rate_that_is_too_high(
    tmp_path: Path, tiny_model: Path, chats, said: pytest.LogCaptureFixture, validation: float, where: str
) -> None:
    chat, model = load_chat(resolve_model(tiny_model)), load_model(resolve_model(tiny_model))
    with torch.no_grad():
        model.get_input_embeddings().weight[chat.tokenizer("answer")["input_ids"][0]] = math.nan
    model.save_pretrained(tmp_path / "broken")
    chat.save(tmp_path / "broken")
    with pytest.raises(UserError, match="before anything was learned: some weights of the start model are none") as error:
        train(chats(16), str(tmp_path / "broken"), tmp_path / "run", config(validation=validation))
    assert re.match(where, str(error.value))
    assert "does not keep rows apart" not in said.text


def test_a_checkpoint_that_was_cut_off_or_lost_a_file_is_not_gone_on_from(tmp_path: Path, caplog) -> None:
    for step, whole in ((3, True), (12, True), (20, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            (folder / "done.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    for name in ("model.safetensors", "optimizer.pt"):
        (tmp_path / "checkpoint-20" / name).write_bytes(b"numbers")
    mark_whole(tmp_path / "checkpoint-20", 20)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert not caplog.text
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"num")
    (tmp_path / "checkpoint-20" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert "is not whole any more (model.safetensors, optimizer.pt is missing or cut)" in caplog.text


def test_where_the_last_answer_begins() -> None:
    assert Row(("a", None), [1, 2, 3, 4, 5], [False, True, False, True, True]).answer_start == 3
    assert Row(("a", None), [1, 2], [True, True]).answer_start == 0


def test_numbers_go_to_the_tracker_that_is_named(tmp_path, tiny_model, chats, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    settings = TrainConfig(trackers=("tensorboard",), logging_steps=1, stop_check=0, dtype="float32")
    run = train(chats(40), str(tiny_model), tmp_path / "run", settings).run
    events = EventAccumulator(str(run / "train" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [each.value for each in events.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in lines if "loss" in line], rel=1e-4
    )


def test_a_tracker_that_is_not_installed_is_named(tmp_path, tiny_model, chats, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker wandb: is not installed: pip install wandb"):
        train(chats(20), str(tiny_model), tmp_path / "run", TrainConfig(trackers=("wandb",)))


def test_trackio_takes_the_numbers_on_this_machine(tmp_path, tiny_model, chats, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for name in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # which reads the variable when it is imported, by TRL, too
    train(chats(40), str(tiny_model), tmp_path / "run", TrainConfig(trackers=("trackio",), logging_steps=1, stop_check=0, dtype="float32"))
    files = [*tmp_path.glob("*.db"), *tmp_path.glob("*.db-wal")]
    assert b"train/loss" in b"".join(each.read_bytes() for each in files)
    said = capsys.readouterr()
    assert "Trackio" in said.err
    assert not said.out


WANDB = """
from types import SimpleNamespace

class Config(dict):
    def update(self, values, allow_val_change=False):
        dict.update(self, values)

run, config, summary, began, lines = None, Config(), {}, [], []

def init(**told):
    global run
    began.append(told)
    run = SimpleNamespace(_label=lambda **_: None, summary=summary)

def log(numbers):
    lines.append(numbers)

def define_metric(*_, **__):
    pass

def finish():
    pass
"""


def test_wandb_is_given_the_numbers_under_the_name_of_the_run(tmp_path, tiny_model, chats, monkeypatch) -> None:
    """Its package is large and wants an account: a stand-in takes what transformers' own callback gives it."""
    stand_in = tmp_path / "packages" / "wandb"
    (stand_in / "sdk" / "lib").mkdir(parents=True)
    for folder in (stand_in / "sdk", stand_in / "sdk" / "lib"):
        (folder / "__init__.py").touch()
    (stand_in / "__init__.py").write_text(WANDB)
    (stand_in / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(stand_in.parent)
    before = set(sys.modules)
    try:
        settings = TrainConfig(trackers=("wandb",), logging_steps=1, stop_check=0, dtype="float32")
        run = train(chats(40), str(tiny_model), tmp_path / "named", settings).run
        import wandb
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "wandb":
                del sys.modules[name]
    assert [each["name"] for each in wandb.began] == ["named"]
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm"):
        assert [each[f"train/{name}"] for each in wandb.lines if f"train/{name}" in each] == [line[name] for line in lines if name in line]
    assert [each["eval/loss"] for each in wandb.lines if "eval/loss" in each] == [
        line["eval_loss"] for line in lines if "eval_loss" in line
    ]
