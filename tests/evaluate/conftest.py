"""Models to compare: the tiny chat model, one that was trained a little, and a watch on what is opened and asked."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sftkit.core import named_models as models_module
from sftkit.core.chat import load_chat
from sftkit.core.models import load_model, resolve_model
from sftkit.evaluate.config import TasksConfig

QUESTIONS = ["What is a thread?", "What is a process?", "Write a short poem about the sea", "Calculate 1+1-1"]
ANSWER = "The answer is 1."

open_real_engine = models_module.open_engine


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(**values: Any) -> TasksConfig:
    """Make the settings of tasks for short answers and few resamples, and what else is given."""
    return TasksConfig(**{"max_new_tokens": 16, "resamples": 1000, **values})


def mmlu_rows() -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "subject": subject,
            "question": f"What is {number}?",
            "A": "1",
            "B": "2",
            "C": "3",
            "D": "4",
            "answer": "ABCD"[number % 4],
        }
        for split, count in (("dev", 2), ("test", 4))
        for subject in ("a_subject", "another")
        for number in range(count)
    ]


def retrain(model: Path, folder: Path, rows: list[dict[str, Any]], steps: int) -> Path:
    """Write a copy of a model that took some steps towards the answers of these rows."""
    import torch

    ref = resolve_model(model)
    loaded, chat = load_model(ref, dtype="float32"), load_chat(ref)
    optimizer = torch.optim.Adam(loaded.parameters(), lr=3e-3)
    for step in range(steps):
        rendered = chat.render(rows[step % len(rows)]["messages"])
        ids = torch.tensor([rendered.ids])
        labels = ids.masked_fill(~torch.tensor([rendered.mask]), -100)
        optimizer.zero_grad()
        loaded(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    shutil.copytree(model, folder, dirs_exist_ok=True)
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model after it has learnt to answer every question with ANSWER, and to stop."""
    rows = [conversation(question, ANSWER) for question in QUESTIONS]
    return retrain(tiny_model, tmp_path_factory.mktemp("models") / "trained", rows, 60)


class Watch:
    """Stands between an evaluation and the real engines: what was opened, closed and asked, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.asked = 0
        self.interrupt_after: int | None = None
        monkeypatch.setattr(models_module, "open_engine", self.open)

    def open(self, model: str, *arguments: Any, **keywords: Any) -> Any:
        engine = open_real_engine(model, *arguments, **keywords)
        name = Path(model).name
        self.events.append(f"open {name}")
        really_close = engine.close

        def close() -> None:
            self.events.append(f"close {name}")
            really_close()

        engine.close = close  # type: ignore[method-assign]
        engine.generate = self._counted(engine.generate)  # type: ignore[method-assign]
        engine.logprobs = self._counted(engine.logprobs)  # type: ignore[method-assign]
        return engine

    def _counted(self, run: Callable[[Iterable[Any]], Iterator[Any]]) -> Callable[[Iterable[Any]], Iterator[Any]]:
        def counted(requests: Iterable[Any]) -> Iterator[Any]:
            wanted = list(requests)
            self.asked += len(wanted)
            for number, result in enumerate(run(wanted)):
                if number == self.interrupt_after:
                    raise KeyboardInterrupt
                yield result

        return counted


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)
