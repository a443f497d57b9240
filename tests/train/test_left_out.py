"""Thoughts and calls that are read and not trained on: labels, rules, cache, splits and prompts of such rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from sftkit.core.chat import Chat, load_chat
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.models import load_tokenizer, resolve_model
from sftkit.train import rendering
from sftkit.train.account import prepare
from sftkit.train.config import PreferenceConfig, TrainConfig
from sftkit.train.data import fingerprint
from sftkit.train.parity import check_parity
from sftkit.train.prepared import Preparation, load_rows
from sftkit.train.rendering import Pieces, render_many

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALL = [{"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}]
THOUGHT = "<think>\nadd them\n</think>\n\n"


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


THINKING = [said("user", "1+1?"), said("assistant", f"{THOUGHT}2")]
FIELD = [said("user", "1+1?"), said("assistant", "2", reasoning_content="add them")]
PLAIN = [said("user", "hi"), said("assistant", "hello"), said("user", "so?"), said("assistant", "so")]
CALLING = [said("user", "w?"), said("assistant", "", tool_calls=CALL), said("tool", "sunny"), said("assistant", "It is sunny.")]
LAST = CALLING[:2]
SEVERAL = [*THINKING, *THINKING]
CHOICES: list[tuple[str, ...]] = [("thinking",), ("tool_calls",), ("thinking", "tool_calls")]


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"validation": 0.0, **settings})


def trained(row: Any, chat: Chat) -> str:
    return str(chat.tokenizer.decode([label for label in row.labels if label != -100]))


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return load_chat(resolve_model(tiny_model))


@pytest.fixture(scope="module")
def qwen3(tiny_model: Path) -> Chat:
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    return Chat(tokenizer, name="qwen3")


def test_many_at_once_are_those_one_by_one(chat: Chat, qwen3: Chat, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(rendering, "AUDITED", 1 << 30)  # nothing is mended by the audit here but the first row
    odd = [said("user", "a"), said("assistant", " <think>b</think>  c"), said("user", "d"), said("assistant", "<think></think>")]
    conversations = [PLAIN, THINKING, FIELD, CALLING, LAST, SEVERAL, odd, [said("user", "e"), said("assistant", "f <think>g</think> h")]]
    models = [chat, qwen3]
    for name in ("qwen2_5", "phi3", "qwen3_instruct_2507", "qwen3_5_nothink"):
        tokenizer = load_tokenizer(resolve_model(tiny_model))
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        models.append(Chat(tokenizer, name=name))
    short = 0
    for model in models:
        known = [each for each in conversations if _renders(model, each)]
        pieces = Pieces(model)
        short += pieces.usable and pieces.spans(THINKING) is not None
        for train_on in ("all", "last"):
            for each in CHOICES:
                alone = [model.render(one, train_on=train_on, leave_out=each) for one in known]
                assert render_many(known, model, pieces, train_on, (), each) == alone, (model.name, each)
    assert short  # some were found without rendering again


def _renders(chat: Chat, messages: list[dict[str, Any]]) -> bool:
    try:
        return bool(chat.render(messages))
    except UserError:
        return False


def test_labels_are_without_what_is_left_out_and_ids_as_ever(qwen3: Chat, chats) -> None:
    path = chats(0, THINKING, FIELD, PLAIN, CALLING)
    whole = prepare(read_examples(path), qwen3, config(), context=512).train
    for settings, expected in (
        ({"mask_thinking": True}, ["2<|im_end|>", "2<|im_end|>", "hello<|im_end|>so<|im_end|>"]),
        ({"mask_tool_calls": True}, [trained(each, qwen3) for each in whole[:3]]),
    ):
        data = prepare(read_examples(path), qwen3, config(**settings), context=512)
        assert [each.ids for each in data.train] == [each.ids for each in whole]
        assert [trained(each, qwen3) for each in data.train[:3]] == expected
        assert ("Rome" in trained(data.train[3], qwen3)) is ("mask_thinking" in settings)
        assert trained(data.train[3], qwen3).endswith("It is sunny.<|im_end|>")
        assert data.report.trained_tokens < sum(sum(each.mask) for each in whole)
        assert [each.answer_start for each in data.train] == [each.answer_start for each in whole]
        assert check_parity(data.train, qwen3) == check_parity(whole, qwen3)
    assert trained(whole[0], qwen3) == trained(whole[1], qwen3) == f"{THOUGHT}2<|im_end|>"


def test_rows_with_nothing_left_are_left_out_by_a_rule_of_their_own(qwen3: Chat, chats) -> None:
    thought = [said("user", "1+1?"), said("assistant", THOUGHT)]
    path = chats(2, LAST, thought)
    assert prepare(read_examples(path), qwen3, config(), context=512).report.rejected == {}
    for settings in ({"mask_tool_calls": True}, {"mask_thinking": True}):
        data = prepare(read_examples(path), qwen3, config(**settings), context=512)
        assert data.report.rejected == {"nothing_left": 1}
        (told,) = data.report.warnings
        assert "left out as nothing_left" in told
        assert f"chats.jsonl:{3 if 'mask_tool_calls' in settings else 4}" in told
        assert "mask_thinking and mask_tool_calls leave nothing of their answers to train on" in told
    last = config(mask_tool_calls=True, train_on="last")
    with pytest.raises(UserError, match=r"none of the 1 rows can be trained on: nothing_left 1 .*mask_tool_calls"):
        prepare(read_examples(chats(0, [*PLAIN, *LAST])), qwen3, last, context=512)


def test_an_option_that_changes_no_row_is_told_of(chat: Chat, chats) -> None:
    path = chats(2, FIELD)
    told = prepare(read_examples(path), chat, config(mask_thinking=True, mask_tool_calls=True), context=512).report.warnings
    assert any(each.startswith("mask_thinking and mask_tool_calls: nothing is left out by it") for each in told)
    assert not any("left out by it" in each for each in prepare(read_examples(path), chat, config(), context=512).report.warnings)


def test_parts_of_a_row_that_is_split_are_trained_on_where_something_is_left(qwen3: Chat, chats) -> None:
    path, limit = chats(0, [*LAST, *PLAIN]), len(qwen3.render(LAST).ids)
    data = prepare(read_examples(path), qwen3, config(mask_tool_calls=True, overlong="split", max_length=limit), context=512)
    assert [trained(each, qwen3) for each in data.train] == ["hello<|im_end|>so<|im_end|>"]
    assert all(len(each) <= limit for each in data.train)
    assert data.report.rejected == {}


def test_the_cache_knows_what_is_left_out(tiny_model: Path, chats, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sftkit.train.prepared.LEAST_ROWS", 1)
    chat = load_chat(resolve_model(tiny_model))
    path, told = chats(6, THINKING, SEVERAL), {"context": 512, "cache": tmp_path / "cache"}
    choices = [config(), config(mask_thinking=True), config(mask_tool_calls=True)]
    places = [Preparation(path, chat, each, **told).place for each in choices]
    assert len(set(places)) == 3
    for each, place in zip(choices, places, strict=True):
        made, kept = (load_rows(path, chat, each, **told) for _ in range(2))
        assert kept.train == made.train
        assert fingerprint(kept.train) == fingerprint(made.train)
        assert [row.answer_start for row in kept.train] == [row.answer_start for row in made.train]
        assert [row.written.tolist() for row in kept.train] == [row.written.tolist() for row in made.train]
        assert place
        assert (place / "written.npy").exists() is each.mask_thinking
        assert kept.report == made.report


def test_pairs_are_compared_whole() -> None:
    with pytest.raises(UserError, match="mask_thinking and mask_tool_calls are not for pairs"):
        PreferenceConfig(mask_thinking=True)


def test_the_preview_shows_what_is_left_out(tiny_model: Path, chats, cli, tmp_path: Path) -> None:
    path, page = chats(0, THINKING), tmp_path / "preview.html"
    asked = ("train", "preview", path, "--model", tiny_model, "--html", page)
    shares = []
    for more in ((), ("--mask-thinking",)):
        status, out = cli(*asked, *more)[:2]
        assert status == 0, out
        shares.append(page.read_text().count("<span class=t>"))
    assert 0 < shares[1] < shares[0]
    assert json.loads(path.read_text())["messages"][1]["content"].startswith("<think>")
