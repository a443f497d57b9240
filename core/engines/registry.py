"""The engines by name, and how `auto` chooses. A new engine is a new file with `open` in it, and one line here."""

import importlib
import importlib.util

from ..errors import UserError, unknown_name
from .base import Engine, EngineConfig

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
    if config.replicas is not None or config.executor == "ray":
        if name == "openai":
            raise UserError("replicas: a server runs its own; give the address of each as base_url, parted by commas")
        if config.executor == "ray":
            from .ray_replicas import open_ray_replicas

            return open_ray_replicas(f"{__package__}.{LOADERS[name]}", model, config, revision=revision)
        from .replicas import open_replicas

        return open_replicas(f"{__package__}.{LOADERS[name]}", model, config, revision=revision)
    module = importlib.import_module(f".{LOADERS[name]}", __package__)
    engine: Engine = module.open(model, config, revision=revision)
    return engine
