"""Put the questions of a task to a model: each answer is generated once for what decides it, and stored apart from all scores."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import polars as pl

from ..core.engines.base import ChoiceRequest, Engine, Request, Sampling, ScoreRequest, choice_logprobs
from ..core.errors import UserError
from ..core.example import Message, Tool, sent
from ..core.named_models import NamedModel
from ..core.progress import Progress
from ..core.store import SampleStore, decisive_settings, sample_key, sample_seed
from ..core.values import ValueStore, value_key
from .compare import Answer, answer_identity, answer_into
from .config import TasksConfig
from .tasks.base import Item, Task, filled

log = logging.getLogger(__name__)

TOGETHER = 256  # items whose texts are cut into tokens at once, on all cores


@dataclass(frozen=True, slots=True)
class Asked:
    """A model and the way in which it is asked: a row of the results."""

    name: str
    model: NamedModel
    chat: bool

    @property
    def own_template(self) -> bool:
        """Say whether chats go by the model's own template, as a server's do."""
        return self.model.chat is None or self.model.chat.template_source == "model"

    @property
    def told(self) -> str:
        """Write the way for people."""
        if not self.chat or self.model.chat is None or self.own_template:
            return "chat" if self.chat else "completion"
        return f"in chats by {self.model.chat.template_source}"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One answer that a task is to have."""

    item: Item
    index: int
    key: str = ""
    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    error: str | None = None


def ways(models: Sequence[NamedModel], tasks: Sequence[Task], config: TasksConfig) -> list[Asked]:
    """Return the ways in which models are asked, those of one model beside each other.

    A model without a template of its own is asked in both ways unless one was chosen: which of them shows what it knows cannot be
    told before, and taking the better one afterwards would flatter it. Its chats go by the template that training would give it.
    Raises UserError where a server is to be asked for probabilities, or for a text that goes on.
    """
    found = []
    likelihood = next((task.name for task in tasks if task.likelihood), None)
    for model in models:
        if likelihood and model.chat is None:
            raise UserError(
                f"{model.name}={model.reference}: a server does not tell the probabilities of a given text, which {likelihood} compares;"
                f" take {likelihood}_generated, or a model on disk"
            )
        if config.ask == "completion" and model.chat is None:
            raise UserError(f"{model.name}={model.reference}: a server takes chats only; leave out --ask completion")
        chat, completion = Asked(f"{model.name}:chat", model, True), Asked(f"{model.name}:completion", model, False)
        own = chat.own_template
        if model.chat is not None and (config.ask == "both" or (config.ask == "auto" and not own)):
            found += [chat, completion] if own else [completion, chat]
        else:
            found.append(Asked(model.name, model, config.ask != "completion"))
        if not own and config.ask != "completion":
            also = ", and given texts to go on from; others are compared with both" if config.ask != "chat" else ""
            log.info("%s has no chat template of its own: it is asked %s, as in training%s", model.name, chat.told, also)
    return found


def ways_of(task: Task, asked: Sequence[Asked]) -> list[Asked]:
    """Return the ways for one task: where choices are compared by their probability, each model is asked once, without a template."""
    if not task.likelihood:
        return list(asked)
    return [Asked(name, model, False) for name, model in {way.model.name: way.model for way in asked}.items()]


def compared(asked: Sequence[Asked]) -> list[tuple[str, str]]:
    """Return which rows are compared, as (baseline, other): each other model with every way of the first; of one alone, its ways."""
    first = [way.name for way in asked if way.model is asked[0].model]
    others = [way.name for way in asked if way.model is not asked[0].model]
    return [(baseline, other) for other in others for baseline in first] if others else [(first[0], other) for other in first[1:]]


@contextmanager
def loaded_when_needed(model: NamedModel) -> Iterator[Callable[[], Engine]]:
    """Yield what opens a model in its engine, at its first call: once for all tasks, and never where every answer is stored."""
    with ExitStack() as stack:
        opened: list[Engine] = []

        def engine() -> Engine:
            if not opened:
                opened.append(stack.enter_context(model.running()))
            return opened[0]

        yield engine


def ask(asked: Asked, task: Task, store: SampleStore, config: TasksConfig, engine: Callable[[], Engine]) -> tuple[list[list[Answer]], int]:
    """Return each item's answers, and how many were generated now. A completion ends where it goes on to something else.

    Second turns are asked once the first ones are answered, each sample of them after its own.
    """
    sampling, identity = _sampling(asked, task, config), answer_identity(asked.model)
    answers: dict[tuple[str, int], Answer] = {}
    generated = 0
    for second in (False, True):
        wanted = []
        for item, index in product([item for item in task.items if bool(item.after) is second], range(config.samples)):
            first = answers[item.after, index] if second else None
            if first is not None and first.error:
                wanted.append(_Wanted(item, index, error="no_first_answer"))
                continue
            wanted.append(_prepare(asked, filled(item, first.text) if first else item, index, sampling, identity))
        generated += _generate(asked, wanted, sampling, identity, store, task.name, engine)
        answers.update(_collect(wanted, store))
    return [[answers[item.id, index] for index in range(config.samples)] for item in task.items], generated


def _collect(wanted: Sequence[_Wanted], store: SampleStore) -> dict[tuple[str, int], Answer]:
    keys = [each.key for each in wanted]
    stored = {row["key"]: row for row in store.frame().filter(pl.col("key").is_in(keys)).iter_rows(named=True)} if keys else {}
    failed = dict(store.failures().select("key", "error").iter_rows())
    answers = {}
    for each in wanted:
        row = stored.get(each.key)
        if row is None:
            answer = Answer(key=each.key, error=each.error or failed.get(each.key, "the engine gave no answer"))
        else:
            answer = Answer(key=each.key, **{name: row[name] for name in ("text", "finish_reason", "num_tokens", "logprob")})
        answers[each.item.id, each.index] = answer
    return answers


def choose_likeliest(asked: Asked, task: Task, store: ValueStore, engine: Callable[[], Engine]) -> tuple[list[list[Answer]], int]:
    """Return for each item the choice that the model finds the most probable, and how many requests that took now.

    The question is given as a text to go on from, for every model. Servers tell no probabilities: see `ways`.
    """
    wanted = _choices(asked.model, task.items)
    errors: dict[str, str] = {}
    asks = {request.key: request for each in wanted for request in each.requests if request.key not in store}
    if asks:
        singles = [each for each in asks.values() if isinstance(each, ChoiceRequest)]
        texts = [each for each in asks.values() if isinstance(each, ScoreRequest)]
        with Progress(f"{task.name}: score {asked.name}", total=len(asks), unit="requests") as progress:
            for scored in chain(choice_logprobs(engine(), singles) if singles else (), engine().logprobs(texts) if texts else ()):
                if scored.error:
                    errors[scored.key] = scored.error
                else:
                    store.put(scored.key, scored.logprobs)
                progress.advance()
    answers = []
    for item, each in zip(task.items, wanted, strict=True):
        error = each.error or next((errors[request.key] for request in each.requests if request.key in errors), None)
        if error:
            answers.append([Answer(error=error)])
            continue
        found = [store[request.key] for request in each.requests]
        sums = found[0].tolist() if len(found) == 1 else [float(values.sum()) for values in found]
        best = max(range(len(sums)), key=sums.__getitem__)
        answers.append([Answer(key=each.requests[0].key, text=item.choices[best], finish_reason="stop", logprob=sums[best])])
    return answers, len(asks) - len(errors)


@dataclass(frozen=True, slots=True)
class _Choices:
    """What has to be asked for the choices of an item: one request where each is one token, else one for each."""

    requests: tuple[ChoiceRequest | ScoreRequest, ...] = ()
    error: str | None = None


def _choices(model: NamedModel, items: Sequence[Item]) -> list[_Choices]:
    """Return what to ask for each item. Long prompts cost a millisecond for each text, so that many are cut into tokens at once."""
    assert model.chat is not None
    tokenizer, identity = model.chat.tokenizer, answer_identity(model)
    found = []
    for first in range(0, len(items), TOGETHER):
        part = items[first : first + TOGETHER]
        ids = iter(tokenizer([item.completion + choice for item in part for choice in ("", *item.choices)])["input_ids"])
        for item in part:
            before, *continued = [tuple(next(ids)) for _ in ("", *item.choices)]
            found.append(_requests(before, continued, identity, model.context))
    return found


def _requests(before: tuple[int, ...], continued: Sequence[tuple[int, ...]], identity: str, context: int | None) -> _Choices:
    if context is not None and max(map(len, continued)) > context:
        return _Choices(error="too_long")
    if all(each[:-1] == before for each in continued):
        tokens = tuple(each[-1] for each in continued)
        return _Choices((ChoiceRequest(key=value_key("choices", identity, before, tokens), ids=before, choices=tokens),))
    # where the question's last token swallows what follows, it is scored too
    starts = [len(before) if each[: len(before)] == before else len(before) - 1 for each in continued]
    requests = [
        ScoreRequest(key=value_key("choice", identity, each, start), ids=each, start=start)
        for each, start in zip(continued, starts, strict=True)
    ]
    return _Choices(tuple(requests))


def _sampling(asked: Asked, task: Task, config: TasksConfig) -> Sampling:
    longest, stop = config.max_new_tokens or task.max_new_tokens, () if asked.chat else task.stops
    if config.samples == 1:
        return Sampling(temperature=0.0, top_p=1.0, max_new_tokens=longest, seed=0, stop=stop)
    return Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=longest, seed=config.seed, stop=stop)


def _prepare(asked: Asked, item: Item, index: int, sampling: Sampling, identity: str) -> _Wanted:
    model = asked.model
    ids: tuple[int, ...] = ()
    if model.chat is not None:
        try:
            ids = tuple(
                model.chat.prompt(item.messages, tools=item.tools) if asked.chat else model.chat.tokenizer(item.completion)["input_ids"]
            )
        except UserError as error:
            log.warning("%s: %s", item.id, error)
            return _Wanted(item, index, error="refused_by_template")
        if model.context is not None and len(ids) + sampling.max_new_tokens > model.context:
            return _Wanted(item, index, error="too_long")
    key = sample_key(prompt=ids or sent(item.messages, item.tools), model_identity=identity, sampling=sampling, index=index)
    return _Wanted(item, index, key, ids, tuple(item.messages), item.tools)


def _generate(
    asked: Asked,
    wanted: Sequence[_Wanted],
    sampling: Sampling,
    identity: str,
    store: SampleStore,
    label: str,
    engine: Callable[[], Engine],
) -> int:
    model = asked.model
    stored = store.keys()
    missing = {each.key: each for each in wanted if not each.error and each.key not in stored}
    if not missing:
        return 0
    settings: dict[str, Any] = {**decisive_settings(identity, sampling)}
    sampling_key = store.remember(model.reference, settings)

    def requests() -> Iterator[Request]:
        for key, each in list(missing.items()):
            yield Request(
                key=key, prompt_ids=each.ids, messages=list(each.messages), tools=each.tools, sampling=sampling, seed=sample_seed(key)
            )

    places = {key: (each.item.id, each.index) for key, each in missing.items()}
    told = f"{label}: ask {asked.name}"
    return answer_into(store, engine(), requests(), places, label=told, model=model.reference, sampling_key=sampling_key)
