"""Seconds and memory of k-center, facility location and duplicates by meaning on a GPU, a million rows of 384 dimensions.

    python benchmarks/selection_on_gpu.py [--rows 1000000] [--picks 10000] [--check 10000] [--out FILE]

Rows are drawn around 5,000 centres; a tenth of them are near another row. Before anything is timed, k-center and the duplicates of the
first CHECK rows are computed with and without the GPU, which must agree to the last pick, and the value of stochastic facility location
is held against exact greedy's. The baseline of k-center is the loop as one writes it, products and minima on the same device and no
witnesses; that of duplicates the same search without a GPU, on the first tenth of the rows. A line of JSON per measurement goes to FILE
at once; a stage that fails says so, and the next one runs. Without a GPU the script runs on the CPU: give few rows then.
The bars, on one H200: k-center or facility location at most 60 s and 8 GB, duplicates at most 30 s.
"""

import argparse
import json
import resource
import time
import traceback
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
NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
THRESHOLD = 0.95
PART = 50_000  # rows that are drawn at a time


def draw_rows(count: int) -> Vectors:
    """Return unit vectors, drawn on the device."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=draw)

    centres = normal(5000, 384)
    vectors = np.empty((count, 384), dtype=np.float32)
    for start in range(0, count, PART):
        size = min(PART, count - start)
        part = centres[torch.randint(5000, (size,), device=DEVICE, generator=draw)] + normal(size, 384)
        copies, originals = torch.randperm(size, device=DEVICE, generator=draw)[: size // 10 * 2].view(2, -1)
        part[copies] = part[originals] + 0.1 * normal(len(copies), 384)
        vectors[start : start + size] = torch.nn.functional.normalize(part).cpu().numpy()
    return vectors


def plain_k_center(vectors: Vectors, first: int, picks: int) -> list[int]:
    """Return the picks of k-center in float32, as they round."""
    table = torch.from_numpy(vectors).to(DEVICE)
    nearest, found = table @ table[first], [first]
    while len(found) < picks:
        found.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, table @ table[found[-1]])
    return found


def agreement(vectors: Vectors) -> dict[str, Any]:
    """Compare what the device gives with what the CPU gives."""
    picks = min(500, len(vectors) // 4)
    same = list(islice(accelerated.k_center(vectors, 0, DEVICE), picks)) == list(islice(k_center(vectors, 0), picks))
    mine, theirs = (cover(vectors, THRESHOLD, range(len(vectors)), device=device) for device in (DEVICE, "cpu"))
    exact = sum(gain for _, gain, _ in islice(facility_location(vectors), picks) if gain)
    few = sum(gain for _, gain, _ in accelerated.stochastic_facility_location(vectors, picks, device=DEVICE) if gain)
    covered = bool((mine[0] == theirs[0]).all() and (mine[1] == theirs[1]).all())
    return {"k_center_same": same, "duplicates_same": covered, "stochastic_of_exact_value": round(few / exact, 4)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--picks", type=int, default=10_000)
    parser.add_argument("--check", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table: list[str] = []

    def stage(name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run and time a stage; write its line of JSON, with what it returns."""
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            told = work()
        except Exception as error:  # noqa: BLE001  the other stages are worth having
            traceback.print_exc()
            told = {"failed": f"{type(error).__name__}: {error}"}
        seconds = round(time.perf_counter() - start, 2)
        gpu = round(torch.cuda.max_memory_allocated() / 1e9, 2) if DEVICE == "cuda" else None
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        line = {"what": name, "rows": options.rows, "device": NAME, "seconds": seconds, "gpu_gb": gpu, "host_gb": host, **told}
        print(json.dumps(line), flush=True)
        table.append(f"{name:34} {seconds:8.1f} s  GPU {gpu} GB  host {host} GB  {told}")
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(line) + "\n")

    start = time.perf_counter()
    vectors = draw_rows(options.rows)
    first = nearest_to_mean(vectors)
    picked: dict[str, list[int]] = {}
    print(f"{len(vectors):,} rows drawn in {time.perf_counter() - start:.1f} s on {NAME}", flush=True)

    def center() -> dict[str, Any]:
        picked["k-center"] = [row for row, _, _ in islice(accelerated.k_center(vectors, first, DEVICE), options.picks)]
        return {"picks": len(picked["k-center"])}

    def plain_center() -> dict[str, Any]:
        few = plain_k_center(vectors, first, options.picks)
        return {"picks": len(few), "as_ours": sum(a == b for a, b in zip(few, picked.get("k-center", []), strict=False))}

    def duplicates() -> dict[str, Any]:
        return {"removed": int((cover(vectors, THRESHOLD, range(len(vectors)), device=DEVICE, block=2048)[0] >= 0).sum())}

    def duplicates_without() -> dict[str, Any]:
        tenth = vectors[: len(vectors) // 10]
        return {"of_rows": len(tenth), "removed": int((cover(tenth, THRESHOLD, range(len(tenth)))[0] >= 0).sum())}

    def location() -> dict[str, Any]:
        ranking = accelerated.stochastic_facility_location(vectors, options.picks, device=DEVICE)
        picked["location"] = [row for row, _, _ in ranking]
        return {"picks": len(picked["location"])}

    def witnesses() -> dict[str, Any]:
        _, cosines = accelerated.nearest(vectors, range(len(vectors)), picked["location"], DEVICE)
        return {"mean_cosine": round(float(cosines.mean()), 4)}

    stage("agreement with the CPU", lambda: {"checked": options.check, **agreement(vectors[: options.check])})
    stage("k-center", center)
    stage("duplicates by meaning", duplicates)
    stage("facility location, stochastic", location)
    stage("witnesses of all rows", witnesses)
    stage("k-center, plain loop", plain_center)
    stage("duplicates, CPU, a tenth", duplicates_without)
    print("\n".join(table))


if __name__ == "__main__":
    main()
