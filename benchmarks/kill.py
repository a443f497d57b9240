"""`kill -9` at 20 random moments of distillations, of the process or of its engine's: what is lost, changed, made twice, made anew.

    python benchmarks/kill.py MODEL [--prompts 2000] [-k 4] [--kills 20] [--replicas 2]                    a tiny model, on a CPU
    python benchmarks/kill.py MODEL --engine vllm --sequences 32 --max-new-tokens 32                       the same, with vLLM's CPU build
    python benchmarks/kill.py TOKENIZER --shape 135m --engine vllm --lanes 2 --max-new-tokens 96 [--seconds 300] [--out FILE]      on a GPU

Several runs (`--lanes`) go on beside each other, each with its own folder, and one more that nobody disturbs. When all of them have
answers that are new since the last kill, each is killed within the next two seconds: in turns the command itself, the process that
holds its engine, and vLLM's own engine process below that. After the first the command is given again; after the others the run has to go
on by itself. Each time SQLite checks every page, and what was committed before must stand there unchanged. The command also writes down,
outside the store and at once, each answer that the engine gives it: what of that is not committed at a kill is finished work that is lost,
and what is given twice is work that was made anew. More than a second of it is an error. In the end the rows are compared with those of
the undisturbed run: the same keys in the same order. Each sample has its own random numbers, but what shares its batch changes the last
bits of its logits, and a draw that falls on the edge between two tokens then takes the other one: how many texts differ is told, and with
32-bit numbers more than a hundredth is an error. With --shape the model has random weights and the folder's tokenizer.

A start of vLLM is imports in three processes before anything else: eight runs at once on ten cores of an H200's host took 130 s each
time. So `--lanes 2 --kills 6 --max-new-tokens 96` is what fits five minutes there, and 20 kills take a quarter of an hour.
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
from itertools import cycle
from pathlib import Path
from typing import Any

import polars as pl
import psutil
from sftkit.core.hardware import visible_gpus

Row = tuple[object, ...]
WINDOW = 2.0  # seconds within which the runs of a round are killed
MOST_REDONE = 1.0  # seconds from the end of an answer that is lost to the kill
SECONDS_TO_COMMIT = 2.0  # what an engine that was killed has given the command
AS_COMMAND = "--as-command"  # the first argument of this script where it is the command that is killed
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"device": "cpu", "dtype": "float32", "batch_tokens": 4096},
    # a cache of a given size: what is left of a card cannot be measured while others start on it, or end
    "vllm": {"enforce_eager": True, "kv_cache_gib": 4.0, "max_num_batched_tokens": 2048, "max_model_len": 1024},
}


class Lane:
    """One distillation in a folder of its own, and what is known to be safe in it."""

    def __init__(self, name: str, folder: Path, options: list[str]) -> None:
        self.name, self.folder, self.options = name, folder / name, options
        self.store = self.folder / "curate" / "samples.sqlite"
        self.log = folder / f"{name}.log"
        self.journal = folder / f"{name}.journal"  # the answers that the engine has given the command, with their times
        self.safe: dict[bytes, Row] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0  # committed

    def start(self) -> None:
        """Give the command, again if it was given before."""
        command = [sys.executable, str(Path(__file__).resolve()), AS_COMMAND, str(self.journal)]
        command += ["curate", "distill", *self.options[:1], "-o", str(self.folder), *self.options[1:]]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, "PYTHONSAFEPATH": "1"}, cwd="/", stdout=subprocess.DEVNULL, stderr=log
            )

    def ended(self) -> bool:
        """Look whether it has finished. Raises AssertionError if it failed."""
        code = None if self.process is None else self.process.poll()
        assert code in (None, 0, -signal.SIGKILL), f"{self.name} ended with {code}: {self.log.read_text(errors='replace')[-3000:]}"
        return code == 0

    def look(self) -> None:
        """Count what is committed now, without disturbing who writes."""
        try:
            connection = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=5)
            found = int(connection.execute("select count(*) from samples").fetchone()[0])
            connection.close()
        except sqlite3.OperationalError:  # not there yet
            return
        self.count = found

    def finished(self) -> list[tuple[bytes, float]]:
        """Return the answers that the engine has given the command, by time.monotonic; one that was made twice is there twice."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [(bytes.fromhex(key), float(when)) for key, when in map(str.split, lines)]

    def committed(self) -> dict[bytes, Row]:
        """Return the samples in the store by their keys, checked. Raises AssertionError for damage, or one that is twice, or changed."""
        connection = sqlite3.connect(self.store)
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("select * from samples").fetchall()
        connection.close()
        found = {row[0]: row for row in rows}
        assert len(found) == len(rows) == len({row[1:3] for row in rows}), f"{self.name}: a sample is there twice"
        assert {key: found.get(key) for key in self.safe} == self.safe, f"{self.name}: a committed sample was lost or changed"
        return found

    def victims(self, kind: str) -> list[psutil.Process]:
        """Return the processes of a kind."""
        assert self.process is not None
        own = psutil.Process(self.process.pid)
        if kind == "the command":
            return [own]
        workers = [each for each in own.children() if "sftkit.core.engines.worker" in " ".join(each.cmdline())]
        if kind == "the engine's process":
            return workers
        below = [each for worker in workers for each in worker.children(recursive=True)]
        # it gives itself a name where the package setproctitle is there
        return [each for each in below if each.name().startswith("VLLM::EngineCor") or "spawn_main" in " ".join(each.cmdline())]

    def kill(self, kind: str, chance: random.Random) -> tuple[dict[bytes, Row], list[float]]:
        """Kill one of its processes; return what is committed, and how old each answer was that was finished and is lost."""
        victim = chance.choice(self.victims(kind))
        moment = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        if kind != "the command":
            time.sleep(SECONDS_TO_COMMIT)  # the command has what it was given: the next kill is to wait for what comes after this one
            return self.committed(), []
        assert self.process is not None
        self.process.wait()
        found = self.committed()
        return found, [moment - when for key, when in self.finished() if key not in found]

    def order(self) -> list[str]:
        """Return the samples that it accounts for, as ID/INDEX."""
        found = pl.read_parquet(self.folder / "ledger.parquet").filter(pl.col("stage") == "distill")
        return [f"{name}/{index}" for name, index in found.select("example_id", "sample_index").iter_rows()]


def as_command(journal: str, arguments: list[str]) -> None:
    """Be `sftkit`, and write down each answer as the engine gives it."""
    from sftkit.__main__ import main as run
    from sftkit.core.store import SampleWriter

    put, file = SampleWriter.put, os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def noted(writer: SampleWriter, key: str, sample: Any) -> None:
        os.write(file, f"{key} {time.monotonic()}\n".encode())
        put(writer, key, sample)

    SampleWriter.put = noted  # type: ignore[method-assign]
    sys.argv = ["sftkit", *arguments]
    run()


def main() -> None:
    if sys.argv[1:2] == [AS_COMMAND]:
        return as_command(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--shape")
    parser.add_argument("--engine", default="transformers", choices=ENGINES)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128, help="that vLLM runs at once; few, so that a run lasts for all its kills")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round is begun later")
    parser.add_argument("--out", default="kill.jsonl")
    given = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no run behind

    def note(row: dict[str, Any]) -> None:
        print(json.dumps({"after": round(time.monotonic() - began), **row}), flush=True)
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        folder, chance = Path(scratch), random.Random(20261124)
        model = given.model
        if given.shape:
            from teachers import random_teacher

            model = random_teacher(given.shape, Path(given.model), folder / "model")
        prompts, settings = folder / "prompts.jsonl", folder / "settings.yaml"
        prompts.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}."}) + "\n" for n in range(given.prompts)))
        share: dict[str, Any] = {}
        if given.engine == "vllm":
            share = {"gpu_memory_utilization": 0.6 / (given.lanes + 1), "max_num_seqs": given.sequences}
            if not visible_gpus():
                share |= {"kv_cache_gib": 0.5, "dtype": "float32"}  # of the machine's memory, which others need, too
        engine = {"engine": given.engine, **ENGINES[given.engine], **share, "replicas": given.replicas}
        settings.write_text(json.dumps({"engine": engine}))
        asked = ["--teacher", model, "-k", given.k, "--max-new-tokens", given.max_new_tokens, "--config", settings]
        options = [str(each) for each in (prompts, *asked)]
        lanes = [Lane(f"run{number}", folder, options) for number in range(given.lanes)]
        whole, total = Lane("whole", folder, options), given.prompts * given.k
        try:
            measure(given, lanes, whole, total, chance, note, began)
        finally:
            for lane in (*lanes, whole):
                if lane.process is not None and lane.process.poll() is None:
                    lane.process.kill()
                    lane.process.wait()


def measure(given: argparse.Namespace, lanes: list[Lane], whole: Lane, total: int, chance: random.Random, note: Any, began: float) -> None:
    """Kill as often as asked, let the runs finish, and compare."""
    kinds = ["the command"]
    if given.engine == "vllm" or given.replicas:
        kinds.append("the engine's process")
    if given.engine == "vllm":
        kinds.append("vLLM's engine process")
        whole.start()  # beside the others
    kind, kills, ages, rounds = cycle(kinds), 0, [0.0], -(-given.kills // len(lanes))
    for number in range(rounds):
        if time.monotonic() - began > given.seconds:
            note({"rounds left out": rounds - number})
            break
        for lane in lanes:
            if lane.process is None or lane.process.poll() is not None:
                lane.start()
        # so far that the kills are spread over the run, and that it has gone on since the last one
        least = {
            lane.name: max(len(lane.safe) + 1, chance.randrange(total * number // rounds, total * (number + 1) // rounds)) for lane in lanes
        }
        if given.engine == "vllm":  # they wait for each other, and go on meanwhile
            least = {lane.name: len(lane.safe) + chance.randrange(1, total // (20 * rounds)) for lane in lanes}
        told = time.monotonic()
        while any(lane.count < least[lane.name] for lane in lanes):
            if time.monotonic() - told > 60:
                told = time.monotonic()
                note(
                    {
                        each.name: [each.count, each.log.read_text(errors="replace")[-300:]]
                        for each in lanes
                        if each.count < least[each.name]
                    }
                )
            for lane in lanes:
                assert not lane.ended(), f"{lane.name} has finished before kill {kills + 1}: give more prompts"
                lane.look()
            time.sleep(0.02)
        due = {lane.name: time.monotonic() + chance.uniform(0, WINDOW if len(lanes) > 1 else 0.5) for lane in lanes}
        for lane in sorted(lanes, key=lambda lane: due[lane.name]):
            time.sleep(max(0.0, due[lane.name] - time.monotonic()))
            if kills == given.kills:
                break
            kills, what = kills + 1, next(kind)
            lane.safe, lost = lane.kill(what, chance)
            ages += lost
            summary = {"finished and lost": len(lost), "at most seconds old": round(max(lost, default=0.0), 2)}
            note({"kill": kills, "run": lane.name, "of": what, "samples": len(lane.safe), **summary})
    for lane in lanes:
        if lane.process is None or lane.process.poll() is not None:
            lane.start()
    for lane in (*lanes, whole):
        if lane.process is None:
            lane.start()
        assert lane.process is not None
        lane.process.wait()
        assert lane.ended(), f"{lane.name} was killed by another"
    expected, order, anew = whole.committed(), whole.order(), 0
    assert len(expected) == total
    for lane in lanes:
        final, keys = lane.committed(), [key for key, _ in lane.finished()]
        anew += len(keys) - len(set(keys))
        assert final.keys() == expected.keys(), f"{lane.name}: other samples than in one piece"
        assert lane.order() == order, f"{lane.name}: another order than in one piece"
        differ = sum(row[4] != expected[key][4] for key, row in final.items())
        note({"run": lane.name, "samples": len(final), "same keys and order": True, "texts that differ by rounding": differ})
        assert given.engine == "vllm" or differ <= total / 100, f"{differ} texts differ: more than rounding explains"
    oldest = {"answers made anew": anew, "finished at most so many seconds before the kill": round(max(ages), 2)}
    note({"kills": kills, "nothing lost, changed or twice": True, **oldest})
    assert max(ages) <= MOST_REDONE, f"finished work of {max(ages):.2f} s was lost"


if __name__ == "__main__":
    main()
