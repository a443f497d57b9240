"""Toy tokenizers and conversations for the tests of chats, with the templates that TRL ships."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKED = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
BEGIN = ("<bos>", "<s>", "<BOS_TOKEN>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>")
TEXTS = ["What is the difference between a thread and a process?", "user assistant system tool model weather", "你好，世界。"] * 4

Message = dict[str, Any]

CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "get", "arguments": {"city": "Rome"}}}]
TOLD = {"role": "tool", "name": "get", "tool_call_id": "abcdefghi", "content": "sunny"}

# What the files of such a model list as its ends of sequence besides the tokenizer's own.
LISTED = {"glm4moe": ["<|user|>", "<|observation|>"], "gptoss": ["<|return|>", "<|call|>"], "diffusion_gemma": ["<turn|>"]}

INSTRUCT = (  # as Mistral's: no header of the assistant, a space before its answer, and the end-of-sequence token
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None, *, specials: str = "", eos: str = "</eos>", pad: str | None = "<pad>", **added: bool) -> Any:
    """A byte-level tokenizer that knows the special tokens a template (or the text `specials`) names."""
    names = sorted(
        set(
            re.findall(
                r"<\|[^|<>'\" ]+\|>|<｜[^｜]+｜>|</?[a-z_0-9]+>|<\|[a-z_]+>|<[a-z_]+\|>|<\|[A-Z_]+\|>|\[/?INST\]",
                (template or "") + specials,
            )
        )
    )
    begin = next((each for each in BEGIN if each in names), "<s>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    known = [each for each in dict.fromkeys([*names, begin, eos, *([pad] if pad else [])]) if each]
    tokenizer.add_special_tokens([AddedToken(each, normalized=False, **added) for each in known])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


def shipped(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def show(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """Write a rendered conversation for people: ⟦what is trained on⟧."""
    pieces = [(here, [token for token, _ in part]) for here, part in groupby(zip(ids, mask, strict=True), key=lambda each: each[1])]
    return "".join(f"⟦{tokenizer.decode(part)}⟧" if here else tokenizer.decode(part) for here, part in pieces)


def runs(mask: list[bool]) -> int:
    return sum(here and not before for here, before in zip(mask, [False, *mask], strict=False))


def parts(rendered: Any) -> tuple[list[int], list[bool]]:
    return rendered.ids, rendered.mask
