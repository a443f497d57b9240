"""MT-bench: open questions of eight kinds, which a judge grades (Zheng et al. 2023, arXiv 2306.05685). The first of each two turns."""

from ..config import TasksConfig
from ..task_data import read_data
from .base import JUDGED, Item, Task, asked, only_judged


def load(config: TasksConfig) -> Task:
    """Return the task: the grade of each answer, beside the reference where the question has one."""
    items = []
    for row in read_data("mt_bench"):
        question, reference = row["turns"][0], row.get("reference")
        target = {"scoring": JUDGED, **({"answer": reference[0]} if reference else {})}
        items.append(Item(f"mt_bench/{row['question_id']}", asked(question), f"Question: {question}\nAnswer:", target))
    return Task(name="mt_bench", items=items, metrics=("grade",), score=only_judged, max_new_tokens=1024, judged=True)
