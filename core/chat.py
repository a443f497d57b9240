"""The one place where a conversation becomes token ids: for distillation, training and evaluation alike.

The policy, for every model:

* Template: the model's own; a model without one gets a built-in (core/templates.py) that uses only tokens it knows.
* End of turn: found by rendering a conversation and looking at what follows the assistant's text. Where the template writes
  nothing there, what begins the next turn if the model lists it among its end-of-sequence ids, else its end-of-sequence
  token; that is then added after a last answer, or the model would never learn to stop.
* Stop: the end of turn first, then what else the model's files list as end of sequence. Padding never stops.
* Pad: the model's own if it never stops a generation, else a reserved token; never an end-of-sequence id, because a
  mask that hides padding would hide the end of the answer too, and a saved pad among the stop ids gives empty answers.
* Thinking templates are rendered with thinking off unless asked, and dates a template would take from the clock are fixed,
  so that the same conversation gives the same ids tomorrow.
* Special tokens in what people wrote (`<|im_end|>` in a question) become those tokens, as they do in transformers and in the
  servers. The mask goes by the place of the answer in the text and does not mind them; a row that holds them is better filtered.
"""

import bisect
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError
from .example import Message, Tool
from .files import load_object
from .models import ModelRef, load_tokenizer
from .parts import SENTINEL, common_prefix, common_suffix, trained_part
from .templates import BUILT_IN, PAD_CANDIDATES

log = logging.getLogger(__name__)

DATE = "26 Jul 2024"  # what Llama's templates say when nothing tells them the date
FIXED_CLOCK = (  # put before a template that asks for the time: the same moment, in whatever form it asks
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(
        f" | replace('%{code}', '{value}')"
        for code, value in zip("aAdbBmyYHMS", ("Fri", "Friday", "26", "Jul", "July", "07", "24", "2024", "00", "00", "00"), strict=True)
    )
    + " -}}{%- endmacro -%}"
)


class How(NamedTuple):
    """How a conversation is written: up to where an answer begins, with thinking on, with the functions that can be called."""

    generation_prompt: bool = False
    thinking: bool = False
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids. `mask[i]` is True where token i is the assistant's: its answer and its end of turn.

    `written` is the mask as it would be with nothing left out of it; None where it is the same.
    """

    ids: list[int]
    mask: list[bool]
    written: list[bool] | None = None


@cache  # a model is looked up before its engine loads it
def _tell_built_in(name: str, source: str) -> None:
    log.info("%s has no chat template: it gets the built-in %s", name, source)


class Chat:
    """A tokenizer with the template policy applied."""

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int] = (), num_embeddings: int | None = None, name: str = "this model") -> None:
        """Apply the policy to a tokenizer.

        `eos_ids` are the end-of-sequence ids that the model's own files list, `num_embeddings` how many tokens it has room for.
        Raises UserError when nothing can end an answer, and for a template that leaves answers out.
        """
        self.tokenizer = tokenizer
        self.name = name
        self.template_source = self._choose_template()
        eos = [each for each in (tokenizer.eos_token_id, *eos_ids) if each is not None]
        self._in_parts, ending = self._find_ending()
        self._closing = "" if ending else self._choose_closing(eos)  # what the template does not write after a last answer
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids(ending[-1] if ending else self._closing)
        self.stop_ids: tuple[int, ...] = (self.end_of_turn, *sorted(set(eos) - {self.end_of_turn}))
        stops = tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        self._endings = tuple(each for each in ("".join(ending), *stops) if each)
        self.pad_id = self._choose_pad(num_embeddings or len(tokenizer))
        tokenizer.pad_token_id = self.pad_id
        tokenizer.padding_side = "left"
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        prompt = self._text([asked], How(generation_prompt=True))
        if not self._text([asked, answered], How()).startswith(prompt):
            log.warning(
                "%s: its prompts end with %r, and rows without a thought do not: train it on rows that have one", name, prompt[-24:]
            )

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, thinking: bool = False, tools: Sequence[Tool] = (),
        train_on: str = "all", leave_out: Sequence[str] = (),
    ) -> Rendered:  # fmt: skip
        """Return the token ids of a conversation and the mask of the assistant's tokens.

        A turn is masked from where the generation prompt ends to its end-of-turn token: what the model has to write by itself.
        `tools` are the functions that can be called, which the template writes where it knows any (`writes_tools`).
        `train_on` "all" masks every assistant turn, "last" only the final one. `leave_out` takes parts of these out of the mask, and
        leaves the ids as they are: "thinking" the thought, up to where the answer's text begins; "tool_calls" the calls, from the end
        of what is said before them to the end of the turn (`core/parts.py`). With `generation_prompt` the ids end where an answer
        begins, and they are the same ids that a training row with that answer begins with. The mask does not depend on
        `{% generation %}` marks: each turn is found by rendering again with a sentinel in its place. Raises
        UserError for a conversation that the template refuses.
        """
        messages = _with_arguments([{**each, "content": "" if each.get("content") is None else each["content"]} for each in messages], dict)
        how = How(generation_prompt, thinking, tuple(tools))
        text = self._text(messages, how)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = {turn: self._span(messages, turn, text, how) for turn in turns}
        wanted = {} if generation_prompt else {turn: span for turn, span in spans.items() if train_on == "all" or turn == turns[-1]}
        kept: dict[int, tuple[int, int]] = {}
        if leave_out:
            write = partial(self._try_text, how=how)
            kept = {turn: trained_part(messages, turn, text, span, write, leave_out) for turn, span in wanted.items() if span}
        cuts = [span for span in spans.values() if span]
        if not self.tokenizer.is_fast:
            cuts += kept.values()  # else a part's tokens could not be told from the turn's others
        ids, offsets = self._encode(text, cuts)
        mask, written = [False] * len(ids), [False] * len(ids)
        for turn, span in wanted.items():
            if span:
                first, last = (_count_before(offsets, edge) for edge in span)
                # a special token that swallows the white space after it reaches over its turn's end
                last += last < len(ids) and ids[last] in self.stop_ids and offsets[last][0] < span[1]
                written[first:last] = [True] * (last - first)
                begin, end = kept.get(turn, span)
                first = _count_before(offsets, begin)
                if end != span[1]:
                    last = max(first, _count_before(offsets, end))
                    # of a token that holds the end of what is said and the begin of a call (a stop and the line's end)
                    last += end > begin and last < len(ids) and offsets[last][0] < end
                mask[first:last] = [True] * (last - first)
        return Rendered(ids, mask, None if mask == written else written)

    def prompt(self, messages: Sequence[Message], *, thinking: bool = False, tools: Sequence[Tool] = ()) -> list[int]:
        """Return the ids to generate from: the conversation, up to where the assistant's answer begins."""
        return self.render(messages, generation_prompt=True, thinking=thinking, tools=tools).ids

    @cached_property
    def writes_tools(self) -> bool:
        """Say whether the template writes which functions can be called."""
        asked = [{"role": "user", "content": "a"}]
        name = SENTINEL.strip("\ue000\ue001")
        tool = {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}}
        return name in (self._try_text(asked, How(tools=(tool,))) or "")

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and otherwise as it is."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

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
        if "eos_token" not in str(tokenizer.chat_template):
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
                _tell_built_in(self.name, source)
                return source
        raise AssertionError("the plain template asks for no token")

    def _find_ending(self) -> tuple[bool, list[str]]:
        """Return whether the template wants a text as a list of parts, and the special tokens it writes after an answer.

        Most often that is one token, sometimes none. Raises UserError for a template that leaves answers out.
        """
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        refusal = None
        for parts in (False, True):
            self._in_parts = parts
            try:
                _, found, following = self._raw_text(conversation, How()).rpartition(SENTINEL)
            except UserError as error:
                refusal = refusal or error
                continue
            if found:
                return parts, self._special_at(following.lstrip())
        raise refusal or UserError(f"{self.name}: its chat template leaves out what the assistant says; give a model with another one")

    def _special_at(self, text: str) -> list[str]:
        """Return the special tokens that a text begins with."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()} | set(self.tokenizer.all_special_tokens)
        known = sorted((token for token in added if not token.isspace()), key=len, reverse=True)
        found: list[str] = []
        while token := next((each for each in known if each and text.startswith(each)), None):
            found.append(token)
            text = text[len(token) :]
        return found

    def _choose_closing(self, eos: Sequence[int]) -> str:
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}, {"role": "user", "content": "b"}]
        following = (self._try_text(conversation, How()) or "").rpartition(SENTINEL)[2]
        begins_next = self._special_at(following.lstrip())[:1]
        if begins_next and self.tokenizer.convert_tokens_to_ids(begins_next[0]) in eos:
            return begins_next[0]
        if not eos:
            raise UserError(
                f"{self.name}: nothing ends an answer: its tokenizer has no end-of-sequence token and its template no end of turn"
            )
        return str(self.tokenizer.convert_ids_to_tokens(eos[0]))

    def _choose_pad(self, size: int) -> int:
        taken = {*self.stop_ids, self.tokenizer.bos_token_id}
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        free = {token: number for token, number in vocabulary.items() if number < size and number not in taken}
        own = self.tokenizer.pad_token_id
        if own is not None and own < size and own not in taken:
            return int(own)
        template = str(self.tokenizer.chat_template)
        for pattern in PAD_CANDIDATES:
            found = sorted(number for token, number in free.items() if re.match(pattern, token) and token not in template)
            if found:
                return found[0]
        last = max(free.values())
        log.info(
            "%s reserves no token for padding: %r pads (it is masked everywhere)", self.name, self.tokenizer.convert_ids_to_tokens(last)
        )
        return last

    def _text(self, messages: Sequence[Message], how: How) -> str:
        """Return a conversation as text, closed where the template does not close a last answer."""
        text = self._raw_text(messages, how)
        answered = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")  # what ends a call is not known
        return text + self._closing if answered and not how.generation_prompt else text

    def _try_text(self, messages: Sequence[Message], how: How) -> str | None:
        try:
            return self._text(messages, how)
        except UserError:
            return None

    def _raw_text(self, messages: Sequence[Message], how: How) -> str:
        import jinja2

        if not messages:
            raise UserError("a conversation without messages cannot be rendered")
        said = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages] if self._in_parts else list(messages)
        try:
            template = self.tokenizer.get_chat_template()
            return str(
                self.tokenizer.apply_chat_template(
                    said,
                    tools=list(how.tools) or None,
                    chat_template=FIXED_CLOCK + template if "strftime_now" in template else template,
                    tokenize=False,
                    add_generation_prompt=how.generation_prompt,
                    enable_thinking=how.thinking,
                    thinking=how.thinking,
                    date_string=DATE,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            with_texts = _with_arguments(messages, str)
            if isinstance(error, TypeError) and with_texts != messages:  # DeepSeek-V3's joins them to a text; all others write an object
                return self._raw_text(with_texts, how)
            roles = ", ".join(str(each.get("role")) for each in messages[:8])
            raise UserError(f"{self.name}: its chat template refuses a conversation of {roles}: {' '.join(str(error).split())}") from error

    def _span(self, messages: Sequence[Message], turn: int, text: str, how: How) -> tuple[int, int] | None:
        """Return where in `text` an assistant turn begins and ends, as trained: from the prompt's end to its end-of-turn token.

        None where the template leaves the turn out, or moves it about so that it has no one place.
        """
        around = self._around(messages, turn, how)
        said = messages[turn]["content"]
        if messages[turn].get("tool_calls") and not (around and text in (said.join(around), said.strip().join(around))):
            end, closed = self._end_of_calls(messages, turn, text, around, how)
        else:
            end, closed = len(text) - common_suffix(around[1], text) if around else None, False
        # where the answer begins at inference: some templates write a space or an empty thought between the two; one with a
        # thought in it stands as if thinking were on, and one before the last question as if no functions could be called (Mistral's)
        offered = (how.tools, ()) if how.tools else ((),)
        asked = [How(True, thinking, tools) for tools in offered for thinking in (how.thinking, not how.thinking)]
        prompts = (self._try_text(messages[:turn], each) for each in asked if turn)
        start = next((len(each) for each in prompts if each and text.startswith(each)), None)
        if start is None and around:
            start = common_prefix(around[0], text)
        if start is None or end is None:
            return None
        end = max(start, end)
        blank = len(text) - end - len(text[end:].lstrip())
        written = next((each for each in self._endings if text.startswith(each, end + blank)), None)
        return (start, end) if closed or not written else (start, end + blank + len(written))

    def _end_of_calls(
        self, messages: Sequence[Message], turn: int, text: str, around: tuple[str, str] | None, how: How
    ) -> tuple[int | None, bool]:
        """Return where a turn that calls tools ends, and whether its end of turn stands before that place.

        The calls stand beside the answer's text or in its place: the turn ends where the conversation up to it ends.
        """
        alone = (self._try_text(messages[: turn + 1], how._replace(generation_prompt=False)) or "").rstrip()
        if alone and text.startswith(alone):
            return len(alone), alone.endswith(self._endings)
        if around is None:
            return None, False
        end = len(text) - common_suffix(around[1], text)
        told = self._around(messages, turn + 1, how) if turn + 1 < len(messages) else None
        if told and common_prefix(told[0], text) < end:
            return None, False  # the tool's answer is written into the turn of the assistant, who did not say it
        return end, False

    def _around(self, messages: Sequence[Message], turn: int, how: How) -> tuple[str, str] | None:
        """Return the texts before and after the content of a turn, as if it called no tool; None where the template shows none."""
        others = {key: value for key, value in messages[turn].items() if key != "tool_calls"}
        for message in (others, {"role": others["role"]}):  # with what else the turn has (a thought, a name), else without
            marked = [*messages[:turn], {**message, "content": SENTINEL}, *messages[turn + 1 :]]
            before, found, after = (self._try_text(marked, how) or "").partition(SENTINEL)
            if found:
                return before, after
        return None

    def _encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, and where in it each of them stands.

        A token that would stand across an edge of a span is cut there, as it is where a model goes on from a prompt. A
        conversation and the prompts it begins with are cut alike, so that their ids are too.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        base = 0

        def add(end: int) -> None:
            coded = self._tokenize(text[base:end])
            ids.extend(coded[0])
            offsets.extend((start + base, stop + base) for start, stop in coded[1])

        rest = self._tokenize(text)
        for place, begins in sorted({(edge, edge == span[0]) for span in spans for edge in span}):
            count = _count_before(rest[1], place - base)
            across = count < len(rest[0]) and rest[1][count][0] < place - base and (begins or rest[0][count] not in self.stop_ids)
            if across or (begins and self._tokenize(text[base:place])[0] != rest[0][:count]):
                add(place)
                base = place
                rest = self._tokenize(text[base:])
        add(len(text))
        begin = self.tokenizer.bos_token_id
        # a template like SmolLM2's begins every turn with the bos token: only two in a row are a fault
        if begin is not None and len(ids) > 1 and ids[0] == begin == ids[1]:
            raise UserError(
                f"{self.name}: its chat template begins with two {self.tokenizer.bos_token!r} tokens; take one out of the template"
            )
        return ids, offsets

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text:
            return [], []
        if not self.tokenizer.is_fast:  # it does not tell where its tokens stand: as one, they are cut at every edge
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, [(0, len(text))] * len(ids)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        return coded["input_ids"], coded["offset_mapping"]


def _with_arguments(messages: Sequence[Message], kind: type) -> list[Message]:
    """Return messages with the arguments of their tool calls as objects (dict) or as JSON texts (str), as far as they can be."""

    def arguments(value: Any) -> Any:
        if kind is str:
            return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value

    def call(each: Any) -> Any:
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return each
        return {**each, "function": {**function, "arguments": arguments(function["arguments"])}}

    return [{**each, "tool_calls": [call(one) for one in each["tool_calls"]]} if each.get("tool_calls") else each for each in messages]


def load_chat(ref: ModelRef) -> Chat:
    """Load a model's tokenizer and apply the policy. Raises UserError for a model without tokenizer, or whose answers never end."""
    tokenizer = load_tokenizer(ref)
    if ref.path is not None and ref.path.is_dir():
        settings, generation = (load_object(ref.path / name) for name in ("config.json", "generation_config.json"))
        listed = [*_as_list(generation.get("eos_token_id")), *_as_list(settings.get("eos_token_id"))]
        size = settings.get("vocab_size", settings.get("text_config", {}).get("vocab_size"))
        return Chat(tokenizer, eos_ids=listed, num_embeddings=size, name=ref.name)
    return Chat(tokenizer, eos_ids=_hub_eos(ref) if ref.path is None else (), name=ref.name)


def _hub_eos(ref: ModelRef) -> list[int]:
    from transformers import GenerationConfig

    try:
        name, arguments = ref.pretrained()
        return _as_list(GenerationConfig.from_pretrained(name, **arguments).eos_token_id)
    except OSError:  # a model of the Hub need not have one: then the tokenizer's stands alone
        log.info("%s has no generation config", ref.name)
        return []


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _count_before(offsets: Sequence[tuple[int, int]], edge: int) -> int:
    """Return how many tokens end at or before a place of the text."""
    return bisect.bisect_right(offsets, edge, key=lambda each: each[1])
