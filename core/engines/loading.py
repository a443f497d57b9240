"""Which engine `auto` is, and how one starts in the process that calls."""

import importlib
import importlib.util
import logging
from dataclasses import fields, replace

from ..errors import UserError
from ..hardware import visible_gpus
from .base import Engine, EngineConfig

log = logging.getLogger(__name__)

LESS = 0.85  # of the memory that an engine could not start with
FEW_ANSWERS, FEW_STEPS = 256, 512  # a step took 0.08 to 0.11 s on an H200 with a slow host, where vLLM's start took 40 to 90 s
OF_VLLM = {  # settings for which it is taken, however little is asked
    *("executor", "replicas", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_gib"),
    *("gpu_memory_utilization", "enforce_eager"),
}
OUT_OF_MEMORY = ("out of memory", "free memory")
NO_REASON = "engine core initialization failed"  # vLLM's, whose process gives its reason in its messages alone


def choose(config: EngineConfig) -> str:
    """Return the engine that a config means: auto is openai with a base_url, vllm where it and a GPU are, else transformers.

    The device cpu leaves the GPU aside, and so vLLM, which would take it.
    """
    if config.engine != "auto":
        return config.engine
    if config.base_url:
        return "openai"
    if config.device != "cpu" and importlib.util.find_spec("vllm") is not None:
        import torch

        if torch.cuda.is_available():
            return "vllm"
    return "transformers"


def settle(config: EngineConfig, answers: int, max_new_tokens: int, *, quantised: bool = False) -> EngineConfig:
    """Return a config whose `auto` is settled for this work: so many answers, each of so many tokens at most.

    vLLM takes a minute and more to start; few short answers, which are one batch of transformers, are there before. vLLM it is all
    the same where a setting of its own is given, or weights are quantised, for which transformers may lack a package.
    """
    few = config.engine == "auto" and answers <= FEW_ANSWERS and max_new_tokens <= FEW_STEPS and not quantised
    name = choose(config)
    means_vllm = any(getattr(config, each.name) != each.default for each in fields(config) if each.name in OF_VLLM)
    return replace(config, engine="transformers" if few and name == "vllm" and not means_vllm else name)


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
