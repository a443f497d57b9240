"""Models that are looked up first, all of them, and loaded one after the other only if there is something to compute."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from .chat import Chat, load_chat
from .engines.base import Engine, EngineConfig
from .engines.loading import choose, settle
from .engines.registry import open_engine
from .errors import UserError
from .models import ModelRef, context_length, final_facts, load_settings, model_identity, quantisation, resolve_model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model of which everything is known but the weights are not loaded, until it is `running`."""

    name: str  # what the results call it
    reference: str  # as the user wrote it
    identity: str
    chat: Chat | None  # None where a server renders
    template: str | None  # fingerprint of all that decides how it is asked and where it stops
    context: int | None
    engine: EngineConfig

    @contextmanager
    def running(self) -> Iterator[Engine]:
        """Open the model in its engine; give the memory back at the end of the block."""
        with closing(open_engine(self.reference, self.engine)) as engine:
            if engine.identity != self.identity:
                raise UserError(f"{self.reference}: its weights changed while it was being loaded; run the same command again")
            yield engine

    def facts(self) -> dict[str, str | None]:
        """Return what tells this model from others, for the results."""
        return {"reference": self.reference, "identity": self.identity, "template": self.template}


def find_models(models: Mapping[str, str], engine: EngineConfig, *, answers: tuple[int, int] | None = None) -> list[NamedModel]:
    """Look all models up, in order. `answers`, how many of a model and of how many tokens at most, settle the engine (`loading.settle`).

    It is one engine for all of them: models that are compared are not to differ by what runs them.

    Raises UserError for one that is not there, and for one that training gave a chat template, a stop or a pad token
    that its files no longer have: its answers would not be those of the model that was trained.
    """
    if not models:
        raise UserError("no model was given: expected at least one, as {'base': MODEL}")
    if choose(engine) == "openai":
        found = [_serve(name, reference, engine) for name, reference in models.items()]
    else:
        refs = {name: resolve_model(reference) for name, reference in models.items()}
        settings = {name: load_settings(ref) for name, ref in refs.items()}
        if answers is not None:
            engine = settle(engine, *answers, quantised=any(quantisation(ref, settings[name]) is not None for name, ref in refs.items()))
        found = [_find(name, models[name], ref, settings[name], engine) for name, ref in refs.items()]
    first: dict[tuple[str, str | None], str] = {}
    for model in found:
        same = first.setdefault((model.identity, model.template), model.name)
        if same != model.name:
            log.warning("%s and %s are the same model: the same weights, the same template", same, model.name)
    return found


def _serve(name: str, reference: str, engine: EngineConfig) -> NamedModel:
    with closing(open_engine(reference, engine)) as server:
        return NamedModel(name, reference, server.identity, server.chat, None, server.context_length, engine)


def _find(name: str, reference: str, ref: ModelRef, settings: Any, engine: EngineConfig) -> NamedModel:
    chat = load_chat(ref)
    template = chat.fingerprint()
    _check_template(name, ref, template)
    lengths = [context_length(settings), engine.max_model_len]
    context = min((each for each in lengths if each), default=None)
    return NamedModel(name, reference, model_identity(ref), chat, template, context, engine)


def _check_template(name: str, ref: ModelRef, template: str) -> None:
    trained = final_facts(ref).get("template")
    if trained is not None and trained != template:
        raise UserError(
            f"{name}={ref.name}: its chat template, stop or pad tokens are not those that it was trained with (fingerprint {template},"
            f" trained with {trained}); put the tokenizer and config files back that training wrote to {ref.path}, or train it again"
        )
