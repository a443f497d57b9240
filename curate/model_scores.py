"""Scores that a model gives: how probable it finds an answer (GRAPE, perplexity, IFD), and the reward of a reward model.

What is computed is kept in curate/values.sqlite under the hash of the model's weights and template, the number format and the
conversation, row by row as it comes: a killed run goes on where it was, and rows that did not change cost nothing when they are
scored again.
Conversations are rendered by core.chat, as in training and evaluation. The answer is the last turn of the assistant; all before
it is its prompt and is masked.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.config import load_config
from ..core.engines.base import Engine, EngineConfig, ScoreRequest
from ..core.engines.loading import choose
from ..core.errors import UserError
from ..core.example import tools_of
from ..core.likelihood import Reading, read_conversation
from ..core.named_models import NamedModel, find_models
from ..core.progress import Progress
from ..core.run import Run
from ..core.values import ValueStore, value_key
from .scorers import Candidate, ColumnScorer, Result, Scorer, failure

log = logging.getLogger(__name__)

VALUES = "values.sqlite"
CHUNK = 1 << 12  # rows that are rendered, and sorted by length, together
BATCH_TOKENS = EngineConfig.batch_tokens


UNTOLD = (  # an answer that is stored is not made again for it
    "the teacher told none: give model=TEACHER, which computes it, or distill into a new folder with --logprobs (and an engine that tells)"
)


def grape(
    *,
    model: str,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> ColumnScorer:
    """Give the mean log-probability of the answer under the student `model`, in nats per token: the higher, the better it fits.

    GRAPE: Zhang, Dai and Peng 2025, arXiv 2502.04194, with the base student. The end of turn counts as a token of the answer, as
    in training; not where the answer was cut, for its end was never written.
    """
    config = engine_config(engine, device, dtype, batch_tokens, replicas=replicas, executor=executor)
    return _of_answers(lambda mean: mean, config, model)


def logprob(
    *,
    model: str | None = None,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> Scorer | ColumnScorer:
    """Give the mean log-probability of the answer, in nats per token: what the teacher told, or under `model`, as `grape` does."""
    if model is not None:
        return grape(
            model=model, engine=engine, device=device, dtype=dtype, batch_tokens=batch_tokens, replicas=replicas, executor=executor
        )
    return lambda row: (row.logprob, "" if row.logprob is not None else UNTOLD)


def perplexity(
    *,
    model: str,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> ColumnScorer:
    """Give the perplexity of the answer after its prompt: exp of minus the mean that `grape` gives, over the same tokens."""
    config = engine_config(engine, device, dtype, batch_tokens, replicas=replicas, executor=executor)
    return _of_answers(lambda mean: float(np.exp(-mean)), config, model)


def ifd(
    *,
    model: str,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> ColumnScorer:
    """Give the instruction-following difficulty as the ratio of mean losses, L(answer | prompt) / L(answer). Keep what is below 1.

    Li et al. 2023, arXiv 2308.12032, as its code computes it; `ifd_ppl` is the other definition that is in use. From 1 on the
    prompt does not help to find the answer. The tokens of the answer are the same in both losses and leave the end of turn out;
    alone, the answer stands after the token that begins a text.
    """
    config = engine_config(engine, device, dtype, batch_tokens, replicas=replicas, executor=executor)
    return _ifd(lambda given, alone: -given / -alone, config, model)


def ifd_ppl(
    *,
    model: str,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> ColumnScorer:
    """Give the instruction-following difficulty as the ratio of perplexities, exp(L(answer | prompt) - L(answer)). See `ifd`.

    Li et al. 2024, arXiv 2402.00530 (Superfiltering).
    """
    config = engine_config(engine, device, dtype, batch_tokens, replicas=replicas, executor=executor)
    return _ifd(lambda given, alone: float(np.exp(alone - given)), config, model)


def reward(*, model: str, device: str | None = None, dtype: str = "auto", batch_tokens: int = BATCH_TOKENS) -> ColumnScorer:
    """Give the score of the whole conversation by a reward model: sequence classification with one output and a chat template."""
    config = engine_config("transformers", device, dtype, batch_tokens)

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        from ..core.models import resolve_model
        from ..core.reward import open_reward_model

        found = _find(model, config)
        assert found.chat is not None
        readings = [_read(found, row, read_reward) for row in rows]
        with ValueStore(run.room("curate") / VALUES) as store:
            missing = {each.key: each for each in readings if not each.error and each.key not in store}
            errors: dict[str, str] = {}
            if missing:
                with (
                    closing(open_reward_model(resolve_model(model), found.chat, found.engine)) as opened,
                    Progress(f"reward by {model}", total=len(missing), unit="rows") as progress,
                ):
                    for scored in opened.scores(ScoreRequest(key=key, ids=each.ids, start=0) for key, each in missing.items()):
                        if scored.error:
                            errors[scored.key] = scored.error
                        else:
                            store.put(scored.key, scored.logprobs)
                        progress.advance(tokens=len(missing[scored.key].ids))
            for number, each in enumerate(readings):
                error = each.error or errors.get(each.key)
                yield number, (None, error) if error else (float(store[each.key][0]), "")

    return ColumnScorer(score)


def read_reward(model: NamedModel, row: Candidate) -> Reading:
    """Render a whole conversation for a reward model, as its template has it."""
    assert model.chat is not None
    ids = model.chat.render(json.loads(row.messages), tools=tools_of(row.meta)).ids
    if model.context is not None and len(ids) > model.context:
        return Reading(error="too_long")
    return Reading(value_key("reward", model.identity, model.engine.dtype, ids), tuple(ids))


@dataclass(frozen=True, slots=True)
class Sums:
    """Log-probabilities of an answer, summed: of its text, and of its end of turn."""

    num_text: int
    text: float
    num_ends: int
    ends: float

    def mean(self, *, ends: bool) -> float:
        """Return the mean over the tokens of the text, or of the text and its end."""
        return (self.text + self.ends) / (self.num_text + self.num_ends) if ends else self.text / self.num_text


def _of_answers(value: Callable[[float], float], config: EngineConfig, model: str) -> ColumnScorer:
    """Return the scorer whose value is made of the mean log-probability of the answer's tokens."""

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        for number, found in _sums(_find(model, config), rows, run, ("given",)):
            if isinstance(found, str):
                yield number, (None, found)
            else:
                yield number, (value(found[0].mean(ends=rows[number].finish_reason != "length")), "")

    return ColumnScorer(score)


def _ifd(value: Callable[[float, float], float], config: EngineConfig, model: str) -> ColumnScorer:
    """Return the scorer whose value is made of the mean log-probabilities of the answer after its prompt, and alone."""

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        for number, found in _sums(_find(model, config), rows, run, ("given", "alone")):
            if isinstance(found, str):
                yield number, (None, found)
                continue
            given, alone = (each.mean(ends=False) for each in found)
            yield number, (value(given, alone), "") if alone else (None, "the model finds the answer certain without its prompt")

    return ColumnScorer(score)


def _sums(model: NamedModel, rows: Sequence[Candidate], run: Run, kinds: Sequence[str]) -> Iterator[tuple[int, list[Sums] | str]]:
    """Yield for each row its sums of these kinds, given its prompt or alone, in order; or why it has none.

    While the model computes, the rows that come next are rendered.
    """
    settings = json.dumps([model.identity, model.template, model.engine.engine, model.engine.dtype])

    def key(kind: str, row: Candidate) -> str:
        return hashlib.sha256(f"{kind}\n{settings}\n{row.messages}".encode("utf-8", "surrogatepass")).hexdigest()

    def render(chunk: Mapping[int, Candidate]) -> dict[int, list[Reading]]:
        readings = {place: _read(model, row, read_answer) for place, row in chunk.items()}
        return {
            place: [each if each.error or kind == "given" else read_alone(model, each) for kind in kinds]
            for place, each in readings.items()
        }

    with ExitStack() as stack:
        store = stack.enter_context(ValueStore(run.room("curate") / VALUES))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        waiting: deque[tuple[int, list[list[str]], Future[dict[int, list[Reading]]]]] = deque()
        engine, progress = None, None

        def finish() -> Iterator[tuple[int, list[Sums] | str]]:
            nonlocal engine, progress
            start, keys, rendered = waiting.popleft()
            readings = rendered.result()
            errors = {place: each[0].error for place, each in readings.items() if each[0].error}
            sound = {
                name: each
                for place, found in readings.items()
                if place not in errors
                for name, each in zip(keys[place], found, strict=True)
            }
            missing = {name: each for name, each in sound.items() if name not in store}
            if missing and (engine is None or progress is None):
                engine = stack.enter_context(model.running())
                progress = stack.enter_context(Progress(f"score with {model.name}", total=len(rows), unit="rows", done=start))
            failed = _compute(engine, missing, store, progress) if missing and engine and progress else {}
            if progress:
                progress.advance(len(keys))
            for place, names in enumerate(keys):
                error = errors.get(place) or next((failed.get(name, "not scored") for name in names if name not in store), None)
                sums = [] if error else [_stored_sums(store, name) for name in names]
                yield start + place, error or (sums if all(each.num_text for each in sums) else "empty answer")

        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            keys = [[key(kind, row) for kind in kinds] for row in chunk]
            fresh = {
                place: row for place, (row, names) in enumerate(zip(chunk, keys, strict=True)) if any(name not in store for name in names)
            }
            waiting.append((start, keys, pool.submit(render, fresh)))
            if len(waiting) > 1:
                yield from finish()
        while waiting:
            yield from finish()


def _compute(engine: Engine, missing: Mapping[str, Reading], store: ValueStore, progress: Progress) -> dict[str, str]:
    """Compute the sums of readings and store them, each as soon as it is there; return the errors of those that have none."""
    errors: dict[str, str] = {}
    longest_first = sorted(missing.items(), key=lambda item: -len(item[1].ids))
    requests = (ScoreRequest(key=key, ids=each.ids, start=each.mask.index(True)) for key, each in longest_first)
    for scored in engine.logprobs(requests):
        reading = missing[scored.key]
        if scored.error:
            errors[scored.key] = scored.error
            continue
        kept = np.asarray(reading.mask[reading.mask.index(True) :], dtype=bool)
        values, ends = np.asarray(scored.logprobs)[kept], np.asarray(reading.ends, dtype=bool)
        store.put(scored.key, [float((~ends).sum()), float(values[~ends].sum()), float(ends.sum()), float(values[ends].sum())])
        progress.advance(0, tokens=len(reading.ids))
    return errors


def _stored_sums(store: ValueStore, key: str) -> Sums:
    num_text, text, num_ends, ends = store[key].tolist()
    return Sums(int(num_text), text, int(num_ends), ends)


def read_answer(model: NamedModel, row: Candidate) -> Reading:
    """Render a row with its last answer masked."""
    return read_conversation(model, json.loads(row.messages), where="a row", train_on="last", tools=tools_of(row.meta))


def read_alone(model: NamedModel, answer: Reading) -> Reading:
    """Return the answer's tokens after the token that begins a text: the model's own, else the last that ends one."""
    assert model.chat is not None
    begin = model.chat.tokenizer.bos_token_id
    ids = [token for token, masked in zip(answer.ids, answer.mask, strict=True) if masked]
    first = model.chat.stop_ids[-1] if begin is None else begin
    return Reading(ids=(first, *ids), mask=(False, *[True] * len(ids)), ends=answer.ends)


def _read(model: NamedModel, row: Candidate, read: Callable[[NamedModel, Candidate], Reading]) -> Reading:
    if row.response is None or not row.response.strip():
        return Reading(error="no response" if row.response is None else "empty answer")
    try:
        return read(model, row)
    except Exception as error:  # noqa: BLE001  one row's failure is that row's result
        return Reading(error=failure(error)[1])


def engine_config(engine: str, device: str | None, dtype: str, batch_tokens: int, **others: Any) -> EngineConfig:
    """Return how a scorer's model is run, from the scorer's options: `others` are base_url, replicas, executor.

    Raises UserError for what none of them may be.
    """
    if batch_tokens < 1:
        raise UserError(f"batch_tokens: expected a whole number above 0, found {batch_tokens}")
    settings = {"engine": engine, "device": device, "dtype": dtype, "batch_tokens": batch_tokens, **others}
    return load_config(EngineConfig, settings, "scorer")


def _find(model: str, config: EngineConfig) -> NamedModel:
    """Look a model up; auto is transformers, in 16 bits on a GPU."""
    from ..core.hardware import half_precision, pick_device

    if choose(config) == "openai":
        raise UserError(f"{model}: a server does not tell the probabilities of a given text; give a model on disk")
    config = replace(config, engine="transformers") if config.engine == "auto" else config
    device = pick_device(config.device)
    if config.dtype == "auto" and device != "cpu":
        config = replace(config, dtype=str(half_precision(device)).removeprefix("torch."))
    (found,) = find_models({model: model}, config)
    return found
