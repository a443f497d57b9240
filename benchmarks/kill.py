"""`kill -9` at 20 random moments of a distillation, of its process or of the engine's: what is lost, changed, made twice, made anew.

    python benchmarks/kill.py MODEL [--prompts 2000] [-k 4] [--kills 20] [--replicas 2]

The model is any that the transformers engine runs; a tiny one will do. After each kill SQLite checks every page, and what was
committed before must stand there unchanged. Of the work that is lost the bound is told: the time from the last commit to the kill.
With `--replicas` every second kill is of an engine's process, after which the run has to go on by itself. In the end the rows are
compared with those of a run in one piece: the same keys in the same order. Each sample has its own random numbers, but what shares
its batch changes the last bits of its logits, and a draw that falls on the edge between two tokens then takes the other one: how many
texts differ is told, and more than a hundredth is an error.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

Row = tuple[object, ...]


def committed(store: Path) -> dict[bytes, Row]:
    """Return the samples in a store by their keys, after SQLite has checked it. Raises AssertionError for damage, or one that is twice."""
    connection = sqlite3.connect(store)
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    rows = connection.execute("select * from samples").fetchall()
    connection.close()
    assert len({row[0] for row in rows}) == len(rows) == len({row[1:3] for row in rows})
    return {row[0]: row for row in rows}


def count(store: Path) -> int:
    """Return how many samples are committed now, without disturbing who writes."""
    try:
        connection = sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5)
        found = int(connection.execute("select count(*) from samples").fetchone()[0])
        connection.close()
    except sqlite3.OperationalError:  # not there yet
        return 0
    return found


def engines(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes of its engines."""
    return [each for each in psutil.Process(process.pid).children() if "sftkit.core.engines.worker" in " ".join(each.cmdline())]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--replicas", type=int)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, chance = Path(scratch), random.Random(20261124)
        prompts, settings = folder / "prompts.jsonl", folder / "settings.yaml"
        prompts.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}."}) + "\n" for n in range(given.prompts)))
        engine = {"engine": "transformers", "device": "cpu", "dtype": "float32", "batch_tokens": 4096, "replicas": given.replicas}
        settings.write_text(json.dumps({"engine": engine}))

        def start(run: Path) -> subprocess.Popen[bytes]:
            options = ["--teacher", given.model, "-k", given.k, "--max-new-tokens", given.max_new_tokens, "--config", settings]
            command = [sys.executable, "-m", "sftkit", "curate", "distill", *map(str, [prompts, "-o", run, *options])]
            surroundings = {**os.environ, "PYTHONSAFEPATH": "1"}
            return subprocess.Popen(command, env=surroundings, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        run, whole = folder / "run", folder / "whole"
        store, total = run / "curate" / "samples.sqlite", given.prompts * given.k
        moments = sorted(chance.randrange(1, total) for _ in range(given.kills))  # in samples that are committed
        safe: dict[bytes, Row] = {}
        ages, process = [], start(run)
        for number, moment in enumerate(moments):
            if process.poll() is not None:
                process = start(run)
            seen, since = count(store), time.monotonic()
            while seen < max(moment, len(safe) + 1):  # it has gone on since the last kill
                assert process.poll() is None, f"ended with {process.returncode} at {seen} of {total} samples"
                time.sleep(0.005)
                now = count(store)
                if now != seen:
                    seen, since = now, time.monotonic()
            time.sleep(chance.uniform(0, 0.5))
            if process.poll() is not None:
                print(f"kill {number + 1}: had already finished", flush=True)
                break
            of_engine = bool(given.replicas) and number % 2 == 1
            if (now := count(store)) != seen:
                since = time.monotonic()
            ages.append(time.monotonic() - since)
            if of_engine:
                chance.choice(engines(process)).send_signal(signal.SIGKILL)
            else:
                process.send_signal(signal.SIGKILL)
                process.wait()
            found = committed(store)
            assert {key: found[key] for key in safe} == safe, "a committed sample was lost or changed"
            what = "an engine's process" if of_engine else "the process"
            print(
                f"kill {number + 1:2} of {what} at {len(found):5,} of {total:,} samples, {ages[-1]:.2f} s after a commit: sound", flush=True
            )
            safe = found
        if process.poll() is not None:
            process = start(run)
        assert process.wait() == 0
        final = committed(store)
        assert len(final) == total
        assert {key: final[key] for key in safe} == safe
        assert start(whole).wait() == 0
        expected = committed(whole / "curate" / "samples.sqlite")
        assert final.keys() == expected.keys()
        differ = sum(row[4] != expected[key][4] for key, row in final.items())
        order = [[json.loads(line)["id"] for line in (each / "curate" / "dataset.jsonl").read_text().splitlines()] for each in (run, whole)]
        assert order[0] == order[1]
        assert differ <= total / 100, f"{differ} texts differ from those of a run in one piece: more than rounding explains"
        print(f"{len(ages)} kills: nothing lost, changed or twice; the longest time from the last commit to a kill {max(ages):.2f} s;")
        print(f"all {total:,} rows in the order of a run in one piece, {differ} with another text: rounding, other rows shared their batch")


if __name__ == "__main__":
    main()
