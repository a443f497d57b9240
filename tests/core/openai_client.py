"""An engine for a test's server, and what is asked through it."""

import threading
from typing import Any

from openai_server import Server
from sftkit.core.engines.base import Completion, EngineConfig, Request, Sampling
from sftkit.core.engines.openai_engine import OpenAIEngine
from sftkit.core.engines.registry import open_engine

SECRET = "sk-very-secret"


def engine(server: Server, concurrency: int = 4, model: str = "m") -> OpenAIEngine:
    return open_engine(model, EngineConfig(base_url=server.url, concurrency=concurrency))  # type: ignore[return-value]


def request(key: str, **sampling: Any) -> Request:
    wanted = Sampling(**{"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 20, **sampling})
    return Request(key=key, prompt_ids=(), messages=[{"role": "user", "content": key}], sampling=wanted, seed=2**40 + 7)


def answers(engine: OpenAIEngine, keys: list[str]) -> dict[str, Completion]:
    return {each.key: each for each in engine.generate(request(key) for key in keys)}


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "sftkit-openai"]
