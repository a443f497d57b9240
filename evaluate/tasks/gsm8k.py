"""GSM8K: word problems whose answer is a number (Cobbe et al. 2021, arXiv 2110.14168)."""

from ...core.checks.numbers import canonical, extract_marked, extract_number
from ...core.errors import UserError
from ..config import TasksConfig
from ..task_data import Row, read_data
from .base import Item, Mark, Task, asked

ASKING = "\n\nReason step by step, and end with a line that says #### and the final number alone."


def load(config: TasksConfig) -> Task:
    """Return the task: `flexible` takes the number where it is meant, `strict` only after ####, `boxed` only in \\boxed{}."""
    worked = read_data("gsm8k_shots")
    if config.shots > len(worked):
        raise UserError(f"shots: gsm8k has {len(worked)} worked examples, found {config.shots}")
    shots = "".join(_shown(row, str(row["answer"])) + "\n\n" for row in worked[: config.shots])
    items = [
        Item(
            f"gsm8k/{number}", asked(row["question"] + ASKING), shots + _shown(row, ""), {"answer": row["answer"], "bare": row["question"]}
        )
        for number, row in enumerate(read_data("gsm8k"))
    ]
    return Task(name="gsm8k", items=items, metrics=("flexible", "strict", "boxed"), score=score, max_new_tokens=400)


def score(item: Item, answer: str) -> dict[str, Mark]:
    """Compare numbers exactly."""
    gold = extract_marked(item.target["answer"], "hashes")
    found = {
        "flexible": extract_number(answer),
        "strict": extract_marked(answer, "hashes"),
        "boxed": extract_marked(answer, "boxed"),
    }
    missing = Mark(0.0, False)
    return {name: missing if each is None else Mark(float(each == gold), True, canonical(each)) for name, each in found.items()}


def _shown(row: Row, answer: str) -> str:
    return f"Question: {row['question']}\nAnswer: {answer}".rstrip(" ")
