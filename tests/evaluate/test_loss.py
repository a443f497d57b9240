"""The held-out loss is the one of a plain forward pass, over the same rows for all models, and is computed once."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sftkit.core.chat import load_chat
from sftkit.core.config import load_config
from sftkit.core.errors import UserError
from sftkit.core.models import load_model, resolve_model
from sftkit.core.run import is_done, read_done
from sftkit.evaluate.compare import compare
from sftkit.evaluate.config import CompareConfig, LossConfig
from sftkit.evaluate.loss import loss

CPU = {"engine": {"engine": "transformers", "dtype": "float32", "device": "cpu"}}


def settings(**changes: Any) -> LossConfig:
    return load_config(LossConfig, {"resamples": 2000, **CPU, **changes})


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


ROWS = [
    turns("What is a thread?", "A thread shares memory."),
    turns("Calculate 1+1-1", "1"),
    turns("Translate: 你好", "世界。 這是一個測試。", "And now?", "The waves are high, the wind is low."),
    turns("What is a process?", "The answer is 1."),
    turns("Write a short poem about the sea", "The answer is 1."),
]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "heldout.jsonl", ROWS)


def plain_losses(folder: Path, messages: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Return -ln p of the tokens of the answers' texts and of their ends: one row, one forward, text tokenised piece by piece."""
    import torch

    ref = resolve_model(folder)
    model, tokenizer = load_model(ref, dtype="float32"), load_chat(ref).tokenizer
    ids: list[int] = []
    kinds: list[str] = []
    for message in messages:
        ends = "text" if message["role"] == "assistant" else ""
        pieces = [(f"<|im_start|>{message['role']}\n", ""), (message["content"], ends), ("<|im_end|>", ends and "end"), ("\n", "")]
        for text, kind in pieces:
            coded = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += coded
            kinds += [kind] * len(coded)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = [-logprobs[place - 1, token].item() if place else 0.0 for place, token in enumerate(ids)]
    return [n for n, kind in zip(nats, kinds, strict=True) if kind == "text"], [n for n, k in zip(nats, kinds, strict=True) if k == "end"]


def test_the_loss_is_that_of_a_plain_forward_pass(tmp_path: Path, tiny_model: Path, heldout: Path) -> None:
    run = tmp_path / "run"
    result = loss(heldout, {"base": str(tiny_model)}, run, settings())
    table = pl.read_parquet(run / "evaluate" / "losses.parquet")
    texts, ends, means, num_bytes = [], [], [], 0
    for row, line in zip(ROWS, table.iter_rows(named=True), strict=True):
        text, end = plain_losses(tiny_model, row["messages"])
        answers = [each["content"] for each in row["messages"] if each["role"] == "assistant"]
        assert len(end) == len(answers) == line["num_ends"]
        assert line["num_tokens"] == len(text) + len(end)
        assert line["num_bytes"] == sum(len(each.encode()) for each in answers)
        assert line["sum_logprob"] == pytest.approx(-sum(text) - sum(end), rel=1e-5)
        assert line["end_logprob"] == pytest.approx(-sum(end), rel=1e-5)
        texts += text
        ends += end
        means.append(np.mean([*text, *end]))
        num_bytes += line["num_bytes"]
    (model,) = result.models
    assert result.differences == []
    assert model.tokens == len(texts) + len(ends)
    assert model.loss.value == pytest.approx(np.mean(texts + ends), rel=1e-5)
    assert model.macro_loss == pytest.approx(np.mean(means), rel=1e-5)
    assert model.bits_per_byte.value == pytest.approx(sum(texts + ends) / math.log(2) / num_bytes, rel=1e-5)
    assert model.text_loss == pytest.approx(np.mean(texts), rel=1e-5)
    assert model.end_loss == pytest.approx(np.mean(ends), rel=1e-5)
    assert (result.rows, result.used, result.prompts, result.num_bytes) == (5, 5, 5, num_bytes)
    assert json.loads((run / "evaluate" / "results.json").read_text())["loss"] == json.loads(json.dumps(result.facts()))


def test_a_trained_model_is_better_and_the_first_is_what_it_is_compared_with(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    heldout = write_rows(tmp_path / "h.jsonl", [turns(f"What is {number} and {number}?", "The answer is 1.") for number in range(12)])
    result = loss(heldout, {"base": str(tiny_model), "sft": str(trained_model)}, tmp_path / "run", settings(resamples=5000))
    base, sft = result.models
    (difference,) = result.differences
    assert (difference.model, difference.baseline) == ("sft", "base")
    assert difference.loss is not None
    assert difference.loss.interval is not None
    assert difference.loss.value == pytest.approx(sft.loss.value - base.loss.value)
    assert difference.bits_per_byte.value == pytest.approx(sft.bits_per_byte.value - base.bits_per_byte.value)
    assert difference.loss.interval.high < 0
    assert difference.shown
    assert difference.p_value == 2 / 2**12  # better on every prompt
    assert difference.rows_better == 12
    assert sft.end_loss is not None
    assert base.end_loss is not None
    assert sft.end_loss < base.end_loss  # it learnt to stop
    said = result.summary()
    assert "sft is better" in said
    assert "12 prompts are few" in said
    (turned,) = loss(heldout, {"sft": str(trained_model), "base": str(tiny_model)}, None, settings()).differences
    assert turned.loss is not None
    assert turned.loss.value == pytest.approx(-difference.loss.value)


def test_a_model_is_no_better_than_itself(tiny_model: Path, heldout: Path) -> None:
    (difference,) = loss(heldout, {"a": str(tiny_model), "b": str(tiny_model)}, None, settings()).differences
    assert difference.loss is not None
    assert difference.loss.value == 0.0
    assert not difference.shown
    assert (difference.p_value, difference.rows_better) == (1.0, 0)


def test_other_tokens_are_compared_by_bits_per_byte_alone(tmp_path: Path, tiny_model: Path, heldout: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:60]
    path.write_text(json.dumps(tokenizer))
    result = loss(heldout, {"base": str(tiny_model), "other": str(other)}, None, settings())
    (difference,) = result.differences
    assert result.models[1].tokens > result.models[0].tokens
    assert difference.loss is None
    first, second = (each.bits_per_byte.value for each in result.models)
    assert difference.bits_per_byte.value == pytest.approx(second - first)
    assert "loss" not in result.summary().splitlines()[-2]


def test_a_row_counts_for_all_models_or_for_none(
    tmp_path: Path, tiny_model: Path, trained_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = shutil.copytree(trained_model, tmp_path / "short")
    path = short / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 60}))
    system = {"messages": [{"role": "system", "content": "Be brief."}, *ROWS[0]["messages"]]}
    template = short / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        *ROWS[:2],
        turns("long", "the sea " * 40),
        turns("longer", "the sea " * 900),
        turns("What is a question?"),
        turns("Say nothing", " "),
        system,
        {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]},  # which the template leaves out
    ]
    heldout = write_rows(tmp_path / "h.jsonl", rows)
    run = tmp_path / "run"
    result = loss(heldout, {"base": str(tiny_model), "short": str(short)}, run, settings())
    assert result.left_out == {
        "too_long for short": 1,
        "too_long": 1,
        "no_assistant_turn": 1,
        "empty_answer": 1,
        "refused_by_template for short": 1,
        "calls_left_out": 1,
    }
    assert (result.rows, result.used) == (8, 2)
    assert f"1 no_assistant_turn, the first is {heldout}:5" in caplog.text
    assert "no system message here" in caplog.text
    assert [each.tokens for each in result.models] == [result.models[0].tokens] * 2
    table = pl.read_parquet(run / "evaluate" / "losses.parquet")
    assert table.filter(pl.col("model") == "base")["left_out"].to_list() == table.filter(pl.col("model") == "short")["left_out"].to_list()
    # what could be scored is there to be read, though it does not count
    assert table.filter((pl.col("model") == "base") & pl.col("sum_logprob").is_not_null()).height == 4
    assert table.filter(pl.col("model") == "short")["error"].to_list() == [
        None, None, "too_long", "too_long", "no_assistant_turn", "empty_answer", "refused_by_template", "calls_left_out",
    ]  # fmt: skip
    used = table.filter(pl.col("left_out").is_null())
    assert result.num_bytes == used.filter(pl.col("model") == "base")["num_bytes"].sum()


def test_rows_without_an_answer_end_in_one_line_that_names_the_first(tmp_path: Path, tiny_model: Path) -> None:
    heldout = write_rows(tmp_path / "h.jsonl", [{"prompt": "What?"}, {"prompt": "Why?"}])
    with pytest.raises(UserError, match=r"h\.jsonl:1: this and all other rows have no answer to score \(2 no_assistant_turn\)"):
        loss(heldout, {"m": str(tiny_model)}, tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()
    heldout = write_rows(tmp_path / "h.jsonl", [turns("long", "the sea " * 900)])
    with pytest.raises(UserError, match=r"h\.jsonl: no row of 1 can be scored with every model: 1 too_long"):
        loss(heldout, {"m": str(tiny_model)}, tmp_path / "run", settings())


def test_samples_of_one_prompt_are_drawn_together(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    rows = [turns(f"What is {number}?", answer) for number in range(3) for answer in ("1", "The answer is 1.", "The sea.")]
    heldout = write_rows(tmp_path / "h.jsonl", rows)
    result = loss(heldout, {"base": str(tiny_model), "sft": str(trained_model)}, tmp_path / "run", settings())
    assert (result.used, result.prompts) == (9, 3)
    assert result.differences[0].p_value >= 2 / 2**3  # three prompts, however many answers
    table = pl.read_parquet(tmp_path / "run" / "evaluate" / "losses.parquet")
    assert table.filter(pl.col("model") == "base").group_by("prompt_id").len()["len"].to_list() == [3, 3, 3]
    one = loss(heldout, {"base": str(tiny_model)}, None, settings(limit=3))
    assert (one.prompts, one.models[0].loss.interval) == (1, None)
    assert "one prompt" in one.summary()


def test_each_source_has_its_loss(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{**row, "source": "long" if len(row["messages"]) > 2 or number == 0 else "short"} for number, row in enumerate(ROWS)]
    result = loss(write_rows(tmp_path / "rows.jsonl", rows), {"base": str(tiny_model)}, None, settings())
    long = loss(write_rows(tmp_path / "long.jsonl", [ROWS[0], ROWS[2]]), {"base": str(tiny_model)}, None, settings())
    (model,) = result.models
    assert sorted(model.by_source) == ["long", "short"]
    assert model.by_source["long"].value == pytest.approx(long.models[0].loss.value, abs=1e-4)
    assert long.models[0].by_source == {}
    assert "loss by source" in result.summary()
    assert "loss by source" not in long.summary()


def test_each_turn_has_its_loss_and_the_turns_are_the_whole(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    rows = [turns("hi", "hello"), turns("hi", "hello", "and?", "The sea."), turns("1+1", "2", "2+2", "4", "3+3", "The answer is 6.")]
    models = {"base": str(tiny_model), "sft": str(trained_model)}
    result = loss(write_rows(tmp_path / "rows.jsonl", rows), models, tmp_path / "run", settings())
    base, sft = result.models
    assert list(base.by_turn) == ["1", "2", "3"]
    table = pl.read_parquet(tmp_path / "run" / "evaluate" / "losses.parquet").filter(pl.col("model") == "base")
    assert table["turn_tokens"].list.len().to_list() == [1, 2, 3]
    assert table["turn_tokens"].list.sum().to_list() == table["num_tokens"].to_list()
    assert table["turn_logprobs"].list.sum().to_list() == pytest.approx(table["sum_logprob"].to_list())
    # the first answer is read after the same words, whatever follows
    single = loss(write_rows(tmp_path / "one.jsonl", [turns("hi", "hello")]), models, None, settings())
    assert -table["turn_logprobs"][1][0] / table["turn_tokens"][1][0] == pytest.approx(single.models[0].loss.value, abs=1e-4)
    assert single.models[0].by_turn == {}
    (change,) = result.differences
    for turn in ("1", "2", "3"):
        assert change.by_turn[turn].value == pytest.approx(sft.by_turn[turn].value - base.by_turn[turn].value)
    assert change.by_turn["3"].interval is None  # one conversation is that long
    assert re.search(r"loss by turn \(95 %\) +1 +2 +3\n(.*\n){2}sft − base ", result.summary())
    assert "loss by turn" not in single.summary()


def test_plain_texts_are_scored_as_they_stand_and_leave_the_answers_losses_alone(
    tmp_path: Path, tiny_model: Path, tiny_base_model: Path, heldout: Path
) -> None:
    (tmp_path / "general.txt").write_text("The waves are high, the wind is low.\n世界。 這是一個測試。\n" + "the sea " * 200 + "\n")
    models = {"chat": str(tiny_model), "base": str(tiny_base_model)}
    loss(heldout, models, tmp_path / "run", settings())
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": " "}])
    with pytest.raises(UserError, match=r"blank.jsonl:1: this and all other rows hold no text \(1 empty_text\)$"):
        loss(blank, models, None, settings(text=True))
    result = loss(tmp_path / "general.txt", models, tmp_path / "run", settings(text=True))
    assert (result.used, result.prompts, result.models[0].end_loss) == (4, 3, None)  # the long one is scored in two pieces
    assert "3 texts, 1,666 bytes of text" in result.summary()
    table = pl.read_parquet(tmp_path / "run" / "evaluate" / "text_losses.parquet").filter(pl.col("model") == "chat")
    chat, model = load_chat(resolve_model(tiny_model)), load_model(resolve_model(tiny_model), dtype="float32")
    ids = torch.tensor([[chat.tokenizer.eos_token_id, *chat.tokenizer("世界。 這是一個測試。")["input_ids"]]])
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    assert table["sum_logprob"][1] == pytest.approx(expected, abs=1e-3)
    assert table["num_tokens"][1] == ids.shape[1] - 1
    facts = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert (facts["loss"]["used"], facts["text_loss"]["used"]) == (5, 4)
    assert [read_done(tmp_path / "run" / "evaluate")[name]["rows"] for name in ("loss", "text_loss")] == [5, 4]


def test_where_the_interval_and_the_test_disagree_no_difference_is_shown(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    rows = write_rows(tmp_path / "few.jsonl", [turns(f"What is {number}?", "The answer is 1.") for number in range(4)])
    result = loss(rows, {"base": str(tiny_model), "sft": str(trained_model)}, None, settings())
    (difference,) = result.differences
    assert difference.loss is not None
    assert difference.loss.interval is not None
    assert difference.loss.interval.high < 0
    assert (difference.p_value, difference.shown) == (2 / 2**4, False)  # four prompts cannot show anything
    assert "the interval leaves zero out and the test does not agree, no difference is shown" in result.summary()


def test_nothing_is_computed_twice(tmp_path: Path, tiny_model: Path, trained_model: Path, heldout: Path, watch: Any) -> None:
    place = shutil.copytree(tiny_model, tmp_path / "model")
    run, models = tmp_path / "run", {"base": str(place), "sft": str(trained_model)}
    first = loss(heldout, models, run, settings())
    assert watch.events == ["open model", "close model", "open trained", "close trained"]
    assert [each.scored for each in first.models] == [5, 5]
    again = loss(heldout, models, run, settings())
    assert len(watch.events) == 4  # not even loaded
    assert [each.scored for each in again.models] == [0, 0]
    assert again.differences == first.differences

    write_rows(heldout, [*ROWS[:4], turns("Write a short poem about the sea", "The answer is 2.")])
    changed = loss(heldout, models, run, settings())
    assert [each.scored for each in changed.models] == [1, 1]

    write_rows(heldout, ROWS)
    (place / "model.safetensors").write_bytes((trained_model / "model.safetensors").read_bytes())
    after = loss(heldout, models, run, settings())
    assert [each.scored for each in after.models] == [0, 0]  # these weights were scored under another path
    assert after.differences[0].loss is not None
    assert after.differences[0].loss.value == 0.0


def test_an_interrupted_scoring_keeps_what_it_has(tmp_path: Path, tiny_model: Path, heldout: Path, watch: Any) -> None:
    run = tmp_path / "run"
    loss(heldout, {"m": str(tiny_model)}, run, settings(limit=1))
    watch.interrupt_after = 2
    with pytest.raises(KeyboardInterrupt):
        loss(heldout, {"m": str(tiny_model)}, run, settings())
    assert not is_done(run / "evaluate")
    assert watch.events[-1] == "close tiny-chat"
    watch.interrupt_after = None
    result = loss(heldout, {"m": str(tiny_model)}, run, settings())
    assert result.models[0].scored == 2
    fresh = loss(heldout, {"m": str(tiny_model)}, None, settings())
    assert result.models[0].loss.value == pytest.approx(fresh.models[0].loss.value, rel=1e-5)


def test_loss_and_comparison_share_a_run(tmp_path: Path, tiny_model: Path, heldout: Path) -> None:
    run = tmp_path / "run"
    config = load_config(CompareConfig, {"max_new_tokens": 4, **CPU})
    compare({"m": str(tiny_model)}, None, run, config)
    before = json.loads((run / "evaluate" / "results.json").read_text())
    loss(heldout, {"m": str(tiny_model)}, run, settings())
    both = json.loads((run / "evaluate" / "results.json").read_text())
    assert both["compare"] == before["compare"]
    assert set(both) == set(read_done(run / "evaluate")) == {"compare", "loss"}
    compare({"m": str(tiny_model)}, None, run, config)
    assert json.loads((run / "evaluate" / "results.json").read_text())["loss"] == both["loss"]
    write_rows(heldout, [{"messages": ROWS[0]["messages"][:1]}])
    with pytest.raises(UserError, match="no answer to score"):
        loss(heldout, {"m": str(tiny_model)}, run, settings())
    assert set(read_done(run / "evaluate")) == {"compare", "loss"}  # nothing was begun


def test_a_section_that_failed_is_not_done_and_the_other_still_is(tmp_path: Path, tiny_model: Path, heldout: Path, watch: Any) -> None:
    run = tmp_path / "run"
    compare({"m": str(tiny_model)}, None, run, load_config(CompareConfig, {"max_new_tokens": 4, **CPU}))
    loss(heldout, {"m": str(tiny_model)}, run, settings())
    write_rows(heldout, [turns("new", "rows"), turns("newer", "rows")])
    watch.interrupt_after = 1
    with pytest.raises(KeyboardInterrupt):
        loss(heldout, {"m": str(tiny_model)}, run, settings())
    assert set(read_done(run / "evaluate")) == {"compare"}


def test_a_server_is_refused(heldout: Path) -> None:
    engine = {"engine": "openai", "base_url": "http://localhost:9/v1"}
    with pytest.raises(UserError, match="a server does not tell the probabilities"):
        loss(heldout, {"m": "name"}, None, load_config(LossConfig, {"engine": engine}))
