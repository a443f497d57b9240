"""Preparation in a fraction of the time: the same ids and masks as one by one, for every template, and the same rows from the cache."""

import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import trl
from sftkit.core.chat import Chat, load_chat
from sftkit.core.errors import UserError
from sftkit.core.formats import read_examples
from sftkit.core.ledger import Ledger
from sftkit.core.models import resolve_model
from sftkit.train import prepared, rendering
from sftkit.train.account import prepare
from sftkit.train.config import TrainConfig
from sftkit.train.data import fingerprint
from sftkit.train.parity import check_parity
from sftkit.train.prepared import Preparation, load_rows
from sftkit.train.rendering import Pieces, render_many
from transformers import AutoTokenizer

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def said(role: str, text: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


CONVERSATIONS = [
    [said("user", "hi there"), said("assistant", "hello you")],
    [said("user", "hi"), said("assistant", "one"), said("user", "two?"), said("assistant", "three four")],
    [said("system", "be brief"), said("user", "hi"), said("assistant", "one"), said("user", "x"), said("assistant", "two\nlines")],
    [said("user", " hi "), said("assistant", "  a space before and after \n")],
    [said("user", "\n\nhi\n"), said("assistant", "\n\nnewlines\n\n"), said("user", "again"), said("assistant", "\tno")],
    [said("user", "<|im_end|> in a question"), said("assistant", "and <|im_start|>assistant\nin an answer<|im_end|>")],
    [said("user", "1+1?"), said("assistant", "<think>\nadd\n</think>\n\n2"), said("user", "1+2?"), said("assistant", "3")],
    [said("user", "1+1?"), said("assistant", "2", reasoning_content="add them"), said("user", "?"), said("assistant", "3")],
    [said("user", "a"), said("user", "b"), said("assistant", "two questions")],
    [said("assistant", "I begin"), said("user", "so?"), said("assistant", "you end")],
    [said("user", "hi"), said("assistant", "one"), said("user", "without an answer")],
    [said("user", "你好，世界。"), said("assistant", "你好")],
    [said("user", "x"), said("assistant", ""), said("user", "y"), said("assistant", "z")],
    [said("user", "x"), said("assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}])],
    [said("tool", "x"), said("assistant", "y")],
]


def one_by_one(chat: Chat, train_on: str) -> list[Any]:
    found: list[Any] = []
    for each in CONVERSATIONS:
        try:
            found.append(chat.render(each, train_on=train_on))
        except UserError as error:
            found.append(str(error))
    return found


def all_at_once(chat: Chat, train_on: str, pieces: Pieces) -> list[Any]:
    return [str(each) if isinstance(each, UserError) else each for each in render_many(CONVERSATIONS, chat, pieces, train_on)]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_all_at_once_is_one_by_one_for_every_template(path: Path, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(rendering, "AUDITED", 1 << 30)  # nothing is mended by the audit here but the first row
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    try:
        chat = Chat(tokenizer)
    except UserError:
        pytest.skip("refused by the policy")
    for train_on in ("all", "last"):
        assert all_at_once(chat, train_on, Pieces(chat)) == one_by_one(chat, train_on)


def test_plain_templates_go_the_short_way(tiny_model: Path, tiny_base_model: Path, smollm2: Path, monkeypatch) -> None:
    for model in (tiny_model, tiny_base_model, smollm2):
        chat = load_chat(resolve_model(model))
        pieces = Pieces(chat)
        assert pieces.usable
        assert all_at_once(chat, "all", pieces) == one_by_one(chat, "all")
    calls: list[Any] = []
    render = Chat.render
    monkeypatch.setattr(Chat, "render", lambda self, *args, **kwargs: calls.append(args) or render(self, *args, **kwargs))
    plain = [CONVERSATIONS[0]] * 50
    render_many(plain, chat, pieces, "all")
    assert len(calls) == 1  # the row that is audited


def test_a_template_that_is_more_than_its_pieces_is_found_by_the_audit(tiny_model: Path, monkeypatch, caplog) -> None:
    chat = load_chat(resolve_model(tiny_model))
    pieces = Pieces(chat)
    monkeypatch.setattr(pieces, "_ending", lambda text, end: end)  # learned wrongly: without the end of turn
    found = render_many(CONVERSATIONS[:4], chat, pieces, "all")
    assert found == [chat.render(each) for each in CONVERSATIONS[:4]]
    assert "more than pieces" in caplog.text
    assert not pieces.usable


@pytest.mark.parametrize("settings", [{}, {"train_on": "last"}, {"limit": 37}, {"max_length": 40, "overlong": "split"}], ids=str)
def test_several_processes_give_the_rows_of_one(settings, tiny_model: Path, chats, monkeypatch, tmp_path: Path) -> None:
    chat = load_chat(resolve_model(tiny_model))
    odd = [[said("user", "x"), said("assistant", "")], CONVERSATIONS[1], CONVERSATIONS[4]]
    examples = read_examples(chats(90, *odd))
    made = {}
    for name, least in (("one", 1 << 30), ("several", 1)):
        monkeypatch.setattr(rendering, "PARALLEL", least)
        monkeypatch.setattr(rendering, "CHUNK", 16)
        made[name] = prepare(examples, chat, TrainConfig(**settings), context=512, ledger=tmp_path / f"{name}.parquet")
    assert made["one"].train == made["several"].train
    assert made["one"].report == made["several"].report
    assert [row.messages for row in made["one"].train] == [row.messages for row in made["several"].train]
    assert Ledger(tmp_path / "one.parquet").read().equals(Ledger(tmp_path / "several.parquet").read())


def test_rows_are_kept_by_what_decides_them(tiny_model: Path, tiny_base_model: Path, chats, monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setattr(prepared, "LEAST_ROWS", 10)
    caplog.set_level("INFO", logger="sftkit")
    chat, data, cache = load_chat(resolve_model(tiny_model)), chats(60, CONVERSATIONS[12]), tmp_path / "cache"
    told: dict[str, Any] = {"context": 512, "cache": cache}
    first = Preparation(data, chat, TrainConfig(), **told).rows(tmp_path / "a.parquet")
    assert "rendered before" not in caplog.text
    monkeypatch.setattr(prepared, "read_scored", lambda *_: pytest.fail("read again"))
    second = Preparation(data, chat, TrainConfig(), **told).rows(tmp_path / "b.parquet")
    assert "rendered before" in caplog.text
    assert caplog.text.count("left out as empty_answer") == 2
    assert (second.train, second.validation, second.report) == (first.train, first.validation, first.report)
    assert [row.source for row in second.train] == [row.source for row in first.train]
    assert fingerprint(second.train) == fingerprint(first.train)
    assert check_parity(second.train + second.validation, chat) == check_parity(first.train + first.validation, chat)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "LEAST_ROWS", 10)
    other = load_chat(resolve_model(tiny_base_model))
    for changed in (
        load_rows(data, chat, TrainConfig(train_on="last"), **told),
        load_rows(data, chat, TrainConfig(limit=30), **told),
        load_rows(data, other, TrainConfig(), **told),
    ):
        assert changed.train != first.train
    lines = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps({"messages": CONVERSATIONS[1]}), *lines[1:]]))
    assert load_rows(data, chat, TrainConfig(), **told).train != first.train
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_rows_that_cannot_be_read_back_are_rendered_again(harm, tiny_model: Path, chats, monkeypatch, tmp_path: Path, caplog) -> None:
    """A full disk may leave a file short; another process may take a preparation out between the look and the reading."""
    monkeypatch.setattr(prepared, "LEAST_ROWS", 10)
    chat, data, cache = load_chat(resolve_model(tiny_model)), chats(20), tmp_path / "cache"
    first = load_rows(data, chat, TrainConfig(), context=512, cache=cache)
    (kept,) = cache.iterdir()
    looked = Preparation(data, chat, TrainConfig(), context=512, cache=cache)
    if harm == "cut":
        (kept / "tokens.npy").write_bytes((kept / "tokens.npy").read_bytes()[:200])
    else:
        shutil.rmtree(kept)
    assert looked.rows().train == first.train
    assert "are rendered again" in caplog.text
    caplog.clear()
    assert load_rows(data, chat, TrainConfig(), context=512, cache=cache).train == first.train
    assert "are rendered again" not in caplog.text


def test_what_was_kept_by_another_process_stays_and_what_a_killed_one_left_goes(tiny_model, chats, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(prepared, "LEAST_ROWS", 10)
    chat, data, cache = load_chat(resolve_model(tiny_model)), chats(20), tmp_path / "cache"
    late = Preparation(data, chat, TrainConfig(), context=512, cache=cache)
    load_rows(data, chat, TrainConfig(), context=512, cache=cache)
    (kept,) = cache.iterdir()
    number = (kept / "tokens.npy").stat().st_ino
    for name, age in ((".old.1.tmp", 2 * prepared.ABANDONED), (".young.2.tmp", 0.0)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    late.rows()
    assert (kept / "tokens.npy").stat().st_ino == number
    assert {each.name for each in cache.iterdir()} == {kept.name, ".young.2.tmp"}


def test_few_rows_and_other_sources_are_not_kept(tiny_model: Path, chats, tmp_path: Path) -> None:
    chat = load_chat(resolve_model(tiny_model))
    load_rows(chats(20), chat, TrainConfig(), context=512, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert prepared._key("org/name", chat, TrainConfig(), 512, None) is None


def test_a_folder_that_was_never_installed_renders_too(tiny_model, chats, tmp_path, monkeypatch) -> None:
    plain = importlib.metadata.version

    def version(name: str) -> str:
        if name == "sftkit":
            raise importlib.metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert (
        load_rows(str(chats(12)), load_chat(resolve_model(tiny_model)), TrainConfig(), context=512, cache=tmp_path / "cache").report.rows
        == 12
    )
