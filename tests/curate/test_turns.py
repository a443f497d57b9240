"""Conversations taken apart in columns are what a parser of JSON makes of them, whatever stands in their texts."""

import json
import random
from typing import Any

import polars as pl
import pytest
from sftkit.curate.rows import all_text, message_text, split_texts, text_columns, written_turns
from sftkit.curate.turns import plain_answers, plain_turns

NASTY = (
    *('"', "\\", "\\\\", '\\"', '"}, {"role": "', '"}, {"role": "assistant", "content": "', '", "content": "', '"}]', '[{"role": "'),
    *(
        "\\u0041",
        "\n",
        "\r\n\t",
        "\x00\x1f",
        "\u2028",
        "你好",
        "\U0001f468\u200d\U0001f469",
        "\u202eשלום",
        "",
        " ",
        "/",
        "\\/",
        "\b\f",
        "\\frac{a}{b}",
    ),
)


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for _ in range(draw.randrange(5)):
        text = "".join(draw.choices((*NASTY, "word ", "a"), k=draw.randrange(6)))
        turn: dict[str, Any] = {"role": draw.choice(("system", "user", "assistant", "tool")), "content": text}
        match draw.randrange(30):
            case 0:
                turn = {"content": text, "role": "assistant"}
            case 1:
                turn["content"] = [{"type": "text", "text": text}, {"role": "user", "content": text}]
            case 2:
                turn |= {"content": None, "tool_calls": [{"role": "assistant", "content": text}, {"role": "user", "content": text}]}
            case 3:
                turn = {"role": "assistant", "name": text, "content": text}
            case 4:
                turn["weight"] = 1
            case 5:
                turn = {"role": "user" + text, "content": text}
        turns.append(turn)
    return turns


@pytest.mark.parametrize("seed", range(4))
def test_conversations_are_read_as_a_parser_reads_them(seed: int) -> None:
    draw = random.Random(seed)
    conversations = [conversation(draw) for _ in range(3000)]
    separators = [(", ", ": ")] * 9 + [(",", ":")]
    messages = pl.Series(
        "messages", [json.dumps(each, ensure_ascii=draw.random() < 0.5, separators=draw.choice(separators)) for each in conversations]
    )
    both = text_columns(messages).struct.unnest()
    assert list(both.iter_rows()) == [split_texts(each) for each in conversations]
    assert text_columns(messages, ["response"]).struct.field("response").to_list() == both["response"].to_list()
    assert text_columns(messages, ["prompt"]).struct.field("prompt").to_list() == both["prompt"].to_list()
    assert all_text(messages).to_list() == ["\n".join(map(message_text, each)) for each in conversations]
    turns = [[{"role": turn["role"], "content": message_text(turn)} for turn in each] for each in conversations]
    assert written_turns(messages).to_list() == turns
    plain = [turn is not None for turn in plain_turns(messages)]
    texts = [all(list(turn) == ["role", "content"] and isinstance(turn["content"], str) for turn in each) for each in conversations]
    assert all(kept <= text for kept, text in zip(plain, texts, strict=True)), "what is not of texts alone is parsed"
    assert sum(plain) > 0.2 * len(plain), "and of the others only what holds letters by number"


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user"}]',
        '[{"role": "}]',
        "[]",
        '[{"role": "user", "content": "a"}, {"role":"assistant","content":"b"}]',  # written in two manners
        '[{"role": "user", "content": "a", "content": "b"}]',
    ],
)
def test_what_only_looks_like_turns_is_left_to_the_parser(text: str) -> None:
    messages = pl.Series([text])
    assert plain_turns(messages).to_list() == [None]
    assert not plain_answers(messages)[1].any()


def test_no_conversation_at_all() -> None:
    nothing = pl.Series("messages", [], pl.String)
    assert not len(written_turns(nothing))
    assert not len(text_columns(nothing))
    assert not len(text_columns(nothing, ["response"]))
