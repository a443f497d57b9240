"""HumanEval: functions to write, run against their tests in a sandbox (Chen et al. 2021, arXiv 2107.03374)."""

from ...core.checks.code import extract_program, run_tests
from ..config import TasksConfig
from ..task_data import read_data
from .base import Item, Mark, Score, Task, asked

ASKING = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"
# where a completion has gone on to something else than the function's body
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint(", "\n```")


def load(config: TasksConfig) -> Task:
    """Return the task: whether the function passes its tests."""
    items = [
        Item(
            str(row["task_id"]),
            asked(ASKING.format(row["prompt"])),
            row["prompt"],
            {**{name: row[name] for name in ("prompt", "test", "entry_point")}, "bare": row["prompt"]},
        )
        for row in read_data("humaneval")
    ]
    return Task(name="humaneval", items=items, metrics=("passed",), score=scorer(config), stops=STOPS, code=True)


def scorer(config: TasksConfig) -> Score:
    """Return the scorer, which runs programs."""

    def score(item: Item, answer: str) -> dict[str, Mark]:
        program = extract_program(answer, prompt=item.target["prompt"], entry_point=item.target["entry_point"])
        verdict = run_tests(program, item.target["test"], entry_point=item.target["entry_point"], unsafe=config.unsafe)
        found = verdict.ended not in ("no_code", "syntax")
        return {"passed": Mark(float(verdict.passed), found, told(verdict.ended, verdict.message, verdict.attempts), False)}

    return score


def told(ended: str, message: str, attempts: tuple[str, ...]) -> str:
    """Write how a program ended, with what it tried."""
    return "; ".join([each for each in (ended, message) if each] + [f"tried {each}" for each in attempts])
