"""Where the questions of tasks are: some come along, others are fetched once from a file or a Hub data set that the user names."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.catalogue import cache_dir
from ..core.errors import UserError, unknown_name
from ..core.files import write_atomically
from ..core.sources import iterate_rows

BUNDLED = Path(__file__).with_name("data")
LETTERS = "ABCD"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Questions by name. `sha256` is of the file that comes along; None where the user brings one."""

    file: str
    columns: tuple[str, ...]
    licence: str
    about: str
    sha256: str | None = None


DATA = {
    "gsm8k": DataSet(
        "gsm8k.jsonl.gz",
        ("question", "answer"),
        "MIT",
        "1,319 word problems (test)",
        "4e82068434a2229599bc7a7de5196b4547a4c51762b01402b390735511fd280f",
    ),
    "gsm8k_shots": DataSet(
        "gsm8k_shots.jsonl",
        ("question", "answer"),
        "MIT",
        "8 worked word problems (train)",
        "3f7ee50a459a52ed756683a31829ee9feb74db2b71c5638a09bf31139b8fee14",
    ),
    "ifeval": DataSet(
        "ifeval.jsonl.gz",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        "Apache-2.0",
        "541 prompts with 834 instructions to follow",
        "6b0ef9f77d382611c14faba71cbeb0b04eb57839e772e9df352ef62eef5c43ce",
    ),
    "humaneval": DataSet(
        "humaneval.jsonl.gz",
        ("task_id", "prompt", "entry_point", "test"),
        "MIT",
        "164 functions with tests",
        "10f809e1cb46ff346ed8479670268a73aa54133668e51add535f75c300144ace",
    ),
    "mt_bench": DataSet(
        "mt_bench.jsonl.gz",
        ("question_id", "category", "turns"),
        "Apache-2.0",
        "80 conversations of two questions, for a judge",
        "3f5b6ae1f0ec95f7d85daf57a2d9154996f5d223e79a369df3178cd67c4d1920",
    ),
    "llmbar": DataSet(
        "llmbar.jsonl.gz",
        ("subset", "input", "output_1", "output_2", "label"),
        "MIT",
        "419 labelled pairs that show what a judge is worth",
        "25faad37d6384f21c0205c41632a4828a2d9418334e96126b587f595172228bd",
    ),
    "mmlu": DataSet(
        "mmlu.jsonl.gz",
        ("split", "subject", "question", *LETTERS, "answer"),
        "MIT",
        "14,042 questions of 57 subjects, four choices each",
    ),
}


def read_data(name: str) -> list[Row]:
    """Return the rows of a data set. Raises UserError for one that was not fetched yet, or whose file is not what it was."""
    known = _known(name)
    path = stored(name)
    if known.sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != known.sha256:
        raise UserError(f"{path}: is not the file that came with sftkit (its SHA-256 differs); install sftkit again")
    if not path.exists():
        raise UserError(
            f"{name} does not come with sftkit: `sftkit evaluate data get {name} SOURCE` takes it from a file or a Hub data set"
        )
    return [row for _, row in iterate_rows(path)]


def stored(name: str) -> Path:
    """Return where a data set is, or will be."""
    known = _known(name)
    return (BUNDLED if known.sha256 else cache_dir() / "tasks") / known.file


def fetch_data(name: str, source: str) -> tuple[Path, int]:
    """Keep the rows of a file or a Hub data set as the data set of this name; return its path and how many they are.

    Raises UserError for a name that comes along already, and for rows without the columns that the task needs.
    """
    known = _known(name)
    if known.sha256:
        raise UserError(f"{name} comes with sftkit ({stored(name)}, {known.licence}); there is nothing to fetch")
    rows = list(_shaped(source, known, SHAPES.get(name, lambda row, split: [row])))
    path = stored(name)
    import gzip

    with write_atomically(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path, len(rows)


def _shaped(source: str, known: DataSet, shape: Callable[[Row, str], list[Row]]) -> Iterator[Row]:
    splits = ("dev", "test") if "/" in source and not Path(source).expanduser().exists() else ("",)
    for split in splits:
        for place, row in iterate_rows(source, split=split or "train"):
            try:
                several = shape(row, split)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            for shaped in several:
                missing = [each for each in known.columns if shaped.get(each) is None]
                if missing:
                    had = ", ".join(name for name, value in row.items() if value is not None)
                    raise UserError(f"{place}: has no {missing[0]}; found the columns {had}; expected {', '.join(known.columns)}")
                yield shaped


def _mmlu(row: Row, split: str) -> list[Row]:
    """Read the Hub's shape too: choices as a list, the answer as their number."""
    if isinstance(row.get("choices"), list) and isinstance(row.get("answer"), int):
        if len(row["choices"]) != len(LETTERS) or not 0 <= row["answer"] < len(LETTERS):
            found = f"{len(row['choices'])} choices and the answer {row['answer']}"
            raise UserError(f"found {found}; expected four choices and their number, 0 to 3")
        choices = dict(zip(LETTERS, row["choices"], strict=True))
        row = {"subject": row.get("subject"), "question": row.get("question"), **choices, "answer": LETTERS[row["answer"]]}
        row["split"] = split or "test"
    elif row.get("answer", "A") not in (*LETTERS,):
        raise UserError(f"the answer is {row['answer']!r}; expected A, B, C or D")
    return [row]


SHAPES: dict[str, Callable[[Row, str], list[Row]]] = {"mmlu": _mmlu}


def table() -> str:
    """Write the data sets for people."""
    from .results import aligned

    rows = [("name", "licence", "here", "what")]
    rows += [(name, each.licence, "yes" if stored(name).exists() else "no", each.about) for name, each in DATA.items()]
    return "\n".join(aligned(rows))


def _known(name: str) -> DataSet:
    if name not in DATA:
        raise unknown_name("data set", name, DATA)
    return DATA[name]
