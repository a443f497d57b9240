"""What must hold of the mask for any text and for every kind of tokenizer."""

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.chat import Chat, How, load_chat
from sftkit.core.models import resolve_model
from sftkit.core.templates import BUILT_IN
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from toy_chats import INSTRUCT, Message, assistant, make_tokenizer, runs, shipped, show, system, user
from transformers import PreTrainedTokenizerFast

PIECES = [
    "What is 1+1?", "hello", "你好，世界。", "什麼是執行緒？", "🙂", "👩‍👩‍👧", "é", "e\u0301", "مرحبا بالعالم", "שלום", "\u200b", "\u00a0", " ", "  ", "\t",
    "\n", "\n\n", "\n\n\n", "```python\nx = 1\n```", "### Assistant:", "[INST]", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "</s>", "</eos>",
    "<pad>", "user", "assistant\n", "{{ x }}", "{% raw %}", "\\n", "'", '"', "\r\n",
]  # fmt: skip

# name: template, whether it strips what people write, its end of turn
EXACT = {
    "chatml": (BUILT_IN["sftkit:chatml"][1], False, "<|im_end|>"),
    "gemma, ours": (BUILT_IN["sftkit:gemma"][1], False, "<end_of_turn>"),
    "plain": (BUILT_IN["sftkit:plain"][1], False, "</eos>"),
    "instruct": (INSTRUCT, False, "</eos>"),
    "qwen2.5": (shipped("qwen2_5"), False, "<|im_end|>"),
    "phi3": (shipped("phi3"), False, "<|end|>"),
    "llama3": (shipped("llama3"), True, "<|eot_id|>"),
    "llama3.1": (shipped("llama3_1"), True, "<|eot_id|>"),
    "llama3.2": (shipped("llama3_2"), True, "<|eot_id|>"),
    "gemma": (shipped("gemma"), True, "<end_of_turn>"),
    "gemma3": (shipped("gemma3"), True, "<end_of_turn>"),
}


def conversations(seed: int, count: int) -> Iterator[list[Message]]:
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choice(PIECES) for _ in range(draw.choice((0, 1, 1, 2, 3, 5, 8))))

    for _ in range(count):
        turns = [(user(text()), assistant(text())) for _ in range(draw.choice((1, 1, 2, 3)))]
        yield [message for turn in turns for message in turn]


def check_properties(chat: Chat, messages: list[Message], *, strips: bool, end: str) -> None:
    answers = [each["content"].strip() if strips else each["content"] for each in messages if each["role"] == "assistant"]
    whole = chat.render(messages)
    said = [token for token, here in zip(whole.ids, whole.mask, strict=True) if here]
    told = f"{messages}\n{show(chat.tokenizer, whole.ids, whole.mask)}"
    assert chat.tokenizer.decode(said, clean_up_tokenization_spaces=False) == "".join(answer + end for answer in answers), told
    assert runs(whole.mask) == len(answers), told
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = chat.prompt(messages[:number])
            assert whole.ids[: len(prompt)] == prompt, f"{told}\n{show(chat.tokenizer, prompt, [False] * len(prompt))}"
            assert whole.mask[len(prompt)], told
            assert not whole.mask[len(prompt) - 1], told
    last = chat.render(messages, train_on="last")
    assert last.ids == whole.ids
    before = chat.prompt(messages[:-1])
    assert last.mask == [here and position >= len(before) for position, here in enumerate(whole.mask)]
    alone = chat.render(messages, generation_prompt=True)
    assert not any(alone.mask)


@pytest.mark.parametrize("name", EXACT)
def test_the_mask_is_the_answers_and_a_row_begins_with_its_prompts(name: str) -> None:
    template, strips, end = EXACT[name]
    chat = Chat(make_tokenizer(template, specials="<|im_end|><|im_start|><|eot_id|><end_of_turn></s>"))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == end
    for messages in conversations(seed=len(name), count=60):
        if name == "instruct":  # it writes a space before an answer, which the model has to write as well
            messages = [{**each, "content": each["content"].strip()} for each in messages]
            shown = [assistant(" " + each["content"]) if each["role"] == "assistant" else each for each in messages]
            rendered = chat.render(messages)
            said = [token for token, here in zip(rendered.ids, rendered.mask, strict=True) if here]
            assert chat.tokenizer.decode(said) == "".join(each["content"] + end for each in shown if each["role"] == "assistant")
            continue
        check_properties(chat, messages, strips=strips, end=end)


@pytest.mark.parametrize("name", ["chatml", "llama3.1", "gemma3", "plain"])
def test_merges_across_the_edge_of_an_answer_are_cut_there(name: str) -> None:
    """This vocabulary has tokens of newlines and of a newline with what stands before it: they would reach over a turn's edge."""
    template, strips, end = EXACT[name]
    tokenizer = make_tokenizer(template, specials="<|im_end|><|eot_id|><end_of_turn></s>")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merged = json.loads(backend.to_str())
    for one, other in (("Ċ", "Ċ"), (":", "Ċ"), (":Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("t", "Ċ"), ("Ċ", "h"), ("Ċ", "Ġ")):
        merged["model"]["vocab"].setdefault(one + other, max(merged["model"]["vocab"].values()) + 1000)
        merged["model"]["merges"].insert(0, [one, other])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(merged)), eos_token="</eos>", bos_token=tokenizer.bos_token, pad_token="<pad>"
    )
    tokenizer.chat_template = template
    chat = Chat(tokenizer)
    crossed = 0
    for messages in conversations(seed=7, count=60):
        check_properties(chat, messages, strips=strips, end=end)
        whole = tokenizer(chat._text(messages, How()), add_special_tokens=False)["input_ids"]
        crossed += whole != chat.render(messages).ids
    assert strips or crossed > 0, "no text of this test had a token across an edge"


def test_the_real_smollm2(smollm2: Path) -> None:
    """Its template raises in TRL's assistant_only_loss, and puts a system message of its own before a conversation without one."""
    chat = load_chat(resolve_model(smollm2))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == "<|im_end|>"
    assert chat.template_source == "model"
    assert chat.pad_id not in chat.stop_ids
    for messages in conversations(seed=3, count=60):
        check_properties(chat, messages, strips=False, end="<|im_end|>")
    rendered = chat.render([system("你是一個助手"), user("1+1?"), assistant("二")])
    assert show(chat.tokenizer, rendered.ids, rendered.mask) == (
        "<|im_start|>system\n你是一個助手<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦二<|im_end|>⟧\n"
    )


def test_tokens_that_swallow_white_space() -> None:
    """Phi-3's special tokens take the white space after them along: the end of turn reaches over its newline, the role over its own."""
    tokenizer = make_tokenizer(shipped("phi3"), rstrip=True)
    chat = Chat(tokenizer)
    messages = [user("hi"), assistant("one"), user("more"), assistant("  two\n")]
    rendered = chat.render(messages)
    names = tokenizer.convert_ids_to_tokens(rendered.ids)
    assert [name for name, here in zip(names, rendered.mask, strict=True) if here and name.startswith("<")] == ["<|end|>", "<|end|>"]
    said = tokenizer.decode([token for token, here in zip(rendered.ids, rendered.mask, strict=True) if here])
    assert said == "one<|end|>  two\n<|end|>", "the white space of an answer is not swallowed by what stands before it"
    for number in (1, 3):
        prompt = chat.prompt(messages[:number])
        assert rendered.ids[: len(prompt)] == prompt
        assert prompt == tokenizer(chat._text(messages[:number], How(generation_prompt=True)), add_special_tokens=False)["input_ids"]


def make_metaspace(template: str) -> Any:
    """A tokenizer as Llama 2's: spaces are ▁, and one is put before every text; what it does not know it spells in bytes."""
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {
        token: number
        for number, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helotwraIsnoNST[]/:", "▁h", "he"])
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "h"), ("h", "e")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def test_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    chat = Chat(make_metaspace(INSTRUCT))
    for messages in conversations(seed=11, count=60):
        messages = [{**each, "content": re.sub(r"</?s>", "", each["content"]).strip()} for each in messages]
        rendered = chat.render(messages)
        assert runs(rendered.mask) == sum(each["role"] == "assistant" for each in messages)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = chat.prompt(messages[:number])
                assert rendered.ids[: len(prompt)] == prompt, messages
        said = [token for token, here in zip(rendered.ids, rendered.mask, strict=True) if here]
        answers = [each["content"] for each in messages if each["role"] == "assistant"]
        assert [part.strip() for part in chat.tokenizer.decode(said).split("</s>")] == [*answers, ""]


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand() -> None:
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        """One token a letter, in Python."""

        vocab_size = 3000

        def __init__(self, **settings: Any) -> None:
            super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", **settings)

        def get_vocab(self) -> dict[str, int]:
            return {**{chr(code): code for code in range(3000)}, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token) % 3000

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    tokenizer = Letters()
    tokenizer.chat_template = BUILT_IN["sftkit:plain"][1]
    assert not tokenizer.is_fast
    chat = Chat(tokenizer)
    messages = [user("hi"), assistant("one"), user("and"), assistant("")]
    rendered = chat.render(messages)
    assert (
        show(tokenizer, rendered.ids, rendered.mask)
        == "### User:\nhi</s>\n\n### Assistant:\n⟦one</s>⟧\n\n### User:\nand</s>\n\n### Assistant:\n⟦</s>⟧\n\n"
    )
    assert rendered.ids[: len(chat.prompt(messages[:3]))] == chat.prompt(messages[:3])


QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "llama3.1", "plain"])
def test_a_tokenizer_that_normalises_and_keeps_newlines_together(name: str) -> None:
    """As Qwen's: NFC, and a run of newlines is one piece, so that an answer's first newline joins the one before it."""
    from tokenizers import Regex

    template, strips, end = EXACT[name]
    tokenizer = make_tokenizer(template, specials="<|im_end|><|im_start|><|eot_id|></s>")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    chat = Chat(tokenizer)
    for messages in conversations(seed=13, count=60):
        composed = [{**each, "content": unicodedata.normalize("NFC", each["content"])} for each in messages]
        check_properties(chat, composed, strips=strips, end=end)
        assert chat.render(messages) == chat.render(composed)
