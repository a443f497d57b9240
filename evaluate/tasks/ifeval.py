"""IFEval: prompts with instructions that rules can check (Zhou et al. 2023, arXiv 2311.07911)."""

from ...core.checks.instructions import check_instructions
from ..config import TasksConfig
from ..task_data import read_data
from .base import Item, Mark, Task, asked


def load(config: TasksConfig) -> Task:
    """Return the task: whether all of a prompt's instructions are followed, and the share of them that are; strict and loose."""
    items = [
        Item(
            f"ifeval/{row['key']}",
            asked(row["prompt"]),
            f"Question: {row['prompt']}\nAnswer:",
            {"names": row["instruction_id_list"], "arguments": row["kwargs"]},
        )
        for row in read_data("ifeval")
    ]
    metrics = ("strict", "loose", "strict_instructions", "loose_instructions")
    return Task(name="ifeval", items=items, metrics=metrics, score=score, max_new_tokens=1024)


def score(item: Item, answer: str) -> dict[str, Mark]:
    """Check each instruction by its rule."""
    followed = check_instructions(answer, item.target["names"], item.target["arguments"])
    ways = {"strict": followed.strict, "loose": followed.loose}
    whole = {name: Mark(float(all(each))) for name, each in ways.items()}
    return {**whole, **{f"{name}_instructions": Mark(sum(each) / len(each)) for name, each in ways.items()}}
