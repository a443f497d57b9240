"""MT-bench: open questions of eight kinds with a second one after each, which a judge grades (Zheng et al. 2023, arXiv 2306.05685)."""

from ..config import TasksConfig
from ..task_data import read_data
from .base import JUDGED, PENDING, Item, Task, asked, only_judged


def load(config: TasksConfig) -> Task:
    """Return the task: the grade of each answer, beside the reference where the question has one. Both turns share a conversation."""
    items = []
    for row in read_data("mt_bench"):
        (first, second), references = row["turns"], row.get("reference") or (None, None)
        name, shown = f"mt_bench/{row['question_id']}", f"Question: {first}\nAnswer:"
        targets = [{"scoring": JUDGED, **({"answer": each} if each else {})} for each in references]
        items.append(Item(f"{name}/1", asked(first), shown, targets[0], name))
        said = [*asked(first), {"role": "assistant", "content": PENDING}, *asked(second)]
        items.append(Item(f"{name}/2", said, f"{shown}{PENDING}\n\nQuestion: {second}\nAnswer:", targets[1], name, after=f"{name}/1"))
    return Task(name="mt_bench", items=items, metrics=("grade",), score=only_judged, max_new_tokens=1024, judged=True)
