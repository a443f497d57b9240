"""Questions that stand in the training data: found however they are written there, and scored apart."""

from pathlib import Path

from sftkit.core.statistics import Estimate, wilson
from sftkit.evaluate.benchmark import evaluate_tasks
from sftkit.evaluate.contamination import contaminated
from sftkit.evaluate.tasks import open_task
from sftkit.evaluate.tasks.base import Item, asked

from .conftest import settings, write_rows


def test_contamination_is_found_and_scored_apart(tmp_path: Path, tiny_model: Path, trained_model: Path) -> None:
    long = "A farmer has twelve brown cows and sells three of them at the market on Monday morning for a good price"
    rows = [
        {"id": "copied", "prompt": long, "answer": "9", "scoring": "numeric"},
        {"id": "short", "prompt": "Calculate 1+1-1", "answer": "1", "scoring": "numeric"},
        {"id": "new", "prompt": "How many legs do the nine cows that are left have in all?", "answer": "1", "scoring": "numeric"},
    ]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    trained_on = [
        {"messages": [{"role": "user", "content": f"Hi! {long.upper()}, no?"}, {"role": "assistant", "content": "9"}]},
        {"messages": [{"role": "user", "content": "CALCULATE  １+1-1!"}, {"role": "assistant", "content": "1"}]},
    ]
    train = write_rows(tmp_path / "train.jsonl", trained_on)
    items = open_task(str(path), settings()).items
    assert contaminated(items, str(train)) == {"copied": f"{train}:1", "short": f"{train}:2"}
    result = evaluate_tasks({"sft": str(trained_model)}, [str(path)], None, settings(train_data=str(train)))
    (metric,) = result.tasks[0].metrics["sft"]
    assert result.tasks[0].contaminated == 2
    assert (metric.clean_n, metric.clean) == (1, Estimate(1.0, wilson(1, 1)))
    assert "2 of 3 questions stand in the training data" in result.summary()


def test_every_one_of_equal_questions_stands_in_the_training_data(tmp_path: Path) -> None:
    """Short ones, of which the search tells one."""
    asks = ["Who is it?", "who is it", "What is the capital of France?", "What is the capital of France", "What is the capital of Spain?"]
    items = [Item(str(number), asked(text), text, {}, None) for number, text in enumerate(asks)]
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": "Who is it?"}, {"prompt": "Say: what is the capital of France?"}])
    assert contaminated(items, str(train)) == {"0": f"{train}:1", "1": f"{train}:1", "2": f"{train}:2", "3": f"{train}:2"}


def test_what_stands_in_training_data_is_found_in_every_script_and_however_much_one_row_holds(tmp_path: Path) -> None:
    questions = {
        "chinese": "一个农夫有十二头牛，星期一他卖掉了三头，请问他现在还剩下几头牛？",
        "hebrew": "לחקלאי היו שתים עשרה פרות והוא מכר שלוש מהן ביום שני כמה פרות נשארו לו",
        **{f"n{number}": f"If train number {number} leaves at nine and is one hour late when does it arrive" for number in range(20)},
    }
    items = [Item(name, asked(text), text, {}, None) for name, text in questions.items()]
    rows = [
        {"messages": [{"role": "user", "content": "请解答：" + questions["chinese"]}, {"role": "assistant", "content": "九头"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": questions["hebrew"]}]}, {"role": "assistant", "content": "9"}]},
        {"messages": [{"role": "user", "content": "\n".join(f"{each}?" for each in list(questions.values())[2:])}]},
        {"messages": [{"role": "user", "content": questions["chinese"]}]},
    ]
    train = write_rows(tmp_path / "train.jsonl", rows)
    expected = {"chinese": f"{train}:1", "hebrew": f"{train}:2", **{f"n{number}": f"{train}:3" for number in range(20)}}
    assert contaminated(items, str(train)) == expected
    assert contaminated(items[:1], str(write_rows(tmp_path / "other.jsonl", [{"prompt": "一个农夫有十二头牛，他很高兴。"}]))) == {}
