"""The engines by name, and how `auto` chooses. A new engine is a new file with `open` in it, and one line here."""

import importlib
import importlib.util
import logging
from dataclasses import replace
from typing import Any

from ..errors import UserError, unknown_name
from ..hardware import visible_gpus
from .base import EmbeddingEngine, Engine, EngineConfig

log = logging.getLogger(__name__)

LESS = 0.85  # of the memory that an engine could not start with
OUT_OF_MEMORY = ("out of memory", "free memory")
NO_REASON = "engine core initialization failed"  # vLLM's, whose process gives its reason in its messages alone

LOADERS = {
    "transformers": "transformers_engine",
    "vllm": "vllm_engine",
    "openai": "openai_engine",
}


def choose(config: EngineConfig) -> str:
    """Return the engine that a config means: auto is openai with a base_url, vllm where it and a GPU are, else transformers."""
    if config.engine != "auto":
        return config.engine
    if config.base_url:
        return "openai"
    if importlib.util.find_spec("vllm") is not None:
        import torch

        if torch.cuda.is_available():
            return "vllm"
    return "transformers"


def open_engine(model: str, config: EngineConfig, *, revision: str | None = None) -> Engine:
    """Open a model in the engine that the config names. Raises UserError for an engine that is unknown or not installed.

    With `replicas` it runs in processes of its own: see `core.engines.replicas`.
    """
    name = choose(config)
    if name not in LOADERS:
        raise unknown_name("engine", name, LOADERS)
    if name == "openai" and (config.replicas is not None or config.executor == "ray"):
        raise UserError("replicas: a server runs its own; give the address of each as base_url, parted by commas")
    engine: Engine = _opened(LOADERS[name], model, config, revision=revision)
    return engine


def open_embedder(model: str, config: EngineConfig) -> EmbeddingEngine:
    """Open an embedding model, here or in the processes that the config asks for. Raises UserError for what is none."""
    engine: EmbeddingEngine = _opened("embedder", model, config, talks=False)
    return engine


def _opened(name: str, model: str, config: EngineConfig, *, revision: str | None = None, talks: bool = True) -> Any:
    module = f"{__package__}.{name}"
    if config.executor == "ray":
        from .ray_replicas import open_ray_replicas

        return open_ray_replicas(module, model, config, revision=revision, talks=talks)
    if config.replicas is not None:
        from .replicas import open_replicas

        return open_replicas(module, model, config, revision=revision, talks=talks)
    return start(module, model, config, revision=revision)


def start(module: str, model: str, config: EngineConfig, *, revision: str | None = None) -> Engine:
    """Open a model with an engine's module. One that runs out of the card's memory at its start is tried once more with less of it."""
    opener = importlib.import_module(module)
    engine: Engine
    try:
        engine = opener.open(model, config, revision=revision)
    except UserError as error:
        if not _lacked_memory(error):
            raise
        less = replace(config, gpu_memory_utilization=round(LESS * config.gpu_memory_utilization, 2))
        log.warning(
            "%s; memory may be the reason: trying once more, with %.2f of the card's instead of %.2f (gpu_memory_utilization)",
            error, less.gpu_memory_utilization, config.gpu_memory_utilization,
        )  # fmt: skip
    else:
        return engine
    engine = opener.open(model, less, revision=revision)
    return engine


def _lacked_memory(error: UserError) -> bool:
    """Say whether an engine may have stopped at its start for want of the card's memory."""
    cause = error.__cause__
    while cause is not None:
        text = str(cause).lower()
        if any(each in text for each in OUT_OF_MEMORY) or (NO_REASON in text and visible_gpus()):
            return True
        cause = cause.__cause__
    return False
