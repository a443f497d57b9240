"""Hand tasks over to lm-eval, which has hundreds: in a process of its own, with the model's own template, and compared here in pairs."""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.engines.loading import choose
from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.hardware import pick_device
from ..core.models import resolve_model
from ..core.values import value_key
from .ask import Asked, compared
from .config import TasksConfig
from .marks import Marks, TaskResult, compare_marks, measure
from .tasks.base import Mark

log = logging.getLogger(__name__)

PREFIX = "lm-eval:"
MARK = "sftkit-found:"
CODE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
asked = json.loads(sys.stdin.read())
manager = TaskManager(include_path=asked["include"])
found = lm_eval.simple_evaluate(model=asked["model"], model_args=asked["arguments"], tasks=[asked["task"]], limit=asked["limit"],
    apply_chat_template=asked["chat"], batch_size=asked["batch_size"], task_manager=manager, bootstrap_iters=0, log_samples=True)
rows = []
for task, samples in found["samples"].items():
    for each in samples:
        kept = {name: each.get(name) for name in each["metrics"]}
        numbers = {name: float(value) for name, value in kept.items() if isinstance(value, (bool, int, float))}
        rows.append([task, each["doc_id"], each.get("filter", "none"), numbers])
print(asked["mark"] + json.dumps(rows))
"""


def hand_over(name: str, asked: Sequence[Asked], folder: Path, config: TasksConfig, tests: int) -> TaskResult:
    """Run the task NAME of lm-eval on every model; return what came out. Results are kept by model, task and version in `folder`.

    `tests` is how many comparisons all tasks make together. Raises UserError for a server, and where lm-eval fails, with its last words.
    """
    rows: dict[str, list[list[Any]]] = {}
    new: dict[str, int] = {}
    for way in asked:
        rows[way.name], new[way.name] = _run(name, way, folder, config)
    marks = {way: _marks(each) for way, each in rows.items()}
    items = list(next(iter(marks.values())))
    for label, each in marks.items():
        if list(each) != items:
            raise UserError(f"lm-eval:{name}: gave {label} other questions than {asked[0].name}; it cannot be compared")
    ordered = {label: [each[item] for item in items] for label, each in marks.items()}
    every = [each[0] for several in ordered.values() for each in several]
    metrics = [metric for metric in (every[0] if every else ()) if all(metric in each for each in every)]
    if not metrics:
        raise UserError(f"lm-eval:{name}: gave no number that every question has; give a task that does, or those of a group one by one")
    groups = [item[0] for item in items] if len({item[0] for item in items}) > 1 else [None] * len(items)  # the tasks of a group
    drawn = {"resamples": config.resamples, "seed": config.seed}
    return TaskResult(
        name=PREFIX + name,
        n=len(items),
        left_out={},
        asked={way.name: way.told for way in asked},
        unasked={},
        metrics={label: [measure(each, metric, groups, drawn) for metric in metrics] for label, each in ordered.items()},
        health=dict.fromkeys(ordered),
        comparisons=compare_marks(PREFIX + name, metrics[0], ordered, compared(asked), groups, drawn, tests=tests),
        generated=new,
        contaminated=None,
    )


def _marks(rows: Sequence[Sequence[Any]]) -> dict[tuple[str, int], Marks]:
    """Return the marks of each question, by its task and number; a metric is named with its filter where there are several."""
    filters = {kept for _, _, kept, _ in rows}
    found: dict[tuple[str, int], dict[str, Mark]] = {}
    for task, number, kept, numbers in rows:
        named = {f"{metric},{kept}" if len(filters) > 1 else metric: Mark(value) for metric, value in numbers.items()}
        found.setdefault((task, number), {}).update(named)
    return {item: [marks] for item, marks in sorted(found.items())}


def _own_tasks(folder: str | None) -> dict[str, str]:
    """Return what decides the user's own tasks, by file: their definitions and code. What they load from elsewhere is not seen."""
    if folder is None:
        return {}
    files = sorted(each for each in Path(folder).rglob("*") if each.suffix in (".yaml", ".yml", ".py") and each.is_file())
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def _run(name: str, way: Asked, folder: Path, config: TasksConfig) -> tuple[list[list[Any]], int]:
    engine = choose(way.model.engine)
    if engine == "openai":
        raise UserError(f"lm-eval:{name}: lm-eval is given no server here; give a model on disk")
    version = importlib.metadata.version("lm-eval")
    ref = resolve_model(way.model.reference)
    place, arguments = ref.pretrained()
    dtype = way.model.engine.dtype
    arguments = {"pretrained": place, **arguments, "dtype": dtype}
    if engine != "vllm":
        arguments["device"] = pick_device(way.model.engine.device)
    told: Mapping[str, Any] = {
        "model": "vllm" if engine == "vllm" else "hf",
        "arguments": arguments,
        "task": name,
        "limit": config.limit,
        "chat": way.chat,
        "include": None if config.lm_eval_tasks is None else str(Path(config.lm_eval_tasks).absolute()),
        "batch_size": "auto" if engine == "vllm" else 8,
        "mark": MARK,
    }
    own = _own_tasks(config.lm_eval_tasks)
    key = value_key("lm-eval", version, way.model.identity, way.model.template, engine, dtype, name, config.limit, way.chat, own)
    kept = folder / "lm_eval" / f"{key[:32]}.json"
    if kept.exists():
        return read_json(kept), 0
    log.info("lm-eval %s: %s on %s", version, name, way.name)
    # a folder called evaluate beside the working directory would be taken for the library of that name
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", CODE], input=json.dumps(told), capture_output=True, text=True, env=environment, cwd=folder)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:] or ["no word"]
        raise UserError(f"lm-eval:{name}: lm-eval failed on {way.name}: {last[0].strip()[:300]}")
    rows: list[list[Any]] = json.loads(found[-1].removeprefix(MARK))
    write_json(kept, rows)
    return rows, len(rows)
