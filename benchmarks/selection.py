"""Seconds and memory of selection: facility location, exact and fast, beside apricot's and submodlib's, k-center, and how memory grows.

    python benchmarks/selection.py [--vectors FILE.npy] [--peers PYTHON] [--repeats 3] [--center-rows 100000] [--only NAME]

FILE.npy holds embeddings (a run's curate/embeddings.npy); without it rows are drawn around 500 centres in 384 dimensions. PYTHON is
an interpreter that has the peers: `python -m venv /tmp/peers && /tmp/peers/bin/pip install apricot-select submodlib-py`. One that is
not installed is skipped, and so it says. Both are given the similarities, and computing these is part of their time.
Every measurement is a process of its own, variants in turn; medians, of the seconds with the least and the most, and of the seconds
of processor time on all cores, which say more on a busy machine. Memory is the process's peak, with the interpreter and the vectors;
the value of a selection is Σ_i max(0, max_s cos(i, s)), computed here for all alike. `--only value` holds the value of fast facility
location against that of exact for several kinds of rows and budgets.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from sftkit.curate.facility_location import facility_location
from sftkit.curate.fast_location import fast_location
from sftkit.curate.similarity import unit_vectors

OURS = """
import json, resource, sys, time
import numpy as np
from itertools import islice
vectors, method, size = np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
from sftkit.curate.coverage import k_center, nearest_to_mean
from sftkit.curate.facility_location import facility_location
from sftkit.curate.fast_location import fast_location
import scipy.sparse, threadpoolctl
start, cpu = time.perf_counter(), time.process_time()
if method == "k-center":
    ranking = k_center(vectors, nearest_to_mean(vectors))
else:
    ranking = (fast_location if method == "fast" else facility_location)(vectors)
picks = [row for row, _, _ in islice(ranking, size)]
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "picks": picks}))
"""

APRICOT = """
import json, resource, sys, time
import numpy as np
vectors, size = np.load(sys.argv[1]), int(sys.argv[3])
from apricot import FacilityLocationSelection
warm = np.maximum(vectors[:200] @ vectors[:200].T, 0).astype(np.float64)
FacilityLocationSelection(5, metric="precomputed", optimizer="lazy").fit(warm)  # numba compiles
start, cpu = time.perf_counter(), time.process_time()
similarities = np.maximum(vectors @ vectors.T, 0).astype(np.float64)
chosen = FacilityLocationSelection(size, metric="precomputed", optimizer="lazy").fit(similarities)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
picks = [int(row) for row in chosen.ranking]
print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "picks": picks}))
"""


SUBMODLIB = """
import json, resource, sys, time
import numpy as np
vectors, size = np.load(sys.argv[1]), int(sys.argv[3])
from submodlib import FacilityLocationFunction
start, cpu = time.perf_counter(), time.process_time()
similarities = np.maximum(vectors @ vectors.T, 0)
function = FacilityLocationFunction(n=len(vectors), mode="dense", sijs=similarities, separate_rep=False)
chosen = function.maximize(budget=size, optimizer="LazyGreedy", show_progress=False)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
picks = [int(row) for row, _ in chosen]
print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "picks": picks}))
"""


def drawn(num_rows: int, dimensions: int = 384) -> np.ndarray:
    """Return unit vectors around 500 centres, as texts on 500 topics lie: cosines about .5 within one, about 0 between."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(500, dimensions))
    vectors = centers[random.integers(500, size=num_rows)] + random.normal(size=(num_rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def kinds(num_rows: int, dimensions: int = 384) -> Iterator[tuple[str, np.ndarray]]:
    """Yield rows around centres, rows anywhere, and a few rows again and again by Zipf's law, half of them exactly."""
    random = np.random.default_rng(1)
    share = 1 / np.arange(1, num_rows // 4 + 1)
    repeated = random.normal(size=(num_rows // 4, dimensions))[random.choice(num_rows // 4, size=num_rows, p=share / share.sum())]
    repeated += (random.random((num_rows, 1)) < 0.5) * 0.05 * random.normal(size=(num_rows, dimensions))
    yield "around 500 centres", drawn(num_rows)
    yield "repeated", unit_vectors(repeated)
    yield "anywhere", unit_vectors(random.normal(size=(num_rows, dimensions)))


def compare_values(file: Path | None, num_rows: int) -> None:
    """Print the value of fast facility location as a share of that of exact, for budgets of 1, 3 and 10 % of the rows."""
    for name, vectors in [("of the file", np.load(file)[:num_rows])] if file else kinds(num_rows):
        most = len(vectors) // 10
        exact, fast = ([row for row, _, _ in islice(rank(vectors), most)] for rank in (facility_location, fast_location))
        shares = {size: value(vectors, fast[:size]) / value(vectors, exact[:size]) for size in (most // 10, 3 * most // 10, most)}
        print(f"rows {name}, {len(vectors):,}:", ", ".join(f"k {size:,} {share:.4f}" for size, share in shares.items()), flush=True)


def value(vectors: np.ndarray, picks: list[int]) -> float:
    """Return how well the picks stand for all rows."""
    tiles = (vectors[start : start + 2048] @ vectors[picks].T for start in range(0, len(vectors), 2048))
    return float(sum(np.maximum(tile.max(axis=1), 0).sum(dtype=np.float64) for tile in tiles))


def measure(variants: dict[str, tuple[str, str, str]], file: Path, size: int, repeats: int) -> None:
    """Run every variant (interpreter, program, method) in turn; print medians."""
    results: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, (python, program, method) in variants.items():
            done = subprocess.run([python, "-c", program, str(file), method, str(size)], capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1]
                if not number:
                    print(f"{name}: {'skipped, not installed' if why.startswith('ModuleNotFoundError') else f'failed: {why}'}", flush=True)
                continue
            results[name].append(json.loads(done.stdout))
    vectors = np.load(file)
    for name, found in results.items():
        if found:
            seconds, cpu, mb = (statistics.median(each[key] for each in found) for key in ("seconds", "cpu", "mb"))
            least, most = (choose(each["seconds"] for each in found) for choose in (min, max))
            print(
                f"{name:34} n {len(vectors):>7,} d {vectors.shape[1]} k {size:>6,}: {seconds:7.2f} s ({least:.2f} to {most:.2f}, "
                f"cpu {cpu:.2f})  {mb:7,.0f} MB  "
                f"value {value(vectors, found[0]['picks']):,.3f}  ({len(found)} runs)",
                flush=True,
            )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--center-rows", type=int, default=100_000)
    parser.add_argument("--only", choices=("location", "value", "center", "growth"))
    options = parser.parse_args()
    location = {
        "facility location, exact": (sys.executable, OURS, "facility-location"),
        "facility location, fast": (sys.executable, OURS, "fast"),
    }
    peers = {"apricot, lazy": (options.peers, APRICOT, ""), "submodlib, lazy": (options.peers, SUBMODLIB, "")}
    beside = {**location, **(peers if options.peers else {})}
    center = {"k-center": (sys.executable, OURS, "k-center")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"
        if options.only in (None, "location"):
            np.save(file, np.load(options.vectors)[: options.rows] if options.vectors else drawn(options.rows))
            measure(beside, file, options.rows // 10, options.repeats)
        if options.only == "value":
            compare_values(options.vectors, options.rows)
        if options.only in (None, "center"):
            np.save(file, drawn(options.center_rows))
            measure(center, file, options.center_rows // 10, 1)
        if options.only in (None, "growth"):
            quick = {name: each for name, each in location.items() if not name.endswith("exact")}  # which takes time as the square of n
            for rows in (50_000, 100_000, 200_000):
                np.save(file, drawn(rows))
                measure({**quick, **center}, file, 500, 1)


if __name__ == "__main__":
    main()
