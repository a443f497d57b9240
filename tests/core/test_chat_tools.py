"""Calls of functions in chats: written by whichever template knows them, trained on as what the model says, their answers not."""

import re

from sftkit.core.chat import Chat
from toy_chats import CALL, LISTED, MARKED, TOLD, assistant, make_tokenizer, parts, runs, shipped, show, system, user


def test_arguments_of_a_call_may_be_json_text() -> None:
    """The usual form of data sets. Templates write an object; a text would be quoted a second time."""
    as_text = [{**CALL[0], "function": {"name": "get", "arguments": '{"city": "Rome"}'}}]
    for name in ("qwen2_5", "qwen3", "llama3_1", "qwen3_5_nothink"):
        chat = Chat(make_tokenizer(shipped(name)))
        written = chat.render([user("weather?"), assistant("", tool_calls=CALL), TOLD, assistant("Sunny.")])
        assert chat.render([user("weather?"), assistant("", tool_calls=as_text), TOLD, assistant("Sunny.")]) == written
        assert runs(written.mask) == 2, name
        assert "Rome" in show(chat.tokenizer, *parts(written)).split("⟦")[1], "the call is trained on"
        assert "sunny" not in "".join(re.findall("⟦([^⟧]*)⟧", show(chat.tokenizer, *parts(written)))), "the tool's answer is not"


def test_tool_conversations_render_wherever_the_template_knows_tools() -> None:
    # DeepSeek-R1's asks for a content that is none, and transformers takes those away
    known = [name for name in MARKED if "tool_calls" in shipped(name) and name != "deepseek_r1_distill"]
    assert len(known) > 10
    for name in known:
        tokenizer = make_tokenizer(shipped(name))
        chat = Chat(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(LISTED.get(name, [])), name=name)
        for messages in (
            [user("weather?"), assistant("", tool_calls=CALL), TOLD, assistant("It is sunny."), user("ok?"), assistant("yes")],
            [system("use tools"), user("weather?"), assistant("", tool_calls=CALL), TOLD, assistant("It is sunny.")],
        ):
            rendered = chat.render(messages)
            said = "".join(re.findall("⟦([^⟧]*)⟧", show(tokenizer, *parts(rendered))))
            assert "It is sunny." in said, name
            assert "Rome" in said, name
            assert '"sunny"' not in said, name
            assert "\nsunny" not in said, name


def test_functions_that_can_be_called_are_written_in_rows_and_prompts_alike() -> None:
    tool = {"type": "function", "function": {"name": "forecast_of", "description": "d", "parameters": {"type": "object", "properties": {}}}}
    knowing = []
    for name in MARKED:
        tokenizer = make_tokenizer(shipped(name))
        chat = Chat(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(LISTED.get(name, [])), name=name)
        messages = [user("weather?"), assistant("It is sunny.")]
        if chat.render(messages).ids[: len(asked := chat.prompt(messages[:1]))] != asked:
            continue  # its prompts open a thought
        row, prompt = chat.render(messages, tools=[tool]), chat.prompt(messages[:1], tools=[tool])
        assert row.ids[: len(prompt)] == prompt, name
        assert not any(row.mask[: len(prompt)]), name
        assert chat.writes_tools == ("forecast_of" in tokenizer.decode(prompt)), name
        if chat.writes_tools:
            knowing.append(name)
            assert "forecast_of" not in "".join(re.findall("⟦([^⟧]*)⟧", show(tokenizer, *parts(row)))), name
        else:
            assert row == chat.render(messages), name
    assert len(knowing) > 10
    assert len(knowing) < len(MARKED) - 1


def test_answers_before_the_last_question_are_trained_as_ever_where_functions_are_written_beside_that_one_alone() -> None:
    """As Mistral's templates do: a prompt that ends earlier has them where the whole conversation does not."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 >= messages | length - 2 %}{{ tools | tojson }}"
        "{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    chat = Chat(tokenizer, name="mistral")
    rendered = chat.render([user("a"), assistant("b"), user("c"), assistant("d")], tools=[{"type": "function", "function": {"name": "f"}}])
    assert re.findall("⟦([^⟧]*)⟧", show(tokenizer, *parts(rendered))) == [" b</eos>", " d</eos>"]
