"""Seconds and memory of k-center, facility location and duplicates by meaning on a GPU, a million rows of 384 dimensions.

    python benchmarks/selection_on_gpu.py [--rows 1000000] [--picks 10000] [--check 20000] [--out FILE]

Rows are drawn around 5,000 centres, a tenth of them near another row. Before anything is timed, k-center and the duplicates of the first
CHECK rows are computed with and without the GPU, which must agree to the last pick. A line of JSON per measurement goes to FILE at once.
Without a GPU the script runs on the CPU: give few rows then, to see that it is sound.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sftkit.curate import accelerated
from sftkit.curate.cover import cover
from sftkit.curate.coverage import k_center, nearest_to_mean
from sftkit.curate.facility_location import facility_location
from sftkit.curate.similarity import Vectors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THRESHOLD = 0.95


def draw_rows(count: int) -> Vectors:
    """Return unit vectors, drawn in parts so that no copy in float64 is held."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((5000, 384), dtype=np.float32)
    vectors = np.empty((count, 384), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = vectors[start : start + 50_000]
        part[:] = centres[draw.integers(5000, size=len(part))] + draw.standard_normal(part.shape, dtype=np.float32)
        copies = draw.integers(len(part), size=len(part) // 10)
        part[copies] = part[np.roll(copies, 1)] + 0.1 * draw.standard_normal((len(copies), 384), dtype=np.float32)
        part /= np.linalg.norm(part, axis=1)[:, None]
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--picks", type=int, default=10_000)
    parser.add_argument("--check", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    vectors = draw_rows(options.rows)
    first = nearest_to_mean(vectors)

    def tell(name: str, **facts: Any) -> None:
        line = json.dumps(
            {"what": name, "rows": options.rows, "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", **facts}
        )
        print(line, flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(line + "\n")

    def measure(name: str, work: Callable[[], Any]) -> Any:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        memory = round(torch.cuda.max_memory_allocated() / 1e9, 2) if DEVICE == "cuda" else None
        tell(name, seconds=round(seconds, 1), gpu_gb=memory)
        return result

    part = vectors[: options.check]
    picks = min(500, options.check // 4)
    same = list(islice(accelerated.k_center(part, 0, DEVICE), picks)) == list(islice(k_center(part, 0), picks))
    mine, theirs = (cover(part, THRESHOLD, range(len(part)), device=device) for device in (DEVICE, "cpu"))
    exact = sum(gain for _, gain, _ in islice(facility_location(part), picks // 5) if gain)
    few = sum(gain for _, gain, _ in accelerated.stochastic_facility_location(part, picks // 5, device=DEVICE) if gain)
    covered = bool((mine[0] == theirs[0]).all() and (mine[1] == theirs[1]).all())
    tell("agreement", checked=len(part), k_center=same, cover=covered, stochastic_of_exact_value=round(few / exact, 4))
    measure("k-center", lambda: list(islice(accelerated.k_center(vectors, first, DEVICE), options.picks)))
    removed = measure("cover", lambda: cover(vectors, THRESHOLD, range(len(vectors)), device=DEVICE, block=2048))[0]
    tell("cover removed", count=int((removed >= 0).sum()))
    chosen = measure(
        "facility location, stochastic", lambda: list(accelerated.stochastic_facility_location(vectors, options.picks, device=DEVICE))
    )
    measure("witnesses", lambda: accelerated.nearest(vectors, range(len(vectors)), [row for row, _, _ in chosen], DEVICE))


if __name__ == "__main__":
    main()
