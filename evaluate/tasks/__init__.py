"""Tasks with answers that rules can mark, or a judge, by name. A new one is a new file with `load` in it, and one line here."""

import importlib
from pathlib import Path

from ...core.errors import unknown_name
from ..config import TasksConfig
from .base import Task

TASKS = {  # name: (file, function)
    "gsm8k": ("gsm8k", "load"),
    "ifeval": ("ifeval", "load"),
    "humaneval": ("humaneval", "load"),
    "mmlu": ("mmlu", "load"),
    "mmlu_generated": ("mmlu", "load_generated"),
    "mt_bench": ("mt_bench", "load"),
}


def open_task(name: str, config: TasksConfig) -> Task:
    """Return a task by its name, or of a user's file. Raises UserError for what is neither."""
    if name in TASKS:
        file, function = TASKS[name]
        task: Task = getattr(importlib.import_module(f".{file}", __package__), function)(config)
        return task
    if Path(name).expanduser().exists() or "/" in name or "." in name:
        from .rows import load

        return load(name, config)
    raise unknown_name("task", name, TASKS, also="a data file, or lm-eval:NAME")
