"""`kill -9` at ten random moments of a distillation: nothing that was committed is lost or changed, nothing is made twice.

Killed so, curator's own vLLM, vLLM's run-batch, synthetic-data-kit and open-instruct have nothing: they write when all is done.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

NUM_PROMPTS, K, NUM_KILLS = 1000, 4, 10  # more than the fastest machine answers until the last kill; only some are answered in the end
Row = tuple[object, ...]


def committed(store: Path) -> dict[bytes, Row]:
    """Return the samples that are in the store now, every column, by key. The database is first checked for damage."""
    with sqlite3.connect(store) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("select * from samples").fetchall()
    connection.close()
    keys = {row[0]: row for row in rows}
    assert len(keys) == len(rows) == len({row[1:3] for row in rows})  # by key, and by (prompt, index): none twice
    return keys


def count(store: Path) -> int:
    if not store.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=1) as connection:
            found = int(connection.execute("select count(*) from samples").fetchone()[0])
        connection.close()
        return found
    except sqlite3.OperationalError:  # the table is not there yet
        return 0


@pytest.mark.timeout(1200)  # thirteen starts and a thousand answers, on a machine that may be busy
def test_ten_kills_lose_nothing_and_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    prompts, run, whole = tmp_path / "prompts.jsonl", tmp_path / "run", tmp_path / "whole"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}."}) + "\n" for n in range(NUM_PROMPTS)))
    settings = tmp_path / "settings.yaml"  # small batches, so that a kill finds some done and some not
    settings.write_text("engine: {engine: transformers, device: cpu, dtype: float32, batch_tokens: 2048}\n")

    def command(out: Path) -> list[str]:
        options = ["--teacher", tiny_model, "-k", K, "--max-new-tokens", 200, "--config", settings]
        return [sys.executable, "-m", "sftkit", "curate", "distill", *map(str, [prompts, "-o", out, *options])]

    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    store, moments = run / "curate" / "samples.sqlite", random.Random(20260101)
    safe: dict[bytes, Row] = {}
    grown = []
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command(run), env=surroundings, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while count(store) == len(safe):  # killed only once it has added to the store: in the middle of generating
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "nothing was generated within four minutes"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, "finished before it could be killed: the prompts are too few for this machine"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = committed(store)
        assert {key: now[key] for key in safe} == safe
        grown.append(len(now) - len(safe))
        safe = now
    assert all(grown)
    assert NUM_KILLS <= len(safe) < NUM_PROMPTS * K

    places = {name: place for place, name in enumerate(pl.read_parquet(run / "curate" / "prompts.parquet")["example_id"])}
    limit = max(places[str(row[1])] for row in safe.values()) + 21
    num_wanted = min(limit, NUM_PROMPTS) * K
    subprocess.run([*command(run), "--limit", str(limit)], env=surroundings, cwd="/", check=True, capture_output=True)
    final = committed(store)
    assert len(final) == num_wanted
    assert {key: final[key] for key in safe} == safe

    subprocess.run([*command(whole), "--limit", str(limit)], env=surroundings, cwd="/", check=True, capture_output=True)
    # one seed a sample: answers do not depend on which of them were batched together, but where float32 rounds to another token
    columns = [{key: row[:8] for key, row in committed(each).items()} for each in (store, whole / "curate" / "samples.sqlite")]
    assert columns[0].keys() == columns[1].keys()
    alike = [key for key, row in columns[0].items() if row[:7] == columns[1][key][:7]]
    assert len(alike) >= 0.99 * num_wanted
    assert max(abs(columns[0][key][7] - columns[1][key][7]) for key in alike) < 1e-3  # log-probability, within rounding
    ledgers = [pl.read_parquet(each / "ledger.parquet").filter(pl.col("stage") == "distill") for each in (run, whole)]
    ids = [each.select("example_id", "sample_index").rows() for each in ledgers]
    assert ids[0] == ids[1]
    assert len(ids[0]) == num_wanted
