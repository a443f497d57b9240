"""The one place where a conversation becomes token ids: for distillation, training and evaluation alike.

The policy, for every model:

* Template: the model's own; a model without one gets a built-in (core/templates.py) that uses only tokens it knows.
* End of turn: found by rendering a conversation and looking at what follows the assistant's text.
* Stop: the end of turn first, then what else the model's files list as end of sequence. Padding never stops.
* Pad: the model's own if it never stops a generation, else a reserved token; never an end-of-sequence id, because a
  mask that hides padding would hide the end of the answer too, and a saved pad among the stop ids gives empty answers.
* Thinking templates are rendered with thinking off unless asked, and dates a template would take from the clock are fixed,
  so that the same conversation gives the same ids tomorrow.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .example import Message
from .models import ModelRef, load_tokenizer
from .templates import BUILT_IN, PAD_CANDIDATES

log = logging.getLogger(__name__)

SENTINEL = "\ue000sftkit\ue001"  # private-use characters: no template and no answer holds them
DATE = "26 Jul 2024"  # what Llama's templates say when nothing tells them the date


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids. `mask[i]` is True where token i is the assistant's: its answer and its end of turn."""

    ids: list[int]
    mask: list[bool]


class Chat:
    """A tokenizer with the template policy applied."""

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int] = (), name: str = "this model") -> None:
        """Apply the policy to a tokenizer. `eos_ids` are the end-of-sequence ids that the model's own files list.

        Raises UserError when nothing can end an answer.
        """
        self.tokenizer = tokenizer
        self.name = name
        self.template_source = self._choose_template()
        ending = self._find_end_of_turn()
        self.end_of_turn: int | None = ending[-1] if ending else None
        self._ending = "".join(tokenizer.convert_ids_to_tokens(ending))
        eos = [each for each in (tokenizer.eos_token_id, *eos_ids) if each is not None]
        first = [] if self.end_of_turn is None else [self.end_of_turn]
        self.stop_ids: tuple[int, ...] = (*first, *sorted(set(eos) - set(first)))
        if not self.stop_ids:
            raise UserError(f"{name}: nothing ends an answer: its tokenizer has no end-of-sequence token and its template no end of turn")
        self.pad_id = self._choose_pad()
        tokenizer.pad_token_id = self.pad_id
        tokenizer.padding_side = "left"

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, thinking: bool = False, train_on: str = "all"
    ) -> Rendered:
        """Return the token ids of a conversation and the mask of the assistant's tokens.

        `train_on` "all" masks every assistant turn, "last" only the final one. With `generation_prompt` the ids end where
        an answer begins, and they are the same ids that a training row with that answer begins with. The mask does not
        depend on `{% generation %}` marks: each turn is found by rendering again with a sentinel in its place. Raises
        UserError for a conversation that the template refuses.
        """
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        text = self._text(messages, generation_prompt, thinking)
        if generation_prompt or not turns:
            ids = self._tokenize(text)
            return Rendered(ids, [False] * len(ids))
        spans = []
        for turn in turns if train_on == "all" else turns[-1:]:
            span = self._span(messages, turn, text, thinking)
            if span:
                spans.append(span)
        return self._masked(text, spans)

    def prompt(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """Return the ids to generate from: the conversation, up to where the assistant's answer begins."""
        return self.render(messages, generation_prompt=True, thinking=thinking).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Return a hash of all that decides how a conversation is rendered, stopped and padded: 16 hex digits."""
        decisive = {
            "template": self.tokenizer.chat_template,
            "stop": sorted(self.stop_ids),
            "end_of_turn": self.end_of_turn,
            "pad": self.pad_id,
            "probe": self.prompt([{"role": "user", "content": "What is 1+1? 什麼是 1+1？"}]),
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def configure(self, model: Any) -> None:
        """Write the stop and pad ids into a model's config and generation config, so that the saved model stops."""
        for config in (model.config, model.generation_config):
            config.pad_token_id = self.pad_id
            config.eos_token_id = list(self.stop_ids)
            config.bos_token_id = self.tokenizer.bos_token_id

    def save(self, folder: Path) -> None:
        """Save the tokenizer with its template and pad token. A saved tokenizer's eos is the end of turn."""
        tokenizer = self.tokenizer
        before = tokenizer.eos_token
        if self.end_of_turn is not None and "eos_token" not in str(tokenizer.chat_template):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.end_of_turn)
        try:
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.eos_token = before

    def _choose_template(self) -> str:
        if self.tokenizer.chat_template:
            return "model"
        vocabulary = self.tokenizer.get_vocab()
        for source, (needed, template) in BUILT_IN.items():
            if all(token in vocabulary for token in needed):
                if source == "sftkit:plain" and not self.tokenizer.eos_token:
                    raise UserError(f"{self.name}: has neither a chat template nor an end-of-sequence token; give a model that has one")
                begin = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id] and self.tokenizer.bos_token_id is not None
                self.tokenizer.chat_template = ("{{- bos_token -}}" if begin else "") + template
                log.info("%s has no chat template: it gets the built-in %s", self.name, source)
                return source
        raise AssertionError("the plain template asks for no token")

    def _find_end_of_turn(self) -> list[int]:
        """Return the special tokens that follow the assistant's text, most often one; none where the template writes none."""
        text = self._text([{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}], False, False)
        following = text.rpartition(SENTINEL)[2].strip()
        ids = self._tokenize(following) if following else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return list(itertools.takewhile(lambda each: each in special, ids))

    def _choose_pad(self) -> int:
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        own = self.tokenizer.pad_token_id
        taken = {*self.stop_ids, self.tokenizer.bos_token_id}
        if own is not None and own not in taken and own < len(self.tokenizer):
            return int(own)
        template = str(self.tokenizer.chat_template)
        for pattern in PAD_CANDIDATES:
            found = sorted(
                number for token, number in vocabulary.items() if re.match(pattern, token) and number not in taken and token not in template
            )
            if found:
                return found[0]
        last = max(number for number in vocabulary.values() if number not in taken)
        log.info(
            "%s reserves no token for padding: %r pads (it is masked everywhere)", self.name, self.tokenizer.convert_ids_to_tokens(last)
        )
        return last

    def _text(self, messages: Sequence[Message], generation_prompt: bool, thinking: bool) -> str:
        import jinja2

        if not messages:
            raise UserError("a conversation without messages cannot be rendered")
        plain = [{**each, "content": ""} if each.get("content") is None else each for each in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    enable_thinking=thinking,
                    thinking=thinking,
                    date_string=DATE,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(each.get("role")) for each in messages[:8])
            raise UserError(f"{self.name}: its chat template refuses a conversation of {roles}: {' '.join(str(error).split())}") from error

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        self._check_begin(ids)
        return ids

    def _check_begin(self, ids: Sequence[int]) -> None:
        begin = self.tokenizer.bos_token_id
        # a template like SmolLM2's begins every turn with the bos token: only two in a row are a fault
        if begin is not None and len(ids) > 1 and ids[0] == begin == ids[1]:
            raise UserError(
                f"{self.name}: its chat template begins with two {self.tokenizer.bos_token!r} tokens; take one out of the template"
            )

    def _span(self, messages: Sequence[Message], turn: int, text: str, thinking: bool) -> tuple[int, int] | None:
        """Return where an assistant turn's trained text begins and ends in `text`: answer and end-of-turn token.

        None where the template leaves the turn out.
        """
        marked = self._text([*messages[:turn], {"role": "assistant", "content": SENTINEL}, *messages[turn + 1 :]], False, thinking)
        before, found, after = marked.partition(SENTINEL)
        if not found:
            return None
        start = len(before) if text.startswith(before) else _common_prefix(before, text)
        if turn:
            # where the answer begins at inference: some templates write a space or an empty thought between the two
            prompt = self._text(messages[:turn], True, thinking)
            if before.startswith(prompt) and text.startswith(prompt):
                start = len(prompt)
        ending = after if text.endswith(after) else after[len(after) - _common_prefix(after[::-1], text[::-1]) :]
        end = max(len(text) - len(ending), start)
        blank = len(ending) - len(ending.lstrip())
        if self._ending and ending.startswith(self._ending, blank):
            end += blank + len(self._ending)
        return start, end

    def _masked(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        if self.tokenizer.is_fast:
            coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
            ids, offsets = coded["input_ids"], coded["offset_mapping"]
            mask = [False] * len(ids)
            whole = True
            position = 0
            for start, end in spans:
                while position < len(ids) and offsets[position][1] <= start:
                    position += 1
                # the tokens of the prompt must be those that a prompt alone has: nothing may merge across the boundary
                whole = whole and self._tokenize(text[:start]) == ids[:position]
                while position < len(ids) and offsets[position][1] <= end:
                    mask[position] = True
                    position += 1
                whole = whole and (position == len(ids) or offsets[position][0] >= end)
            if whole:
                self._check_begin(ids)
                return Rendered(ids, mask)
        return self._by_segments(text, spans)

    def _by_segments(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """Tokenise prompt and answer apart, as at inference, where a token would stand across their boundary."""
        ids: list[int] = []
        mask: list[bool] = []
        last = 0
        for start, end in (*spans, (len(text), len(text))):
            for piece, trained in ((text[last:start], False), (text[start:end], True)):
                coded = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += coded
                mask += [trained] * len(coded)
            last = end
        self._check_begin(ids)
        return Rendered(ids, mask)


def load_chat(ref: ModelRef) -> Chat:
    """Load a model's tokenizer and apply the policy. Raises UserError for a model without tokenizer, or whose answers never end."""
    return Chat(load_tokenizer(ref), eos_ids=_listed_eos(ref), name=ref.name)


def _listed_eos(ref: ModelRef) -> list[int]:
    """Return the end-of-sequence ids of generation_config.json and config.json."""
    found: list[int] = []
    if ref.path is not None and ref.path.is_dir():
        for file in ("generation_config.json", "config.json"):
            if (ref.path / file).exists():
                found += _as_list(json.loads((ref.path / file).read_text(encoding="utf-8")).get("eos_token_id"))
        return found
    if ref.path is None:
        from transformers import GenerationConfig

        try:
            name, arguments = ref.pretrained()
            found += _as_list(GenerationConfig.from_pretrained(name, **arguments).eos_token_id)
        except OSError:  # a model of the Hub need not have one: then the tokenizer's stands alone
            log.info("%s has no generation config", ref.name)
    return found


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _common_prefix(one: str, other: str) -> int:
    length = min(len(one), len(other))
    for position in range(length):
        if one[position] != other[position]:
            return position
    return length
