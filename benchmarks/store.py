"""The store of samples at millions of rows: insert rate in its own groups, time to open, and export to Parquet within bounded memory.

    python benchmarks/store.py [--samples 5000000] [--folder FOLDER]

Rows are put one by one, as a distillation does, each with a key of its own and a text of 100 to 900 characters; every group is
committed and flushed (`synchronous = full`). Opening and exporting run in fresh processes, whose peak memory is read when they end.
The baseline of the insert rate is SQLite alone: the same rows by `executemany` in groups of the same size, with the same settings.
"""

import argparse
import hashlib
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sftkit.core.engines.base import Sampling
from sftkit.core.example import Sample
from sftkit.core.store import COMMIT_SAMPLES, SampleStore, decisive_settings

SENTENCE = "the answer is a number that we find when both sides are added and the rest is taken away from what was there before"
WORDS = SENTENCE.split()

OPEN = """
import resource, sys, time
from pathlib import Path
from sftkit.core.store import SampleStore
start = time.perf_counter()
with SampleStore(Path(sys.argv[1])) as store:
    opened = time.perf_counter() - start
    count = store.count()
    counted = time.perf_counter() - start
    keys = len(store.keys())
print(f"open {opened:.3f} s, with the count of its {count:,} samples {counted:.3f} s, with all keys {time.perf_counter() - start:.1f} s;",
      f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
"""

EXPORT = """
import resource, sys, time
from pathlib import Path
from sftkit.core.store import SampleStore
start = time.perf_counter()
with SampleStore(Path(sys.argv[1])) as store:
    rows = store.export(Path(sys.argv[2]))
print(f"export of {rows:,} rows to {Path(sys.argv[2]).stat().st_size / 2**30:.2f} GiB of Parquet {time.perf_counter() - start:.1f} s;",
      f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
"""


def texts(count: int) -> list[str]:
    """Return texts of 100 to 900 characters."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randrange(25, 220))) for _ in range(count)]


def fill(path: Path, count: int, pool: list[str]) -> None:
    """Put `count` samples into a new store, and say how fast each million went."""
    with SampleStore(path) as store:
        settings = store.remember("model", decisive_settings("sha256:0", Sampling()))
        with store.writer() as writer:
            start = last = time.perf_counter()
            for number in range(count):
                text = pool[number % len(pool)]
                key = hashlib.sha256(str(number).encode()).hexdigest()
                writer.put(key, Sample(key[:16], number % 4, text, "stop", len(text) // 4, -0.5, "model", settings))
                if (number + 1) % 1_000_000 == 0:
                    now = time.perf_counter()
                    print(f"  {number + 1:,}: {1_000_000 / (now - last):,.0f} samples/s", flush=True)
                    last = now
        seconds = time.perf_counter() - start
    size = path.stat().st_size / 2**30
    print(
        f"insert {count:,} samples, {size:.2f} GiB: {count / seconds:,.0f} samples/s, every group of {COMMIT_SAMPLES} flushed", flush=True
    )


def baseline(path: Path, count: int, pool: list[str]) -> None:
    """Insert the same rows with SQLite alone, in groups of the same size."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("create table samples (key blob primary key not null, a text, b integer, c text, d text, e text, f integer, g real)")
    start = time.perf_counter()
    for first in range(0, count, COMMIT_SAMPLES):
        group = []
        for number in range(first, min(count, first + COMMIT_SAMPLES)):
            key = hashlib.sha256(str(number).encode())
            text = pool[number % len(pool)]
            group.append((key.digest(), key.hexdigest()[:16], number % 4, "0" * 16, text, "stop", len(text) // 4, -0.5))
        connection.execute("begin immediate")
        connection.executemany("insert into samples values (?, ?, ?, ?, ?, ?, ?, ?)", group)
        connection.execute("commit")
    print(f"SQLite alone, {count:,} rows: {count / (time.perf_counter() - start):,.0f} rows/s", flush=True)
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        pool, store = texts(10_000), Path(scratch) / "samples.sqlite"
        baseline(Path(scratch) / "alone.sqlite", min(given.samples, 500_000), pool)
        fill(store, given.samples, pool)
        print(f"peak of inserting {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB", flush=True)
        for program in (OPEN, EXPORT):
            subprocess.run([sys.executable, "-c", program, str(store), str(Path(scratch) / "samples.parquet")], check=True, cwd="/")


if __name__ == "__main__":
    main()
