"""Scores that a model gives: equal to a plain loop with transformers, whatever the batch, computed once."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.core.run import Run
from sftkit.core.values import ValueStore, value_key
from sftkit.curate.best import best
from sftkit.curate.config import ScoreConfig
from sftkit.curate.decide_config import BestConfig, FilterConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.score import parse_scorers, score

ToyRun = Callable[..., Run]

QA = [
    ("What is a thread?", "A thread shares memory."),
    ("Calculate 1+1-1", "1"),
    ("Translate: 你好，世界", "世界。 這是一個測試。"),
    ("Write a short poem about the sea", "the waves are high, the wind is low, and all the little boats must go."),
]


def options(model: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "dtype": "float32", "device": "cpu", **more}


def column(run: Run, **scorers: Any) -> dict[str, list[tuple[float | None, str]]]:
    return {name: list(frame.select("value", "detail").iter_rows()) for name, frame in score(run, ScoreConfig(scorers=scorers)).items()}


def plain_losses(folder: Path, prompt: str, answer: str, end: bool) -> tuple[float, float]:
    """Return the mean losses of the answer after its prompt, and alone after the token that begins a text: labels and model(labels=…)."""
    model, tokenizer = load_model(resolve_model(folder), dtype="float32"), load_chat(resolve_model(folder)).tokenizer
    before = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer(answer + ("<|im_end|>" if end else ""), add_special_tokens=False)["input_ids"]
    begin = tokenizer.convert_tokens_to_ids("<|im_end|>")  # the only stop token of this model, which has no bos token
    losses = []
    for context in (before, [begin]):
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(context) + ids])
            losses.append(model(input_ids=torch.tensor([context + ids]), labels=labels).loss.item())
    return losses[0], losses[1]


def test_grape_and_perplexity_are_those_of_a_plain_loop(toy_run: ToyRun, tiny_model: Path) -> None:
    run = toy_run([{"prompt": prompt, "response": answer} for prompt, answer in QA])
    found = column(run, grape=options(tiny_model), perplexity=options(tiny_model), teacher={"scorer": "logprob", **options(tiny_model)})
    for (prompt, answer), (value, detail), (power, _), (teacher, _) in zip(
        QA, found["grape"], found["perplexity"], found["teacher"], strict=True
    ):
        loss, _ = plain_losses(tiny_model, prompt, answer, end=True)
        assert detail == ""
        assert value == pytest.approx(-loss, abs=1e-5)
        assert power == pytest.approx(math.exp(loss), rel=1e-5)
        assert teacher == value


def test_both_definitions_of_ifd_are_those_of_a_plain_loop(toy_run: ToyRun, tiny_model: Path) -> None:
    run = toy_run([{"prompt": prompt, "response": answer} for prompt, answer in QA])
    found = column(run, **parse_scorers([f"ifd:model={tiny_model},dtype=float32,device=cpu"]))
    assert list(found) == ["ifd", "ifd_ppl"]
    for (prompt, answer), (ratio, _), (of_perplexities, _) in zip(QA, found["ifd"], found["ifd_ppl"], strict=True):
        given, alone = plain_losses(tiny_model, prompt, answer, end=False)
        assert ratio == pytest.approx(given / alone, rel=1e-5)
        assert of_perplexities == pytest.approx(math.exp(given - alone), rel=1e-5)


def test_ifd_keeps_what_is_below_one(toy_run: ToyRun, trained_pair: Path) -> None:
    """Where the prompt helps, the ratio is below 1 and the row is kept: Data-Juicer's default keeps 1 to 100, the others."""
    rows = [{"id": "q", "index": 0, "prompt": "Say it", "response": "A thread shares memory."}]
    rows += [{"id": "q", "index": 1, "prompt": "Say it", "response": "zq xv jk 93 %%"}]
    run = toy_run(rows)
    values = [value for value, _ in column(run, ifd=options(trained_pair))["ifd"]]
    assert values[0] is not None
    assert values[1] is not None
    assert values[0] < 1 < values[1]
    outcome = best(run, BestConfig(by=("-ifd",), gate=("ifd<1",), keep=2))
    assert outcome.kept["sample_index"].to_list() == [0]
    by_default = filter_rows(run, FilterConfig(presets=("prompt-helps",)))
    assert by_default.kept["sample_index"].to_list() == [0]
    of_all = filter_rows(toy_run([*rows, {**rows[0], "id": "p"}], "before"), FilterConfig()).kept
    assert len(of_all) == 3  # the same rows stay where the preset is not asked for


@pytest.fixture(scope="module")
def trained_pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, taught for a moment that this prompt is answered so, and that nothing else begins so."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "taught")
    model, chat = load_model(resolve_model(folder), dtype="float32"), load_chat(resolve_model(folder))
    rendered = chat.render([{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "A thread shares memory."}])
    ids = torch.tensor([rendered.ids])
    labels = torch.tensor([[token if masked else -100 for token, masked in zip(rendered.ids, rendered.mask, strict=True)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_103_rows_are_all_scored_and_alike_in_any_batch(toy_run: ToyRun, tiny_model: Path) -> None:
    """open-instruct gives each of 8 workers 12 of 103 rows, scores 96 and stops at its own assertion."""
    rows = [{"prompt": f"Count to {each}", "response": " ".join(map(str, range(each + 1)))} for each in range(103)]
    wide = column(toy_run(rows, "wide"), grape=options(tiny_model), ifd=options(tiny_model))
    single = column(toy_run(rows, "single"), grape=options(tiny_model, batch_tokens=1), ifd=options(tiny_model, batch_tokens="1"))
    assert len(wide["grape"]) == 103
    assert all(value is not None for name in wide for value, _ in wide[name])
    for name, values in wide.items():
        assert [value for value, _ in values] == pytest.approx([value for value, _ in single[name]], abs=1e-5)


def test_rows_that_cannot_be_scored_say_why_and_harm_no_other(toy_run: ToyRun, tiny_model: Path) -> None:
    run = toy_run(
        [
            {"prompt": "a", "response": None},
            {"prompt": "b", "response": "  "},
            {"prompt": "c", "response": "word " * 600},
            {"prompt": "d", "response": "fine"},
            {"prompt": "e", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 7}]},
            {
                "prompt": "f",
                "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "hm"}]}],
            },
        ]
    )
    found = column(run, grape=options(tiny_model))["grape"]
    assert [detail for _, detail in found[:4]] == ["no response", "empty answer", "too_long", ""]
    assert found[3][0] is not None
    assert all(value is None and detail for value, detail in found[4:])


def test_a_cut_answer_is_scored_without_the_end_that_it_never_had(toy_run: ToyRun, tiny_model: Path) -> None:
    row = {"id": "q", "prompt": "What is a thread?", "response": "A thread shares"}
    run = toy_run([{**row, "index": index, "finish_reason": reason} for index, reason in enumerate(("length", "stop"))])
    (cut, _), (whole, _) = column(run, grape=options(tiny_model))["grape"]
    assert cut == pytest.approx(-plain_losses(tiny_model, "What is a thread?", "A thread shares", end=False)[0], abs=1e-5)
    assert whole == pytest.approx(-plain_losses(tiny_model, "What is a thread?", "A thread shares", end=True)[0], abs=1e-5)


def test_only_the_last_answer_counts_and_what_is_before_is_its_prompt(toy_run: ToyRun, tiny_model: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b c d"), ("user", "e"), ("assistant", "f"))]
    run = toy_run([{"prompt": "a", "messages": turns}])
    chat = "a<|im_end|>\n<|im_start|>assistant\nb c d<|im_end|>\n<|im_start|>user\ne"
    ((value, _),) = column(run, grape=options(tiny_model))["grape"]
    assert value == pytest.approx(-plain_losses(tiny_model, chat, "f", end=True)[0], abs=1e-5)


def test_scoring_again_computes_only_what_is_new(toy_run: ToyRun, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftkit.core import named_models

    opened = []
    plain = named_models.open_engine
    monkeypatch.setattr(named_models, "open_engine", lambda *given: opened.append(given[0]) or plain(*given))
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in QA]
    run = toy_run(rows)
    first = column(run, ifd=options(tiny_model), ifd_ppl=options(tiny_model))
    assert len(opened) == 1  # the second definition costs nothing
    assert column(run, ifd=options(tiny_model)) == {"ifd": first["ifd"]}
    assert column(run, perplexity=options(tiny_model), grape=options(tiny_model, batch_tokens=64))
    assert len(opened) == 1  # the same log-probabilities, read otherwise
    other = shutil.copytree(tiny_model, run.path.parent / "other")
    model = load_model(resolve_model(other), dtype="float32")
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    model.save_pretrained(other)
    changed = column(run, ifd=options(other))
    assert len(opened) == 2  # other weights: nothing of the first model's is taken
    assert changed["ifd"] != first["ifd"]


PUT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from sftkit.core.values import ValueStore, value_key
store = ValueStore(Path(sys.argv[1]))
for number in range(10):
    store.put(value_key("test", number), [number, 0.5], "text")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "values.sqlite"
    assert subprocess.run([sys.executable, "-c", PUT_AND_DIE, str(path)], cwd=tmp_path).returncode == -9
    with ValueStore(path) as store:
        assert all(value_key("test", number) in store for number in range(10))
        numbers, text = store.entry(value_key("test", 7))
        assert (numbers.tolist(), text) == ([7, 0.5], "text")
        assert value_key("test", 10) not in store


def test_a_scoring_that_is_interrupted_goes_on_where_it_was(toy_run: ToyRun, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run([{"prompt": f"Count to {each}", "response": f"{each} " * 20} for each in range(30)])
    put = ValueStore.put
    done: list[str] = []

    def tired(self: ValueStore, key: str, *values: Any) -> None:
        if len(done) == 11:
            raise KeyboardInterrupt
        put(self, key, *values)
        done.append(key)

    monkeypatch.setattr(ValueStore, "put", tired)
    with pytest.raises(KeyboardInterrupt):
        column(run, grape=options(tiny_model, batch_tokens=200))
    first = set(done)
    done.clear()
    done.extend(["x"] * 12)
    assert all(value is not None for value, _ in column(run, grape=options(tiny_model))["grape"])
    assert len(done) == 12 + 30 - 11
    assert not first & set(done)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny Llama with one output and a chat template; its config pads with the end of turn, as many do."""
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "reward")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    return folder


def test_a_reward_alone_is_that_in_a_padded_batch_of_eight(toy_run: ToyRun, reward_model: Path) -> None:
    """distilabel's RewardModelScore passes no attention mask, and gives a list where a batch does not hold exactly two."""
    from transformers import AutoModelForSequenceClassification

    rows = [{"prompt": f"Question {each}", "response": "word " * (3 * each + 1)} for each in range(8)]
    together = column(toy_run(rows, "batch"), reward=options(reward_model))["reward"]
    alone = column(toy_run(rows, "alone"), reward=options(reward_model, batch_tokens=1))["reward"]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    chat = load_chat(resolve_model(reward_model))
    for row, (value, detail), (single, _) in zip(rows, together, alone, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        with torch.no_grad():
            expected = model(torch.tensor([chat.render(messages).ids])).logits
        assert isinstance(value, float)
        assert detail == ""
        assert value == pytest.approx(single, abs=1e-3)
        assert value == pytest.approx(expected.item(), abs=1e-3)
    assert len({round(value or 0, 4) for value, _ in together}) == 8


def test_a_model_that_is_no_reward_model_is_refused(toy_run: ToyRun, tiny_model: Path, tiny_base_model: Path) -> None:
    run = toy_run([{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"is no classification model: its files hold no score\.weight"):
        column(run, reward=options(tiny_model))
    with pytest.raises(UserError, match="has no chat template"):
        column(run, reward=options(tiny_base_model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grape", "scorer grape needs model"),
        ("grape:model=tiny,batch_tokens=many", "scorer grape: batch_tokens: expected a whole number, found 'many'"),
        ("grape:model=tiny,batch_tokens=0", "batch_tokens: expected a whole number above 0, found 0"),
        ("grape:model=tiny,engine=magic", "unknown value for engine 'magic'"),
        ("ifd:mode=x", r"scorer ifd: unknown option 'mode': did you mean 'model'\?"),
    ],
)
def test_wrong_options_are_told(toy_run: ToyRun, text: str, message: str) -> None:
    run = toy_run([{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=message):
        score(run, ScoreConfig(scorers=parse_scorers([text])))


def test_names_of_a_group_follow_the_name_that_is_given() -> None:
    assert list(parse_scorers(["ifd:model=x,name=small"])) == ["small", "small_ppl"]
    assert parse_scorers(["ifd:model=x,name=small"])["small_ppl"] == {"scorer": "ifd_ppl", "model": "x"}
    assert list(parse_scorers(["length"])) == ["num_chars", "num_words", "num_tokens"]


def test_the_scores_stand_in_their_files(toy_run: ToyRun, tiny_model: Path) -> None:
    run = toy_run([{"prompt": prompt, "response": answer} for prompt, answer in QA])
    column(run, grape=options(tiny_model))
    stored = pl.read_parquet(run.path / "curate" / "scores" / "grape.parquet")
    assert stored["name"].unique().to_list() == ["grape"]
    assert json.loads(json.dumps(stored["value"].to_list())) == stored["value"].to_list()
