"""The embedded engine: runs a model with transformers, anywhere; rows leave their batch as they finish."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache

from ..batches import BatchRunner, pad
from ..chat import Chat, load_chat
from ..errors import UserError
from ..hardware import half_precision, pick_device
from ..head import Scorer
from ..models import cast, context_length, load_model, model_identity, quantisation, resolve_model
from .base import NOT_FINITE, ChoiceRequest, Completion, EngineConfig, Request, ScoreRequest, TokenLogprobs
from .stops import StopTexts

log = logging.getLogger(__name__)

WINDOW = 512  # requests that are sorted by length together
NUCLEUS = 256  # top-p looks at so many tokens first, and at all of them only where their probability is too small
ON_GPU = 16  # times the tokens of a batch, where memory allows: a step takes the host as long for one row as for hundreds
SHARE_OF_FREE = 0.5  # of a GPU's free memory that a batch is reckoned to take
MEASURED = 16, 32  # tokens of the two texts by which the cache is measured
KEEP_SHARE = 0.75  # copying the cache costs about as much as a step: it is done when so few rows of a batch are left

S = TypeVar("S", ScoreRequest, ChoiceRequest)


@dataclass(slots=True)
class _Row:
    """A request under way."""

    request: Request
    randoms: np.ndarray  # one uniform number for each token it may get
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0  # sum over its tokens
    done: bool = False

    def finish(self, chat: Chat, reason: str, before: str | None) -> Completion:
        """Return the completion; a stop token is counted and not part of the text. `before` is the text before a stop text."""
        text_ids = self.ids[:-1] if reason == "stop" else self.ids
        return Completion(
            key=self.request.key,
            text=chat.decode(text_ids) if before is None else before,
            finish_reason="length" if reason == "length" and before is None else "stop",
            num_tokens=len(self.ids),
            logprob=self.logprob / len(self.ids),
            token_ids=tuple(self.ids),
        )


class TransformersEngine:
    """Runs one model with transformers. See `core.engines.base.Engine`."""

    def __init__(self, model: Any, chat: Chat, *, identity: str, batch_tokens: int, together: bool = False) -> None:
        """`together`: several processes, each with a part of the model, answer the same; then no batch is made by one's free memory."""
        self.model = model
        self.chat: Chat | None = chat
        self.identity = identity
        self.context_length = context_length(model.config)
        self._chat = chat
        self._fills = model.device.type == "cuda" and not together  # the free memory with a batch
        meant = batch_tokens != EngineConfig.batch_tokens
        self._batch_tokens = batch_tokens * (ON_GPU if self._fills and not meant else 1)
        # transformers renames the argument in 5.24 and warns about the old name
        taken = inspect.signature(type(model).forward).parameters
        self._cache_argument = next((each for each in ("cache", "past_key_values") if each in taken), "")
        self._kept: tuple[int, int] | None = None  # of the cache: see cache_bytes
        self.steps = 0
        self._stop = torch.tensor(chat.stop_ids, device=model.device)
        self._stop_texts = StopTexts(chat.decode)
        self._runner = BatchRunner(batch_tokens, model.device.type)
        self._scorer: Any = Scorer(model)

    def close(self) -> None:
        """Give the memory of the model back."""
        device = self.model.device.type
        self.model, self._scorer = None, None
        if device == "cuda":
            torch.cuda.empty_cache()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; each completion is given as soon as its row stops. Longest prompts first within a window.

        Raises UserError for a model that keeps what it has read outside of transformers' cache (RWKV, GPT-1), or not at all.
        """
        if not self._cache_argument:
            kind = type(self.model).__name__
            raise UserError(f"{kind}: takes no cache of what it has read; the transformers engine can score with it, not answer")
        waiting = iter(requests)
        while window := list(islice(waiting, WINDOW)):
            sound = []
            for request in window:
                error = self._check(request)
                if error:
                    yield Completion(key=request.key, finish_reason="error", error=error)
                else:
                    sound.append(request)
            sound.sort(key=lambda each: len(each.prompt_ids) + each.sampling.max_new_tokens, reverse=True)
            while sound:
                longest = max(len(each.prompt_ids) for each in sound) + max(each.sampling.max_new_tokens for each in sound)
                size = max(1, min(self._batch_tokens // longest, self._fitting(longest)))
                batch, sound = sound[:size], sound[size:]
                yield from self._with_halving(batch)

    def _fitting(self, longest: int) -> int:
        """Return how many rows of `longest` tokens fit into the memory of the model's GPU; a window of them where that is not asked."""
        if not self._fills:
            return WINDOW
        device = self.model.device
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held
        if self._kept is None:
            self._kept = cache_bytes(self.model, self._cache_argument)
        return int(SHARE_OF_FREE * free) // row_bytes(self.model.config, self._kept, longest, self.model.dtype.itemsize)

    def _check(self, request: Request) -> str | None:
        length = len(request.prompt_ids) + request.sampling.max_new_tokens
        if request.sampling.json_schema is not None:
            raise UserError("json_schema: the transformers engine cannot hold an answer to a schema; take the engine vllm or openai")
        if not request.prompt_ids:
            return "the prompt has no tokens"
        if self.context_length is not None and length > self.context_length:
            new = request.sampling.max_new_tokens
            return f"prompt too long: {len(request.prompt_ids)} tokens and {new} new ones do not fit the context of {self.context_length}"
        return None

    def _with_halving(self, batch: list[Request]) -> Iterator[Completion]:
        """Answer a batch; when memory runs out, answer what is left in two halves. A row's random numbers begin anew."""
        answered = set()
        try:
            for completion in self._run(batch):
                answered.add(completion.key)
                yield completion
            return
        except torch.OutOfMemoryError:
            left = [each for each in batch if each.key not in answered]
        torch.cuda.empty_cache()
        if len(left) == 1:
            yield Completion(key=left[0].key, finish_reason="error", error="out of memory, even alone in its batch")
            return
        self._batch_tokens = max(1, len(batch) * max(len(each.prompt_ids) + each.sampling.max_new_tokens for each in batch) // 2)
        log.info("out of memory with %d sequences at once: going on with half as many", len(batch))
        middle = (len(left) + 1) // 2
        yield from self._with_halving(left[:middle])
        yield from self._with_halving(left[middle:])

    @torch.inference_mode()
    def _run(self, batch: list[Request]) -> Iterator[Completion]:
        device = self.model.device
        rows = [_Row(each, np.random.Generator(np.random.Philox(each.seed)).random(each.sampling.max_new_tokens)) for each in batch]
        ids, mask = pad([each.prompt_ids for each in batch], self._chat.pad_id, left=True)
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        step = 0
        while rows:  # one a line of the batch; those that are done leave when enough of them are
            told = {"attention_mask": mask, "position_ids": positions, self._cache_argument: cache}
            logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **told).logits[:, -1].float()
            tokens, logprobs = _choose(logits, rows, step)
            step += 1
            self.steps += 1
            stopped = torch.isin(tokens, self._stop).tolist()
            for row, token, logprob, stop in zip(rows, tokens.tolist(), logprobs.tolist(), stopped, strict=True):
                if row.done:
                    continue
                row.ids.append(token)
                row.logprob += logprob
                texts = row.request.sampling.stop
                before = self._stop_texts.ended(row.ids, texts) if texts and not stop else None
                row.done = stop or before is not None or step == row.request.sampling.max_new_tokens or not np.isfinite(logprob)
                if not np.isfinite(logprob):
                    error = f"{NOT_FINITE} at token {step}"
                    yield Completion(key=row.request.key, finish_reason="error", error=error)
                elif row.done:
                    yield row.finish(self._chat, "stop" if stop else "length", before)
            left = [line for line, row in enumerate(rows) if not row.done]
            ids = tokens[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if len(left) <= KEEP_SHARE * len(rows):
                rows = [rows[line] for line in left]
                if rows:
                    index = torch.tensor(left, device=device)
                    ids, positions, mask = ids[index], positions[index], mask[index]
                    cache.reorder_cache(index)  # batch_select_indices would leave out states of linear attention

    def logprobs(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenLogprobs]:
        """Score texts, longest first; a text longer than the context comes back with its error."""
        yield from self._run_scores(requests, self._check_score, self._score)

    def choices(self, requests: Iterable[ChoiceRequest]) -> Iterator[TokenLogprobs]:
        """Give the log-probabilities of some tokens as the next one, longest prompt first."""
        yield from self._run_scores(requests, self._check_choice, self._choose)

    def _run_scores(
        self, requests: Iterable[S], check: Callable[[S], str | None], compute: Callable[[list[S]], Iterable[TokenLogprobs]]
    ) -> Iterator[TokenLogprobs]:
        refused: list[TokenLogprobs] = []

        def sound() -> Iterator[S]:
            for request in requests:
                error = check(request)
                if error:
                    refused.append(TokenLogprobs(key=request.key, error=error))
                else:
                    yield request

        def failed(request: S, error: str) -> TokenLogprobs:
            return TokenLogprobs(key=request.key, error=error)

        for result in self._runner.run(sound(), lambda each: len(each.ids), compute, failed):
            while refused:
                yield refused.pop()
            yield result
        yield from refused

    def _check_score(self, request: ScoreRequest) -> str | None:
        if not 1 <= request.start < len(request.ids):
            return f"nothing to score: {len(request.ids)} tokens, scored from token {request.start}"
        if self.context_length is not None and len(request.ids) > self.context_length:
            return f"too long: {len(request.ids)} tokens do not fit the context of {self.context_length}"
        return None

    def _check_choice(self, request: ChoiceRequest) -> str | None:
        if not request.ids or not request.choices:
            return "nothing to choose: a prompt and choices are needed"
        return self._check_score(ScoreRequest(key="", ids=(*request.ids, request.choices[0]), start=len(request.ids)))

    @torch.inference_mode()
    def _score(self, batch: list[ScoreRequest]) -> list[TokenLogprobs]:
        self.steps += 1
        ids, _ = pad([each.ids for each in batch], self._chat.pad_id, left=False)
        counts = torch.tensor([len(each.ids) - each.start for each in batch])
        lines = torch.repeat_interleave(torch.arange(len(batch)), counts)
        places = torch.cat([torch.arange(each.start - 1, len(each.ids) - 1) for each in batch])
        device = self.model.device
        values = self._scorer.targets(ids.to(device), lines.to(device), places.to(device)).cpu()
        return [_told(request.key, part.tolist()) for request, part in zip(batch, values.split(counts.tolist()), strict=True)]

    @torch.inference_mode()
    def _choose(self, batch: list[ChoiceRequest]) -> list[TokenLogprobs]:
        self.steps += 1
        ids, mask = pad([each.ids for each in batch], self._chat.pad_id, left=False)
        device = self.model.device
        choices = [torch.tensor(each.choices, device=device) for each in batch]
        found = self._scorer.choices(ids.to(device), (mask.sum(1) - 1).to(device), choices)
        return [_told(request.key, values.tolist()) for request, values in zip(batch, found, strict=True)]


@torch.inference_mode()
def cache_bytes(model: Any, argument: str) -> tuple[int, int]:
    """Return the bytes of a row in transformers' cache, measured with two short texts: for each token, and what does not grow.

    Every kind of model keeps something else: keys and values of unlike widths, or for some of its layers only, or the states of
    linear attention, often in float32. Layers that look back a little way only count as if they looked back all the way. `argument`
    is what the model calls its cache.
    """
    sizes = []
    for tokens in MEASURED:
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{argument: cache})
        sizes.append(stored_bytes(cache))
    grows = -(-(sizes[1] - sizes[0]) // (MEASURED[1] - MEASURED[0]))
    return grows, max(0, sizes[0] - MEASURED[0] * grows)


def stored_bytes(cache: DynamicCache) -> int:
    """Return the bytes of all that a cache stores."""
    values = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [each for value in values for each in (value.values() if isinstance(value, dict) else [value])]
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, torch.Tensor))


def row_bytes(settings: Any, kept: tuple[int, int], tokens: int, itemsize: int) -> int:
    """Return the bytes that an answer of so many tokens, its prompt's included, takes about while it is generated.

    What the cache keeps (`cache_bytes`); a layer's own numbers and the mask, as if all tokens were the prompt's; and the float32
    logits of a step with what choosing from them makes, counted six times. More than it takes, mostly.
    """
    text = settings.get_text_config(decoder=True)
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers  # they need not be alike: Gemma 4
    inner = max(int(np.max(getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size)) for layer in layers)  # Gemma 3n has a list
    grows, stays = kept
    return tokens * (grows + (12 * text.hidden_size + 3 * inner) * itemsize + 3 * tokens) + stays + 6 * 4 * text.vocab_size


def _told(key: str, values: list[float]) -> TokenLogprobs:
    sound = bool(np.isfinite(values).all())
    error = None if sound else f"{NOT_FINITE} for one of its tokens"
    return TokenLogprobs(key=key, logprobs=tuple(values) if sound else (), error=error)


def _choose(logits: torch.Tensor, rows: Sequence[_Row], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next token of each row and its log-probability under the model itself (before temperature and top-p).

    A row's choice depends on its own logits and its own random number, not on the batch.
    """
    samplings = [row.request.sampling for row in rows]
    tokens = logits.argmax(-1)
    lines = [line for line, sampling in enumerate(samplings) if sampling.temperature > 0]
    if lines:
        device = logits.device
        index = torch.tensor(lines, device=device)
        temperature = torch.tensor([samplings[line].temperature for line in lines], device=device)
        top_p = torch.tensor([samplings[line].top_p for line in lines], device=device)
        numbers = [float(rows[line].randoms[min(step, len(rows[line].randoms) - 1)]) for line in lines]
        chosen = sample(
            (logits[index] if len(lines) < len(rows) else logits) / temperature[:, None], top_p, torch.tensor(numbers, device=device)
        )
        tokens[index] = chosen
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens, logprobs


def sample(logits: torch.Tensor, top_p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution of its nucleus: the smallest set of most probable
    tokens that holds `top_p` (Holtzman et al. 2020, arXiv 1904.09751). `numbers` are uniform in [0, 1), one a row.
    """
    probabilities = logits.softmax(-1)
    if bool((top_p >= 1).all()):
        best, order = probabilities, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    else:
        width = min(NUCLEUS, logits.shape[-1])
        best, order = probabilities.topk(width, dim=-1)
        if width < logits.shape[-1] and bool((best.sum(-1) < top_p).any()):
            best, order = probabilities.sort(dim=-1, descending=True)
    reached = best.double().cumsum(-1)
    inside = reached - best < top_p[:, None]  # the token that reaches top_p is the last one inside
    mass = (best * inside).sum(-1, dtype=torch.double)
    place = torch.searchsorted(reached, (numbers.double() * mass)[:, None], right=True)[:, 0]
    last = (inside.sum(-1) - 1).clamp(min=0)  # rounding must not lead out of the nucleus; among logits that are no numbers it is empty
    return order.gather(1, torch.minimum(place, last)[:, None])[:, 0]


def open(model: str, config: EngineConfig, *, revision: str | None = None) -> TransformersEngine:
    """Load a model for this engine. Raises UserError for a model or device that is not there, or a model that the card cannot hold."""
    ref = resolve_model(model, revision=revision)
    chat = load_chat(ref)
    device = pick_device(config.device)
    if quantisation(ref) is not None:
        loaded = load_model(ref, dtype=config.dtype, device=device)
    else:
        loaded = load_model(ref, dtype=config.dtype)
        if config.dtype == "auto" and loaded.dtype != torch.float32:
            loaded = cast(loaded, half_precision(device) or torch.float32)
        check_room(loaded, device, ref.name)
        loaded = loaded.to(device)
    return TransformersEngine(loaded, chat, identity=model_identity(ref), batch_tokens=config.batch_tokens)


def check_room(model: Any, device: str, name: str) -> None:
    """Raise UserError for a model whose weights are more than what is free on a GPU, with what is missing."""
    if not device.startswith("cuda"):
        return
    free, total = (each / 2**30 for each in torch.cuda.mem_get_info(device))
    weights = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers())) / 2**30
    if weights > free:
        raise UserError(
            f"{name}: its weights take {weights:.1f} GiB, and {free:.1f} of the card's {total:.1f} GiB are free; {weights - free:.1f} GiB"
            f" are missing. Free the card, take a model of up to {free:.1f} GiB, a quantised one, or device cpu"
        )
