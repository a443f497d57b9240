"""Make the hash indexes of curate/data/ again, from the benchmarks' own files.

    python benchmarks/build_indexes.py /path/to/data

The folder holds gsm8k/test.jsonl.gz, ifeval/input_data.jsonl.gz, mmlu/mmlu.jsonl.gz, humaneval/HumanEval.jsonl.gz and
mt_bench/question.jsonl.gz, the files that curate/data/SOURCE.md names.
"""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sftkit.core.copies import GRAM, build_index
from sftkit.core.ngrams import words
from sftkit.curate.decontaminate import BUNDLED

Entries = list[tuple[str, str]]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mmlu(rows: list[dict[str, Any]]) -> Entries:
    """The questions. One of fewer than 8 words, or that stands several times, is also taken with its choices, and alone only where
    it is one item's."""
    rows = [row for row in rows if row["split"] == "test"]
    often = Counter(tuple(words(row["question"])) for row in rows)
    numbers: Counter[str] = Counter()
    entries = []
    for row in rows:
        item = f"mmlu/{row['subject']}/{numbers[row['subject']]}"
        numbers[row["subject"]] += 1
        question = tuple(words(row["question"]))
        if often[question] == 1:
            entries.append((item, row["question"]))
        if often[question] > 1 or len(question) < GRAM:
            entries.append((item, "\n".join(str(row[name]) for name in ("question", "A", "B", "C", "D"))))
    return entries


def main(data: Path) -> None:
    benchmarks: dict[str, Entries] = {
        "gsm8k": [(f"gsm8k/test/{number}", row["question"]) for number, row in enumerate(read(data / "gsm8k/test.jsonl.gz"))],
        "ifeval": [(f"ifeval/{row['key']}", row["prompt"]) for row in read(data / "ifeval/input_data.jsonl.gz")],
        "mmlu": mmlu(read(data / "mmlu/mmlu.jsonl.gz")),
        "humaneval": [(row["task_id"], row["prompt"]) for row in read(data / "humaneval/HumanEval.jsonl.gz")],
        "mt-bench": [
            (f"mt-bench/{row['question_id']}/{turn}", text)
            for row in read(data / "mt_bench/question.jsonl.gz")
            for turn, text in enumerate(row["turns"], start=1)
        ],
    }
    for name, entries in benchmarks.items():
        index = build_index(name, entries)
        index.save(BUNDLED / f"{name}.npz")
        size = (BUNDLED / f"{name}.npz").stat().st_size
        print(f"{name}: {len(set(index.items)):,} items, {len(entries):,} texts, {len(index.grams.values):,} runs, {size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
