"""Chats to train on, written as a data file."""

import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Chats = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def frozen() -> Iterator[None]:
    """Take what is imported out of the garbage collector's walks: a training asks for two, of half a second each."""
    import sftkit.train.sft
    import sftkit.train.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def chats(tmp_path: Path) -> Chats:
    """Write `count` short question-and-answer rows, then the rows given, as JSONL."""

    def write(count: int = 0, *rows: list[dict[str, Any]], name: str = "chats.jsonl") -> Path:
        made = [
            [
                {"role": "user", "content": f"Calculate {n}+{n}. " + "Please explain. " * (n % 5)},
                {"role": "assistant", "content": f"The answer is {2 * n}." + " It is even." * (n % 3)},
            ]
            for n in range(count)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*made, *rows]))
        return path

    return write


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Be the only one of some processes."""
    from sftkit.train import collective

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    former = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in former.items():  # one of several leaves them to its parent
        signal.signal(number, handler)
    torch.distributed.destroy_process_group()
    collective._processors.cache_clear()
