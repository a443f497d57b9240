"""A model that is asked many short questions: what it writes, or how probable it finds some answers, each kept in a ValueStore."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .engines.base import ChoiceRequest, Engine, Request, Sampling, choice_logprobs
from .engines.loading import choose
from .errors import UserError
from .example import Message
from .named_models import NamedModel
from .progress import Progress
from .values import ValueStore, value_key

WRITTEN_TOKENS = 512  # of an answer at most: room for a model that thinks before


class Asked:
    """One model that is asked. Use as a context manager: it is loaded when it is needed, and stays until the block ends."""

    def __init__(self, model: NamedModel, store: ValueStore, *, work: str = "ask") -> None:
        """`work` is what progress calls it."""
        self.model, self._store, self._work = model, store, work
        self._opened = ExitStack()
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine = None
        self._opened.close()

    def _running(self) -> Engine:
        if self._engine is None:
            self._engine = self._opened.enter_context(self.model.running())
        return self._engine

    def probabilities(self, asked: Sequence[list[Message]], labels: Sequence[str]) -> Iterator[NDArray[np.float64] | str]:
        """Yield for each conversation the probability of each label as the beginning of the answer, or why there is none.

        Raises UserError for a tokenizer that does not tell the labels apart by one token.
        """
        if not asked:
            return
        chat = self.model.chat
        assert chat is not None
        begin, choices = self._spelled(labels)
        settings = [self.model.identity, choose(self.model.engine), self.model.engine.dtype, choices]
        keys: list[str | None] = []
        errors: dict[int, str] = {}
        missing: dict[str, ChoiceRequest] = {}
        for number, messages in enumerate(asked):
            try:
                ids = (*chat.prompt(messages), *begin)
            except UserError as error:
                errors[number] = str(error)
                keys.append(None)
                continue
            key = value_key("choices", settings, list(ids))
            keys.append(key)
            if key not in self._store:
                missing[key] = ChoiceRequest(key=key, ids=ids, choices=choices)
        failed: dict[str, str] = {}
        if missing:
            with self._progress(len(missing)) as progress:
                for told in choice_logprobs(self._running(), sorted(missing.values(), key=lambda each: -len(each.ids))):
                    if told.error:
                        failed[told.key] = told.error
                    else:
                        self._store.put(told.key, told.logprobs)
                    progress.advance(tokens=len(missing[told.key].ids))
        for number, stored in enumerate(keys):
            if stored is None or stored not in self._store:
                yield errors[number] if stored is None else failed.get(stored, "the engine gave no probabilities")
                continue
            yield np.exp(self._store[stored].astype(np.float64))

    def _progress(self, total: int) -> Progress:
        return Progress(f"{self._work} with {self.model.name}", total=total, unit="answers")

    def _spelled(self, labels: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens that every label begins with after the prompt, and the token of each that follows them."""
        chat = self.model.chat
        assert chat is not None
        spelled = []
        for label in labels:
            rendered = chat.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": label}])
            spelled.append([token for token, masked in zip(rendered.ids, rendered.mask, strict=True) if masked])
        shared = 0
        while len({each[shared] for each in spelled}) == 1:
            shared += 1
        choices = tuple(each[shared] for each in spelled)
        if len(set(choices)) < len(labels):
            raise UserError(
                f"{self.model.name}: its tokenizer does not tell {', '.join(labels)} apart by one token; let it write instead (parse)"
            )
        return tuple(spelled[0][:shared]), choices

    def written(self, asked: Sequence[list[Message]]) -> Iterator[tuple[str | None, str]]:
        """Yield what the model writes to each conversation, greedily; None and the reason where there is nothing."""
        keys, missing, errors = [], {}, {}
        for messages in asked:
            ids: tuple[int, ...] = ()
            key = value_key("written", self.model.identity, self.model.template, messages, WRITTEN_TOKENS)
            keys.append(key)
            if key in self._store:
                continue
            if self.model.chat is not None:
                try:
                    ids = tuple(self.model.chat.prompt(messages))
                except UserError as error:
                    errors[key] = str(error)
                    continue
            context = self.model.context or 4 * WRITTEN_TOKENS  # where a server renders, the prompt's length is not known
            room = max(1, min(WRITTEN_TOKENS, context - len(ids) if ids else context // 4))
            sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=room, seed=0)
            missing[key] = Request(key=key, prompt_ids=ids, messages=messages, sampling=sampling, seed=0, logprob=False)
        if missing:
            with self._progress(len(missing)) as progress:
                for told in self._running().generate(iter(missing.values())):
                    if told.finish_reason == "error":
                        errors[told.key] = told.error or "the engine gave no reason"
                    else:
                        self._store.put(told.key, [], told.text)
                    progress.advance(tokens=told.num_tokens)
        for key in keys:
            yield (None, errors.get(key, "the engine gave no answer")) if key not in self._store else (self._store.entry(key)[1], "")
