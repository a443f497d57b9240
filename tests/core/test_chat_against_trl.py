"""One mask for all templates, right where TRL marks its templates by hand; where the two differ, it says why."""

from typing import Any

import pytest
from sftkit.core.chat import FIXED_CLOCK, Chat
from sftkit.core.errors import UserError
from toy_chats import CALL, LISTED, MARKED, TEMPLATES, TOLD, Message, assistant, make_tokenizer, show, system, user

CONVERSATIONS = {
    "single": [user("hi there"), assistant("hello you")],
    "multi": [user("hi"), assistant("one"), user("two?"), assistant("three four")],
    "system": [system("be brief"), user("hi"), assistant("one"), user("x"), assistant("two\nlines")],
    "empty": [user("hi"), assistant("")],
    "blank": [user(" hi "), assistant("  a space before and after \n")],
    "thought": [user("1+1?"), assistant("2", reasoning_content="add them"), user("1+2?"), assistant("3", reasoning_content="again")],
    "call": [user("weather?"), assistant("", tool_calls=CALL), TOLD, assistant("It is sunny."), user("ok?"), assistant("yes")],
    "talk and call": [user("weather?"), assistant("Let me look.", tool_calls=CALL), TOLD, assistant("It is sunny.")],
    "last call": [user("weather?"), assistant("Let me look.", tool_calls=CALL)],
}

# Where TRL's marks begin at the token of the role: the generation prompts of these two end in an open <think>, which rows
# without a thought do not have, so that what a prompt provides cannot be read off it.
ROLE_IS_MARKED = {"deepseek_r1_distill": "<｜Assistant｜>", "deepseekv3": "<｜Assistant｜>"}

# Templates whose training variant writes another text: a thought, or an empty one, in turns that lost it in the original.
REWRITTEN = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "glm4moe", "deepseekv3", "deepseek_r1_distill"}

DIFFERENT = {
    ("gptoss", "multi"): "<|end|> after an earlier answer is history's; what the model writes there is <|return|>",
    ("gptoss", "system"): "the same",
    ("gptoss", "thought"): "the same",
    ("gptoss", "call"): "the same",
    ("gptoss", "talk and call"): "the template shows the talk only until there is an answer, so the turn has no fixed place",
    ("diffusion_gemma", "call"): "a prompt after a tool's answer has no header: the model writes it",
    ("diffusion_gemma", "talk and call"): "the tool's answer stands inside the turn, which is not trained on then",
    ("diffusion_gemma", "last call"): "what follows a call belongs to the turn where it is the last",
}


def rendered_by_trl(
    tokenizer: Any, name: str, messages: list[Message], end: str, thinking: bool
) -> tuple[list[int], list[bool], list[bool]]:
    """Return ids, TRL's own mask, and the part of it that a model writes at inference.

    TRL's marks are wider: they hold what the generation prompt provides (an empty thought, the role), and what the template
    writes after the end of turn (a newline, Phi-3's last <|endoftext|>), where generation has stopped.
    """
    template = FIXED_CLOCK + (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")

    def apply(part: list[Message], thinking: bool = thinking, **more: Any) -> Any:
        settings = {"enable_thinking": thinking, "thinking": thinking, "date_string": "26 Jul 2024", "return_dict": True}
        return tokenizer.apply_chat_template(part, chat_template=template, **settings, **more)

    whole = apply(messages, return_assistant_tokens_mask=True)
    ids, marked = whole["input_ids"], [bool(each) for each in whole["assistant_masks"]]
    written = list(marked)
    ends = {tokenizer.convert_tokens_to_ids(each) for each in (end, *LISTED.get(name, ()))}
    for position in range(len(ids) - 1, -1, -1):  # what follows an end of turn, from behind
        run_goes_on = position + 1 < len(ids) and written[position + 1]
        if written[position] and not run_goes_on and ids[position] not in ends:
            before = position
            while before >= 0 and marked[before] and ids[before] not in ends:
                before -= 1
            if before >= 0 and marked[before]:
                written[position] = False
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for thinks in (thinking, not thinking):
            try:
                prompt = apply(messages[:number], thinks, add_generation_prompt=True)["input_ids"]
            except Exception:  # noqa: BLE001  a prompt that the template refuses provides nothing
                continue
            if ids[: len(prompt)] == prompt:
                position = len(prompt) - 1
                while written[position]:
                    written[position] = False
                    position -= 1
                break
    role = ROLE_IS_MARKED.get(name)
    if role:
        written = [each and token != tokenizer.convert_tokens_to_ids(role) for each, token in zip(written, ids, strict=True)]
    return ids, marked, written


@pytest.mark.parametrize("name", MARKED)
def test_the_mask_is_what_trl_marks_by_hand(name: str) -> None:
    original, marked = ((TEMPLATES / f"{name}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training"))
    compared = {}
    for kind, template in (("original", original), ("training", marked)):
        tokenizer = make_tokenizer(template, specials=original + marked)
        chat = Chat(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(LISTED.get(name, [])), name=name)
        end = tokenizer.convert_ids_to_tokens(chat.end_of_turn)
        for label, messages in CONVERSATIONS.items():
            thinking = label == "thought"
            try:
                ours = chat.render(messages, thinking=thinking)
            except UserError:  # then the template itself raises, for TRL as well
                given = [{**each, "content": [{"type": "text", "text": each["content"]}]} if chat._in_parts else each for each in messages]
                with pytest.raises(Exception):  # noqa: B017
                    tokenizer.apply_chat_template(given, chat_template=template, tokenize=False)
                continue
            given = [{**each, "content": [{"type": "text", "text": each["content"]}]} if chat._in_parts else each for each in messages]
            ids, by_hand, written = rendered_by_trl(tokenizer, name, given, end, thinking)
            if kind == "original" and ours.ids != ids:
                assert name in REWRITTEN, f"{label}:\n{show(tokenizer, ours.ids, ours.mask)}\n{show(tokenizer, ids, by_hand)}"
                continue
            told = f"{kind}, {label}:\nours    {show(tokenizer, ours.ids, ours.mask)}\nwritten {show(tokenizer, ids, written)}"
            if (name, label) in DIFFERENT:
                assert (ours.ids, ours.mask) != (ids, written), f"no longer different: {told}"
                continue
            assert ours.ids == ids, told
            assert ours.mask == written, told
            compared[kind, label] = sum(written)
    assert all(compared.values())
    assert {label for _, label in compared} >= {"single", "multi", "empty", "blank"} - {label for each, label in DIFFERENT if each == name}
