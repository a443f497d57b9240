"""What a model in training and a trained one write: the same prompts answered at each evaluation, and whether the final answers end."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from ..core.chat import Chat
from ..core.engines.base import Completion, Engine, EngineConfig, Request, Sampling
from ..core.engines.registry import open_engine
from ..core.engines.transformers_engine import TransformersEngine
from ..core.files import read_json_lines, write_json_lines
from .data import Row, TrainingData
from .trainer import undress

log = logging.getLogger(__name__)

PROMPTS = 32  # that are answered
LENGTHS, CPU_LENGTHS = (256, 1024), (64, 256)  # the most tokens: the second where no answer of the data is shorter
ROOM = 0.75  # an answer of the data that is longer than this share of the limit says nothing about stopping within it
LEAST_STOPS = 0.95
SAMPLE_TOKENS = 128
BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class StopCheck:
    """How many answers of the final model ended by themselves."""

    prompts: int
    stopped: int
    max_new_tokens: int
    held_out: bool  # prompts of the validation rows, not of the training rows

    @property
    def rate(self) -> float:
        """Return the share of the answers that ended."""
        return self.stopped / self.prompts

    def text(self) -> str:
        """Say it for people."""
        whose = "held-out" if self.held_out else "training"
        return f"{self.stopped} of {self.prompts} answers to {whose} prompts ended within {self.max_new_tokens} tokens ({self.rate:.0%})"


def check_stops(model: Path, data: TrainingData, wanted: int | None, device: str, *, worse: bool = False) -> StopCheck | None:
    """Answer prompts greedily with a saved model and count the answers that end; None where nothing was or could be checked.

    Prompts come from the validation rows, else from the training rows. Only such are asked whose own answer is well within the limit.
    A model that is `worse` on the validation rows than before is not said to need more of the same.
    """
    small = device == "cpu" and wanted is None
    count = PROMPTS if wanted is None else wanted
    if not count:
        return None
    rows, limit = [], 0
    source = data.validation or data.train
    for limit in CPU_LENGTHS if small else LENGTHS:
        rows = _distinct([row for row in source if len(row) - row.answer_start <= ROOM * limit], count)
        if rows:
            break
    if not rows:
        more = f"; stop_check: {count} allows {LENGTHS[-1]:,}" if small else ""
        log.info("the stop rate is not checked: no answer of the data is shorter than %s tokens%s", f"{ROOM * limit:,.0f}", more)
        return None
    if not data.validation:
        log.info("no validation rows: the stop rate is measured on training prompts")
    engine = open_engine(str(model), EngineConfig(engine="transformers", device=device))
    try:
        answers = [each for each in _answers(engine, rows, limit) if each.finish_reason != "error"]
    finally:
        engine.close()
    if not answers:
        log.warning("the stop rate is not known: none of %d prompts could be answered", len(rows))
        return None
    stopped = sum(each.finish_reason == "stop" for each in answers)
    found = StopCheck(prompts=len(answers), stopped=stopped, max_new_tokens=limit, held_out=bool(data.validation))
    if found.rate < LEAST_STOPS:
        cure = "" if worse else ": train longer or with a higher learning rate, or on rows whose answers are whole"
        log.warning("%s; a model that has learned to stop does so in %.0f %%%s", found.text(), 100 * LEAST_STOPS, cure)
    else:
        log.info("%s", found.text())
    return found


def _distinct(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first rows with prompts of their own."""
    found = {row.prompt(): row for row in reversed(rows) if row.answer_start}
    return list(reversed(found.values()))[:count]


def _answers(engine: Engine, rows: Sequence[Row], limit: int) -> Iterator[Completion]:
    """Answer rows greedily, each under its place as the key."""
    greedy = Sampling(temperature=0, max_new_tokens=limit)
    return engine.generate(
        Request(key=str(place), prompt_ids=tuple(row.ids[: row.answer_start]), messages=[], sampling=greedy, seed=0)
        for place, row in enumerate(rows)
    )


class Sampler(TrainerCallback):  # type: ignore[misc]
    """Answers the same prompts at each evaluation, greedily, and writes them down; the training itself does not feel it."""

    def __init__(self, place: Path, chat: Chat, rows: Sequence[Row], count: int) -> None:
        self.place, self.chat = place, chat
        self.rows = _distinct(rows, count)
        self._written: set[int] = set()  # steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep of the file what stands before the step that is gone on from."""
        kept = [line for line in read_json_lines(self.place) if line["step"] <= state.global_step and state.global_step > 0]
        self._written = {line["step"] for line in kept}
        if state.is_world_process_zero:
            write_json_lines(self.place, kept)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Answer the prompts."""
        sharded = isinstance(model, FSDPModule)  # then each process has a part in every answer
        if state.global_step in self._written or not (state.is_world_process_zero or sharded):
            return
        self._written.add(state.global_step)
        with as_loaded(model) as plain, torch.autocast(args.device.type, torch.bfloat16, enabled=sharded and args.bf16):
            engine = TransformersEngine(plain, self.chat, identity="", batch_tokens=BATCH_TOKENS, together=sharded)
            answers = sorted(_answers(engine, self.rows, SAMPLE_TOKENS), key=lambda each: int(each.key))
        if not state.is_world_process_zero:
            return
        with open(self.place, "a", encoding="utf-8", errors="backslashreplace") as file:  # a file's name need not be UTF-8
            for row, answer in zip(self.rows, answers, strict=True):
                facts = {"step": state.global_step, "source": row.source, "prompt": self.chat.decode(row.ids[: row.answer_start])}
                told = {"answer": answer.text, "finish_reason": answer.finish_reason, "error": answer.error}
                written = {**facts, **{key: value for key, value in told.items() if value is not None}}
                file.write(json.dumps(written, ensure_ascii=False) + "\n")


@contextmanager
def as_loaded(model: Any) -> Iterator[Any]:
    """Give a model in training its own forward and attention back for a while; an adapter stays in it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, put_back = base.training, undress(base)
    base.eval()
    if isinstance(model, FSDPModule):
        model.unshard()  # what stands outside of layers, which an adapter's base does not gather by itself
    try:
        yield base
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
        base.train(training)
        put_back()
