"""What is trained on: the answers and their ends; every row left out has its reason."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import trl
from sftkit.core.chat import Chat, load_chat
from sftkit.core.errors import UserError
from sftkit.core.example import tools_of
from sftkit.core.formats import read_examples
from sftkit.core.models import load_tokenizer, resolve_model
from sftkit.core.templates import BUILT_IN
from sftkit.train.account import prepare, split
from sftkit.train.config import TrainConfig
from sftkit.train.data import Row, key_of
from sftkit.train.parity import check_parity
from sftkit.train.prepared import load_rows

USER, ASSISTANT = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return load_chat(resolve_model(tiny_model))


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"validation": 0.0, **settings})  # type: ignore[arg-type]


def test_labels_are_the_answers_and_their_ends(chat: Chat, chats) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER("hi"), ASSISTANT("hello"), USER("and 1+1?"), ASSISTANT("2")]
    data = prepare(read_examples(chats(0, turns)), chat, config(), context=512)
    (row,) = data.train
    trained = [token for token, label in zip(row.ids, row.labels, strict=True) if label != -100]
    assert chat.tokenizer.decode(trained) == "hello<|im_end|>2<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(row.ids, row.labels, strict=True))
    last = prepare(read_examples(chats(0, turns)), chat, config(train_on="last"), context=512).train[0]
    assert chat.tokenizer.decode([label for label in last.labels if label != -100]) == "2<|im_end|>"
    assert last.ids == row.ids


def test_each_row_left_out_has_its_reason_in_the_ledger(chat: Chat, chats, tmp_path: Path) -> None:
    path = chats(3, [USER("no answer")], [USER("empty"), ASSISTANT("  ")], [USER("long"), ASSISTANT("word " * 600)])
    data = prepare(read_examples(path), chat, config(limit=2), context=512, ledger=tmp_path / "ledger.parquet")
    ledger = pl.read_parquet(tmp_path / "ledger.parquet")
    assert ledger["action"].to_list() == ["kept", "kept", "rejected", "rejected", "rejected", "rejected"]
    assert set(ledger["rule"].to_list()) == {"", "over_limit"}
    data = prepare(read_examples(path), chat, config(), context=512, ledger=tmp_path / "ledger.parquet")
    ledger = pl.read_parquet(tmp_path / "ledger.parquet")
    assert ledger["rule"].to_list() == ["", "", "", "no_assistant_turn", "empty_answer", "over_max_length"]
    (long,) = ledger.filter(pl.col("rule") == "over_max_length").iter_rows(named=True)
    assert long["score"] > long["threshold"] == 512
    assert data.report.rejected == {"no_assistant_turn": 1, "empty_answer": 1, "over_max_length": 1}
    assert data.report.trained_tokens == sum(sum(row.mask) for row in data.train)


def test_a_long_row_is_named_when_that_is_asked_for(chat: Chat, chats) -> None:
    path = chats(1, [USER("long"), ASSISTANT("word " * 300)])
    with pytest.raises(UserError, match=r"chats\.jsonl:2: \d+ tokens, longer than the 64 allowed"):
        prepare(read_examples(path), chat, config(overlong="raise", max_length=64), context=512)


def test_nothing_to_train_on_is_an_error(chat: Chat, chats) -> None:
    with pytest.raises(UserError, match="none of the 1 rows can be trained on: no_assistant_turn 1"):
        prepare(read_examples(chats(0, [USER("hi")])), chat, config(), context=512)


def test_answers_whose_end_is_not_trained_on_are_refused(chats, tiny_model: Path) -> None:
    chat = load_chat(resolve_model(tiny_model))
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    chat.tokenizer.chat_template = template  # writes nothing after an answer: only the last one's end can be added
    endless = Chat(chat.tokenizer, name="endless")
    single = prepare(read_examples(chats(1)), endless, config(), context=512).train[0]
    assert single.labels[-1] == endless.end_of_turn
    turns = [USER("a"), ASSISTANT("b"), USER("c"), ASSISTANT("d")]
    with pytest.raises(UserError, match="none of the 1 rows can be trained on: no_end_of_turn 1"):
        prepare(read_examples(chats(0, turns)), endless, config(), context=512)
    with pytest.raises(UserError, match=r"2 answers do not end with endless's end-of-turn token.*train_on: last"):
        prepare(read_examples(chats(5, turns, turns)), endless, config(), context=512)
    assert len(prepare(read_examples(chats(5, turns, turns)), endless, config(train_on="last"), context=512).train) == 7


def test_samples_of_a_prompt_are_validated_together() -> None:
    rows = [Row((f"{prompt:016x}", index), [prompt], [True]) for prompt in range(40) for index in range(3)]
    train, validation = split(rows, 0.1, seed=0)
    assert len(train) + len(validation) == 120
    assert 12 <= len(validation) <= 14
    assert not {row.key[0] for row in train} & {row.key[0] for row in validation}
    assert split(list(reversed(rows)), 0.1, seed=0)[1] == list(reversed(validation))
    assert split(rows, 0.1, seed=1)[1] != validation
    assert split(rows[:5], 0.5, seed=0) == (rows[:5], [])


def test_a_row_of_a_run_keeps_the_name_of_its_sample(tmp_path: Path) -> None:
    path = tmp_path / "dataset.jsonl"
    path.write_text(
        '{"id": "0123456789abcdef/2", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],'
        ' "source": "x:1", "meta": {}}\n'
    )
    (example,) = read_examples(path)
    assert key_of(example) == ("0123456789abcdef", 2)


def test_calls_that_the_template_leaves_out_are_no_empty_answers_to_learn(chat: Chat, chats) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
    data = prepare(read_examples(chats(2, [USER("add"), call])), chat, config(), context=512)
    assert data.report.rejected == {"calls_left_out": 1}
    assert any("the chat template writes no tool calls" in each for each in data.report.warnings) or len(data.train) == 2


def test_functions_that_can_be_called_stand_before_the_question_or_it_is_said_that_they_do_not(
    chat: Chat, tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("sftkit.train.prepared.LEAST_ROWS", 1)
    tools = [{"type": "function", "function": {"name": "add_up", "parameters": {"type": "object", "properties": {}}}}]
    path = tmp_path / "calls.jsonl"
    rows = [{"messages": [USER(f"{n}+1?"), ASSISTANT(f"{n + 1}")], **({"tools": tools} if n % 2 else {})} for n in range(6)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    untold = prepare(read_examples(path), chat, config(), context=512)
    assert any("3 rows with functions that can be called (tools), which the template" in each for each in untold.report.warnings)

    assert tools_of({"tools": json.dumps(tools)}) == tools_of({"tools": [json.dumps(tools[0]["function"])]}) == tuple(tools)
    odd = prepare([replace(each, meta={"tools": "[web"}) for each in read_examples(path)], chat, config(), context=512)
    assert any("6 rows whose column tools is no list of functions" in each for each in odd.report.warnings)

    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = "{% if tools %}<|im_start|>tool\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + BUILT_IN["sftkit:chatml"][1]
    knowing = Chat(tokenizer, name="knowing")
    first, again = (load_rows(path, knowing, config(), context=512, cache=tmp_path / "cache") for _ in range(2))
    assert first.report.warnings == ()
    told = {row.source: "add_up" in tokenizer.decode(row.ids[: row.answer_start]) for row in first.train}
    assert [told[f"{path}:{n + 1}"] for n in range(6)] == [False, True] * 3
    assert check_parity(first.train, knowing) == check_parity(again.train, knowing)  # the second time from the cache


@pytest.mark.parametrize("kind", ["reasoning_content", "text"])
def test_thoughts_of_earlier_answers_that_the_template_leaves_out_are_told_of(chats, tiny_model: Path, kind: str) -> None:
    """Qwen3 writes the thoughts after the last question alone: the answers before it are learned without."""

    def thinking(answer: str) -> dict[str, str]:
        return {**ASSISTANT(answer), kind: "hmm"} if kind != "text" else ASSISTANT(f"<think>\nhmm\n</think>\n\n{answer}")

    tokenizer = load_tokenizer(resolve_model(tiny_model))
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    qwen3 = Chat(tokenizer, name="qwen3")
    several = [USER("a"), thinking("b"), USER("c"), thinking("d")]
    path = chats(3, [USER("a"), thinking("b")], several, [*several, USER("e"), ASSISTANT("f")], [*several[:2], USER("c"), ASSISTANT("d")])
    name = "reasoning_content" if kind != "text" else "<think> in the text"
    (told,) = prepare(read_examples(path), qwen3, config(), context=512).report.warnings
    assert told.startswith(f"3 rows with thoughts ({name}) in answers before the last, which the template of qwen3 leaves out there")
    assert [f"chats.jsonl:{place}" in told for place in range(4, 8)] == [False, True, True, True]
    assert "train on last answers only (train_on: last)" in told
    assert not prepare(read_examples(path), qwen3, config(train_on="last"), context=512).report.warnings


def test_thoughts_that_the_template_leaves_out_are_told_of(chat: Chat, chats, tiny_model: Path) -> None:
    thought = [USER("1+1?"), {**ASSISTANT("2"), "reasoning_content": "one and one"}]
    (told,) = prepare(read_examples(chats(1, thought)), chat, config(), context=512).report.warnings
    assert "1 row with thoughts (reasoning_content), which the template of" in told
    assert "chats.jsonl:2" in told
    tokenizer = load_tokenizer(resolve_model(tiny_model))
    template = BUILT_IN["sftkit:chatml"][1]
    tokenizer.chat_template = template.replace("message['content']", "(message.reasoning_content or '') + message['content']")
    assert tokenizer.chat_template != template
    thinking = prepare(read_examples(chats(1, thought)), Chat(tokenizer, name="thinking"), config(), context=512)
    assert thinking.report.warnings == ()
    assert "one and one2" in tokenizer.decode(thinking.train[1].ids)
