"""Thoughts and calls that are left out of the mask: these parts and no others, and the row stays as it is."""

from typing import Any

import pytest
from sftkit.core.chat import Chat, Rendered
from sftkit.core.errors import UserError
from sftkit.core.parts import thought_length
from sftkit.core.templates import BUILT_IN
from toy_chats import CALL, INSTRUCT, LISTED, TEMPLATES, TOLD, Message, assistant, make_tokenizer, runs, shipped, show, user

ALL = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
QUESTION = user("1+1?")
CONVERSATIONS = {
    "field": [QUESTION, assistant("It is 2.", reasoning_content="add them")],
    "text": [QUESTION, assistant("<think>\nadd them\n</think>\n\nIt is 2.")],
    "begun": [QUESTION, assistant("add them\n</think>\n\nIt is 2.")],
    "several": [QUESTION, assistant("2", reasoning_content="add them"), user("1+2?"), assistant("3", reasoning_content="once more")],
    "call": [user("w?"), assistant("", tool_calls=CALL), TOLD, assistant("It is sunny.")],
    "talk": [user("w?"), assistant("Let me look.", tool_calls=CALL), TOLD, assistant("It is sunny.")],
    "thought": [user("w?"), assistant("", reasoning_content="hmm", tool_calls=CALL), TOLD, assistant("It is sunny.")],
    "all": [user("w?"), assistant("Let me look.", reasoning_content="hmm", tool_calls=CALL), TOLD, assistant("It is sunny.")],
    "last": [user("w?"), assistant("", reasoning_content="hmm", tool_calls=CALL)],
    "odd": [user("w?"), assistant("", tool_calls=["get", {"function": None}])],
}
CHOICES: list[tuple[str, ...]] = [("thinking",), ("tool_calls",), ("thinking", "tool_calls")]
CALLED = '{"name": "get", "arguments": {"city": "Rome"}}'


def make_chat(name: str) -> Chat:
    template = shipped(name) if name in ALL else {"chatml": BUILT_IN["sftkit:chatml"][1], "instruct": INSTRUCT, "mistral": MISTRAL}[name]
    tokenizer = make_tokenizer(template)
    return Chat(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(LISTED.get(name, [])), name=name)


MISTRAL = (  # calls in the place of what is said beside them, as Mistral's templates have them
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.tool_calls %}"
    "[TOOL_CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)


def left_out(chat: Chat, messages: list[Message], leave_out: tuple[str, ...]) -> str:
    """Write what the assistant wrote, ⟦what is left out of it⟧."""
    rendered = chat.render(messages, thinking=True, leave_out=leave_out)
    written = rendered.written or rendered.mask
    kept = [(token, not mask) for token, mask, here in zip(rendered.ids, rendered.mask, written, strict=True) if here]
    return show(chat.tokenizer, *map(list, zip(*kept, strict=True)))


@pytest.mark.parametrize(
    ("name", "conversation", "choice", "expected"),
    [
        ("qwen3", "field", "thinking", "⟦<think>\nadd them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("qwen3", "text", "thinking", "⟦<think>\nadd them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("qwen3", "several", "thinking", "2<|im_end|>⟦<think>\nonce more\n</think>\n\n⟧3<|im_end|>"),
        ("qwen3_5_think", "field", "thinking", "⟦add them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("chatml", "text", "thinking", "⟦<think>\nadd them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("chatml", "field", "thinking", "It is 2.<|im_end|>"),
        ("qwen3", "begun", "thinking", "⟦<think>\nadd them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("chatml", "begun", "thinking", "⟦add them\n</think>\n\n⟧It is 2.<|im_end|>"),
        ("instruct", "text", "thinking", "⟦ <think>\nadd them\n</think>\n\n⟧It is 2.</eos>"),
        ("llama3", "text", "thinking", "⟦<think>\nadd them\n</think>\n\n⟧It is 2.<|eot_id|>"),
        ("deepseek_r1_distill", "text", "thinking", "\n\nIt is 2.<｜end▁of▁sentence｜>"),  # it writes no thought
        ("gptoss", "field", "thinking", "⟦<|channel|>analysis<|message|>add them<|end|><|start|>assistant<|channel|>final<|message|>⟧"
         "It is 2.<|return|>"),
        ("gptoss", "call", "tool_calls", '⟦ to=functions.get<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>⟧'
         "<|channel|>final<|message|>It is sunny.<|return|>"),
        ("qwen2_5", "call", "tool_calls", f"⟦<tool_call>\n{CALLED}\n</tool_call><|im_end|>⟧It is sunny.<|im_end|>"),
        ("qwen2_5", "talk", "tool_calls", f"Let me look.⟦\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>⟧It is sunny.<|im_end|>"),
        ("qwen2_5", "talk", "thinking", f"Let me look.\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>It is sunny.<|im_end|>"),
        ("qwen3", "last", "thinking", f"⟦<think>\nhmm\n</think>\n\n⟧<tool_call>\n{CALLED}\n</tool_call><|im_end|>"),
        ("qwen3", "last", "tool_calls", f"<think>\nhmm\n</think>\n\n⟦<tool_call>\n{CALLED}\n</tool_call><|im_end|>⟧"),
        ("llama3_1", "call", "tool_calls", '⟦{"name": "get", "parameters": {"city": "Rome"}}<|eot_id|>⟧It is sunny.<|eot_id|>'),
        ("llama3_1", "talk", "tool_calls", '⟦{"name": "get", "parameters": {"city": "Rome"}}<|eot_id|>⟧It is sunny.<|eot_id|>'),
        ("llama3", "talk", "tool_calls", "Let me look.<|eot_id|>It is sunny.<|eot_id|>"),  # it writes no calls
        ("mistral", "talk", "tool_calls", '⟦[TOOL_CALLS][{"name": "get", "arguments": {"city": "Rome"}}]</eos>⟧ It is sunny.</eos>'),
        # the calls stand before what is said beside them
        ("gemma4_v2", "talk", "tool_calls", '⟦<|tool_call>call:get{city:<|"|>Rome<|"|>}<tool_call|>Let me look.<turn|>⟧It is sunny.<turn|>'),
        # it writes a thought beside calls alone
        ("gemma4", "thought", "thinking", '⟦<|channel>thought\nhmm\n<channel|>⟧<|tool_call>call:get{city:<|"|>Rome<|"|>}<tool_call|>'
         "<|tool_response>It is sunny.<turn|>"),
    ],
)  # fmt: skip
def test_the_part_that_is_left_out_is_the_thought_or_the_call(name: str, conversation: str, choice: str, expected: str) -> None:
    chat = make_chat(name)
    assert left_out(chat, CONVERSATIONS[conversation], (choice,)) == expected


@pytest.mark.parametrize("name", [*ALL, "chatml", "instruct", "mistral"])
def test_the_row_and_the_rest_of_its_mask_stay_for_every_template(name: str) -> None:
    chat = make_chat(name)
    changed = 0
    for label, messages in CONVERSATIONS.items():
        for train_on in ("all", "last"):
            try:
                whole = chat.render(messages, train_on=train_on)
            except UserError:
                continue
            assert whole.written is None
            found = {each: chat.render(messages, train_on=train_on, leave_out=each) for each in CHOICES}
            for each, rendered in found.items():
                told = f"{label}, {train_on}, {each}: {show(chat.tokenizer, rendered.ids, rendered.mask)}"
                assert rendered.ids == whole.ids, told
                assert (rendered.written or rendered.mask) == whole.mask, told
                assert all(before or not after for before, after in zip(whole.mask, rendered.mask, strict=True)), told
                changed += rendered.written is not None
                thought = "add them" if label in ("field", "text") else "hmm"
                said = chat.decode([token for token, here in zip(rendered.ids, rendered.mask, strict=True) if here])
                assert "thinking" not in each or thought not in said, told
                assert "tool_calls" not in each or "Rome" not in said, told
                if not messages[-1].get("tool_calls"):
                    answer, here = messages[-1]["content"].rpartition("</think>")[2].strip(), chat.decode(rendered.ids)
                    assert answer in said or answer not in here, told
                    assert any(rendered.mask), told
            masks = [found[each].mask for each in CHOICES]
            assert [one and other for one, other in zip(masks[0], masks[1], strict=True)] == masks[2], label
    assert changed or name == "deepseek_r1_distill"  # it writes neither thoughts nor calls without a content that is none


def test_a_row_without_thoughts_and_calls_is_masked_as_ever() -> None:
    for name in ("qwen3", "gptoss", "chatml", "instruct"):
        chat = make_chat(name)
        for said in ("b", " <thinking> ", "what <think> and </think> do", "<think> is never closed", ""):
            messages = [user("a"), assistant(said), user("c"), assistant("d", reasoning_content=" ")]
            for each in CHOICES:
                assert chat.render(messages, leave_out=each) == chat.render(messages), (name, said)


def test_an_answer_begins_after_its_thought() -> None:
    for text, answer in (
        ("<think>a</think>b", "b"),
        (" \n<think>\na\n</think>\n\n b </think>", "b </think>"),
        ("<think></think>\n", ""),
        ("b <think>a</think>", "b <think>a</think>"),
        ("a</think>\n\nb", "b"),  # its prompt began the thought
        ("b, not <think>a</think>", "b, not <think>a</think>"),
    ):
        assert text[thought_length(text) :] == answer


def test_prompts_are_not_masked_whatever_is_left_out() -> None:
    chat = make_chat("qwen3")
    asked = chat.render([QUESTION], generation_prompt=True, leave_out=("thinking",))
    assert asked == Rendered(chat.prompt([QUESTION]), [False] * len(asked.ids))


@pytest.mark.parametrize(
    ("name", "pairs", "conversation", "choice", "expected"),
    [  # tokens of the blank line before an answer and its first letter, and of a stop and the line's end before a call
        ("chatml", [("Ċ", "Ċ"), ("ĊĊ", "I")], "text", "thinking", "⟦<think>\nadd them\n</think>⟧\n\nIt is 2.<|im_end|>"),
        (
            "qwen3",
            [(".", "Ċ")],
            "talk",
            "tool_calls",
            f"Let me look.\n⟦<tool_call>\n{CALLED}\n</tool_call><|im_end|>⟧<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
        ),
    ],
)
def test_a_token_with_a_part_of_the_answer_in_it_is_trained_on(name, pairs, conversation, choice, expected) -> None:
    import json

    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_chat(name).tokenizer
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merged: dict[str, Any] = json.loads(backend.to_str())
    for one, other in pairs:
        merged["model"]["vocab"].setdefault(one + other, max(merged["model"]["vocab"].values()) + 1000)
        merged["model"]["merges"].insert(0, [one, other])
    crossing = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(merged)), eos_token="</eos>", bos_token=tokenizer.bos_token, pad_token="<pad>"
    )
    crossing.chat_template = tokenizer.chat_template
    chat = Chat(crossing)
    assert left_out(chat, CONVERSATIONS[conversation], (choice,)) == expected
    assert runs(chat.render(CONVERSATIONS[conversation], leave_out=(choice,)).mask) == expected.count("<|im_end|>")


def test_parts_are_found_where_the_tokenizer_does_not_tell_where_its_tokens_stand(monkeypatch) -> None:
    chat = make_chat("qwen3")
    expected = {each: left_out(chat, CONVERSATIONS["all"], each) for each in CHOICES}
    monkeypatch.setattr(type(chat.tokenizer), "is_fast", False)
    assert {each: left_out(chat, CONVERSATIONS["all"], each) for each in CHOICES} == expected
