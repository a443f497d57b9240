"""Toy teachers and prompts for distillations, and what a run of one holds afterwards."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sftkit.core.engines.base import Completion, Request
from sftkit.core.run import Run
from sftkit.core.store import SampleStore
from sftkit.curate import distill as distill_module

open_real_engine = distill_module.open_engine


def prompts(path: Path, count: int, first: int = 0) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"What is {number} plus {number}?"}) + "\n" for number in range(first, first + count)))
    return path


class Between:
    """Stands between a distillation and the real engine: counts what is asked, and breaks what the test wants broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Request] = []
        self.opened = 0
        self.fails: Callable[[Request], str | None] = lambda request: None
        self.interrupt_after: int | None = None
        monkeypatch.setattr(distill_module, "open_engine", self.open)

    def open(self, *arguments: Any, **keywords: Any) -> "Between":
        self.opened += 1
        self.engine = open_real_engine(*arguments, **keywords)
        self.identity, self.chat, self.context_length = self.engine.identity, self.engine.chat, self.engine.context_length
        return self

    def close(self) -> None:
        self.engine.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        failed: list[Completion] = []

        def seen() -> Iterator[Request]:
            for request in requests:
                self.asked.append(request)
                if error := self.fails(request):
                    failed.append(Completion(key=request.key, finish_reason="error", error=error))
                else:
                    yield request

        for number, completion in enumerate(self.engine.generate(seen())):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield completion
        yield from failed


class Server:
    """An engine that renders for itself, as a server does: it takes messages and has no chat."""

    identity, chat, context_length = "openai:teacher", None, None

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            assert request.prompt_ids == ()
            yield Completion(key=request.key, text=f"{len(request.messages)} {request.seed}", num_tokens=2)

    def close(self) -> None:
        pass


def stored(run: Path) -> pl.DataFrame:
    with SampleStore(run / "curate" / "samples.sqlite") as store:
        return store.frame()


def data_set(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "curate" / "dataset.jsonl").read_text().splitlines()]


def ledger(run: Path, stage: str) -> pl.DataFrame:
    return Run.open(run).ledger.read().filter(pl.col("stage") == stage)


def copy_with_other_weights(model: Path, to: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to
