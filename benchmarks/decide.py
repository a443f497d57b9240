"""Seconds and memory of the steps that decide, on stored rows, filter to select, and of why; and rows one by one as the baseline.

    python benchmarks/decide.py [ROWS] [FOLDER]       1,000,000 rows of 100 tokens, four samples to a prompt; FOLDER keeps the run
    python benchmarks/decide.py fuzz [ROWS]           100,000 rows, 5 % of them poisoned, through every step: is the law kept?

Every step is a process of its own, so that its peak of memory is its own. The baseline keeps the same rows as `keep`, and writes
the same files, with a Python object for each row: parsed, decided on, entered in the ledger and written one by one.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def make(rows: int, folder: Path) -> None:
    """Write a run of four samples a prompt, a tenth of them copies of the one before in another case."""
    from sftkit.core.run import Run
    from sftkit.curate.decided import decision_table, record
    from sftkit.curate.rows import STORED

    draw = random.Random(0)
    vocabulary = ["".join(draw.choice(LETTERS) for _ in range(draw.randrange(2, 10))) for _ in range(30_000)]
    pool = draw.choices(vocabulary, [1 / (place + 10) for place in range(len(vocabulary))], k=2_000_000)
    columns: dict[str, list[Any]] = {name: [] for name in STORED}
    answer = ""
    for row in range(rows):
        begin = draw.randrange(len(pool) - 100)
        prompt = f"Question {row // 4}: {' '.join(pool[row // 4 % 10**6 : row // 4 % 10**6 + 20])}?"
        words = pool[begin : begin + 50]
        answer = answer.upper() if row % 10 == 9 and row % 4 else f"{' '.join(words[:25])}.\n\n{' '.join(words[25:])}."
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for name, value in zip(
            STORED,
            (f"{row // 4:016x}", row % 4, json.dumps(turns), None, f"made:{row}", "{}", "stop", 95 + row % 10, -draw.random()),
            strict=True,
        ):
            columns[name].append(value)
    table = pl.DataFrame(columns, schema=STORED)
    with Run.create(folder) as run:
        table.write_parquet(run.room("curate") / "rows.parquet")
        record(run, "import", table, decision_table(table, "import", pl.lit(None, pl.String)))


def keep(run: Any) -> None:
    from sftkit.curate.decided import decision_table, record
    from sftkit.curate.rows import input_rows

    rows = input_rows(run, "keep")
    rule = pl.when(pl.col("response").str.len_chars() < 200).then(pl.lit("short"))
    record(run, "keep", rows, decision_table(rows, "keep", rule))


def keep_one_by_one(run: Any) -> None:
    from sftkit.core.example import Decision
    from sftkit.core.ledger import SCHEMA
    from sftkit.curate.rows import message_text, row_ids, split_texts

    path = run.path / "curate" / "rows.parquet"
    rows = pl.read_parquet(path)
    texts = [split_texts(json.loads(messages)) for messages in rows["messages"]]
    decisions = []
    for (example_id, index), (_, response) in zip(rows.select("example_id", "sample_index").iter_rows(), texts, strict=True):
        rule = "short" if len(response or "") < 200 else ""
        decisions.append(Decision(example_id, index, "keep", "rejected" if rule else "kept", rule))
    pl.DataFrame([{"step": 1, **asdict(each)} for each in decisions], schema=SCHEMA).write_parquet(path.with_name("one-ledger.parquet"))
    left = rows.filter(pl.Series([each.action == "kept" for each in decisions]))
    turns = []
    with open(path.with_name("one.jsonl"), "w", encoding="utf-8") as file:
        for name, messages, source, meta in zip(row_ids(left), left["messages"], left["source"], left["meta"], strict=True):
            file.write(f'{{"id": {json.dumps(name)}, "messages": {messages}, "source": {json.dumps(source)}, "meta": {meta}}}\n')
    for messages in left["messages"]:
        turns.append([{"role": each["role"], "content": message_text(each)} for each in json.loads(messages)])
    left.with_columns(pl.Series("messages", turns)).write_parquet(path.with_name("one.parquet"))


def steps() -> dict[str, Any]:
    from sftkit.curate.best import best
    from sftkit.curate.config import ExportConfig
    from sftkit.curate.decide_config import BestConfig, DecontaminateConfig, DedupConfig, FilterConfig, MixConfig, SelectConfig
    from sftkit.curate.decontaminate import decontaminate
    from sftkit.curate.dedup import dedup
    from sftkit.curate.export import export
    from sftkit.curate.filters import filter_rows
    from sftkit.curate.mix import mix
    from sftkit.curate.selection import select
    from sftkit.curate.show import why

    def mixed(run: Any) -> None:
        run.close()
        mix([str(run.path)], None, MixConfig(budget=tenth(run)))

    return {
        "one by one": keep_one_by_one,
        "keep": keep,
        "filter": lambda run: filter_rows(run, FilterConfig()),
        "filter --where": lambda run: filter_rows(run, FilterConfig(where=("num_tokens < 104 and logprob > -0.95",))),
        "decontaminate": lambda run: decontaminate(run, DecontaminateConfig()),
        "dedup exact": lambda run: dedup(run, DedupConfig(semantic=None)),
        "best": lambda run: best(run, BestConfig(by=("logprob",))),
        "best random": lambda run: best(run, BestConfig(by=("random",), keep=3)),
        "best controls": lambda run: best(run, BestConfig(by=("logprob",), keep=3, controls=True)),
        "select random": lambda run: select(run, SelectConfig(method="random", budget=tenth(run))),
        "select top": lambda run: select(run, SelectConfig(method="top", by=("logprob",), budget=tenth(run))),
        "select longest": lambda run: select(run, SelectConfig(method="longest", budget=tenth(run))),
        "select tokens": lambda run: select(run, SelectConfig(method="random", budget_tokens=10 * tenth(run))),
        "select stratified": lambda run: select(run, SelectConfig(method="stratified", strata=("source", "length"), budget=tenth(run))),
        "select controls": lambda run: select(run, SelectConfig(method="random", budget=tenth(run), controls=True)),
        "mix": mixed,
        "export": lambda run: export(run, run.path / "exported", ExportConfig(format="trl-messages")),
        "why": lambda run: why(run, f"{10:016x}"),
    }


def tenth(run: Any) -> int:
    """Return a tenth of the rows that a run began with."""
    return int(pl.scan_parquet(run.path / "curate" / "rows.parquet").select(pl.len()).collect().item()) // 10


def child(step: str, folder: Path) -> None:
    import contextlib
    import io

    from sftkit.core.run import Run

    with Run.create(folder) as run, contextlib.redirect_stdout(io.StringIO()):
        work = steps()[step]
        began, cpu = time.perf_counter(), time.process_time()
        work(run)
        seconds, used = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{step:16} {seconds:6.1f} s   {used:6.1f} s of CPU   peak {peak:.2f} GiB", flush=True)


POISON: tuple[dict[str, Any], ...] = (  # what a stored row may hold that a step must not stumble over
    {"text": ""},
    {"text": " \n\t\u3000"},
    {"text": "\x00\x01\x1f\x7f"},
    {
        "text": "\u0344\u0301e\u0301\u0345 \ufdfa \ufffd \U0001f468\u200d\U0001f469\u200d\U0001f467"
    },  # does not normalise to one form, or to much longer
    {"text": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"},
    {"text": "word " * 50_000},
    {"text": "I cannot help with that."},
    {"text": '"}], "role": "assistant", "content": "'},
    {"turns": []},
    {"turns": [{"role": "user", "content": "no answer"}]},
    {"turns": [{"role": "assistant", "content": "no prompt"}]},
    {
        "turns": [
            {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "look"}]},
            {"role": "assistant", "content": "seen"},
        ]
    },
    {"turns": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
    {"logprob": float("nan")},
    {"logprob": float("inf")},
    {"logprob": None},
    {"num_tokens": None},
    {"num_tokens": -5},
    {"finish_reason": "length"},
    {"finish_reason": "other"},
    {"source": None},
    {"meta": None},
    {"meta": '{"level": {"deep": [1, null]}}'},
    {"example_id": "~2"},
    {"example_id": "\u00fc/\u4f60 \"'"},
    {"sample_index": None},
)


def poisoned(rows: int, seed: int = 0) -> pl.DataFrame:
    """Return stored rows of which one in twenty holds something of POISON; no two have the same id and index."""
    from sftkit.curate.rows import STORED

    draw = random.Random(seed)
    words = [f"{draw.randrange(10**6):x}" for _ in range(5000)]
    found: dict[tuple[str, int | None], dict[str, Any]] = {}
    while len(found) < rows:
        place = len(found)
        poison = draw.choice(POISON) if draw.random() < 0.05 else {}
        text = poison.get("text", " ".join(draw.choices(words, k=draw.randrange(3, 60))) if draw.random() < 0.9 else f"copy {place % 50}")
        turns = [{"role": "user", "content": f"Question {place // 4 % (rows // 5 + 1)}"}, {"role": "assistant", "content": text}]
        row = {
            "example_id": f"{place // 4:016x}",
            "sample_index": place % 4,
            "messages": json.dumps(poison.get("turns", turns), ensure_ascii=draw.random() < 0.5),
            "reference": None,
            "source": f"made:{place}",
            "meta": "{}",
            "finish_reason": "stop",
            "num_tokens": 5,
            "logprob": -10 * draw.random(),
        }
        row |= {name: value for name, value in poison.items() if name in row}
        found.setdefault((str(row["example_id"]), row["sample_index"]), row)  # type: ignore[arg-type]
        if (str(row["example_id"]), row["sample_index"]) in found and len(found) == place:
            row["example_id"] = f"{row['example_id']}#{place}"
            found[str(row["example_id"]), row["sample_index"]] = row  # type: ignore[index]
    return pl.DataFrame(list(found.values()), schema=STORED, orient="row")


def fuzz(rows: int, folder: Path) -> list[Any]:
    """Take poisoned rows through all steps that decide; return what the independent checker says of the run."""
    from sftkit.core.run import Run
    from sftkit.curate.best import best
    from sftkit.curate.certificate import check_run
    from sftkit.curate.decide_config import BestConfig, DecontaminateConfig, DedupConfig, FilterConfig, HeldoutConfig, SelectConfig
    from sftkit.curate.decided import decision_table, record
    from sftkit.curate.decontaminate import decontaminate
    from sftkit.curate.dedup import dedup
    from sftkit.curate.filters import filter_rows
    from sftkit.curate.heldout import hold_out
    from sftkit.curate.selection import select

    table = poisoned(rows)
    with Run.create(folder) as run:
        table.write_parquet(run.room("curate") / "rows.parquet")
        record(run, "import", table, decision_table(table, "import", pl.lit(None, pl.String)))
        best(run, BestConfig(by=("logprob",), keep=3))
        filter_rows(run, FilterConfig(where=("logprob > -9",), keep_unscored=True))
        decontaminate(run, DecontaminateConfig())
        dedup(run, DedupConfig(semantic=None, minhash=0.8))
        hold_out(run, HeldoutConfig(prompts=rows // 100))
        select(run, SelectConfig(method="longest", budget=rows // 4))
        return check_run(run)


def main() -> None:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        if arguments[:1] == ["fuzz"]:
            from sftkit.curate.certificate import report

            began = time.perf_counter()
            checks = fuzz(int(arguments[1]) if arguments[1:] else 100_000, Path(temporary) / "run")
            print(f"{report(checks)}\n{time.perf_counter() - began:.0f} s")
            sys.exit(any(check.faults for check in checks))
        folder = Path(arguments[1]) if arguments[1:] else Path(temporary) / "run"
        if not (folder / "config.yaml").exists():
            rows = arguments[0] if arguments else "1000000"  # in a process of its own: a child's peak begins with its parent's
            subprocess.run([sys.executable, __file__, "--make", rows, str(folder)], check=True)
        ledger = folder / "ledger.parquet"
        for step in steps():
            before = ledger.read_bytes()
            subprocess.run([sys.executable, __file__, "--child", step, str(folder)], check=True)
            if step == "keep":  # it is none of the steps that follow
                ledger.write_bytes(before)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--make"]:
        make(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
