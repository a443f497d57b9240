"""The engines by name, opened here or in processes of their own. A new engine is a new file with `open` in it, and one line here."""

from dataclasses import replace
from typing import Any

from ..errors import UserError, unknown_name
from ..hardware import visible_gpus
from .base import EmbeddingEngine, Engine, EngineConfig
from .loading import choose, start
from .ray_replicas import open_ray_replicas
from .replicas import open_replicas

LOADERS = {
    "transformers": "transformers_engine",
    "vllm": "vllm_engine",
    "openai": "openai_engine",
}


def open_engine(model: str, config: EngineConfig, *, revision: str | None = None) -> Engine:
    """Open a model in the engine that the config names. Raises UserError for an engine that is unknown or not installed.

    With `replicas` it runs in processes of its own: see `core.engines.replicas`. So does vLLM on a card that `device` names.
    """
    name = choose(config)
    if name not in LOADERS:
        raise unknown_name("engine", name, LOADERS)
    if name == "openai" and (config.replicas is not None or config.executor == "ray"):
        raise UserError("replicas: a server runs its own; give the address of each as base_url, parted by commas")
    if name == "vllm" and config.device == "cpu" and visible_gpus():
        raise UserError("device cpu: vLLM runs on this machine's GPU; take the engine transformers, or leave device out")
    if name == "vllm" and config.replicas is None and (config.device or "").startswith("cuda:"):
        config = replace(config, replicas=1)  # it takes the first card that its process sees
    engine: Engine = _opened(LOADERS[name], model, config, revision=revision)
    return engine


def open_embedder(model: str, config: EngineConfig) -> EmbeddingEngine:
    """Open an embedding model, here or in the processes that the config asks for. Raises UserError for what is none."""
    engine: EmbeddingEngine = _opened("embedder", model, config, talks=False)
    return engine


def _opened(name: str, model: str, config: EngineConfig, *, revision: str | None = None, talks: bool = True) -> Any:
    module = f"{__package__}.{name}"
    if config.executor == "ray":
        return open_ray_replicas(module, model, config, revision=revision, talks=talks)
    if config.replicas is not None:
        return open_replicas(module, model, config, revision=revision, talks=talks)
    return start(module, model, config, revision=revision)
