"""Attention within rows put end to end, forward and back, on one GPU: our kernels beside PyTorch's for variable lengths and flex_attention.

    python benchmarks/attention.py [--lengths FILE] [--out FILE]     the table, within 90 seconds
    python benchmarks/attention.py --tune [--size 64]                the best ways to cut each kernel, within 150 seconds

Lengths are drawn like those of chats (lognormal, mean 106, at most 980, a fixed seed), or read from FILE, a JSON list of them; and all
alike, from 512 to 4,096 tokens, to see where the lines cross. Times are milliseconds, the median of 20 runs by the card's own clock, with
the card held up before each so that it never waits for its host. Queries, keys and values lie as projections make them, tokens first:
what PyTorch's kernel would copy of another layout is not counted against it. Each case that fails is told and the rest goes on; a line of
JSON per case goes to FILE as soon as it is measured. What is left out when time is over is said.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from row_blocks import blocks_of_rows
from sftkit.train import row_attention
from sftkit.train.attention import _one_row, _varlen
from sftkit.train.row_attention import Tiles, attend_rows, tiles_for
from torch.nn.attention.flex_attention import flex_attention

SHAPES = {"135m": (9, 3, 64, 65536), "0.5b": (14, 2, 64, 32768), "0.6b": (16, 8, 128, 32768), "1.5b": (12, 2, 128, 16384)}
ALIKE = (512, 1024, 2048, 4096)
REPEATS, HELD = 20, 4_000_000  # runs of a median; clock ticks that the card is held up for, two milliseconds
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    """Measure, as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--out", type=Path, default=Path("attention.jsonl"))
    parser.add_argument("--shapes", help="of " + ", ".join(SHAPES) + "; to tune, 135m and 0.6b")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--size", type=int, help="tune for heads of this size alone")
    parser.add_argument("--seconds", type=float, help="stop then; 90, or 150 to tune")
    asked = parser.parse_args()
    end = time.monotonic() + (asked.seconds or (145 if asked.tune else 85))
    names = asked.shapes.split(",") if asked.shapes else ["135m", "0.6b"] if asked.tune else list(SHAPES)
    shapes = {name: SHAPES[name] for name in names if asked.size in (None, SHAPES[name][2])}
    told = json.loads(asked.lengths.read_text()) if asked.lengths else None
    found = []
    for each in tuned(shapes, told, end) if asked.tune else compared(shapes, told, end):
        found.append(each)
        with asked.out.open("a") as file:
            file.write(json.dumps(each) + "\n")
        print(json.dumps(each), flush=True)
    print("\n".join(line_of(each) for each in (best_of(found) if asked.tune else found)))


def compared(shapes: dict[str, Any], told: list[int] | None, end: float) -> Iterator[dict[str, Any]]:
    """Measure every case by every way: flex_attention last, which takes longest to compile."""
    cases = [(name, alike) for name in shapes for alike in (0, *ALIKE)]
    for way in ("varlen", "ours", "flex"):
        for name, alike in cases:
            facts: dict[str, Any] = {"shape": name, "lengths": alike or "chats", "way": way}
            if time.monotonic() > end:
                yield facts | {"error": "left out: time is over"}
                continue
            heads, groups, size, total = shapes[name]
            lengths = rows_of(total, alike, told)
            inputs, grad = made(heads, groups, size, total)
            yield facts | guarded(lambda: measured(way, inputs, grad, lengths, check=not alike))  # noqa: B023  called at once


def measured(way: str, inputs: Inputs, grad: torch.Tensor, lengths: list[int], check: bool) -> dict[str, Any]:
    """Return milliseconds of one way, forward and back, and how far it is from float32."""
    attend = WAYS[way](inputs, lengths)
    out = attend()
    facts: dict[str, Any] = {"rows": len(lengths), "longest": max(lengths)}
    if check:
        places = list(accumulate(lengths, initial=0))
        plain = [each.detach().float().requires_grad_() for each in inputs]
        cuts = [[each[:, :, a:b] for each in plain] for a, b in pairwise(places)]
        wanted = torch.cat([_one_row(q, k, v, None, None, None) for q, k, v in cuts], dim=2).transpose(1, 2)
        expected = [wanted, *torch.autograd.grad(wanted, plain, grad.float())]
        found = [out, *torch.autograd.grad(out, inputs, grad, retain_graph=True)]
        pairs = zip(found, expected, strict=True)
        facts["off"] = [round(float((one.float() - other).norm() / other.norm()), 5) for one, other in pairs]
    back = milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    forward = milliseconds(attend)
    return facts | {"forward": forward, "backward": back, "both": round(forward + back, 4)}


def milliseconds(work: Callable[[], Any]) -> float:
    """Return the median of what a piece of work takes on the card."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HELD)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return round(statistics.median(times), 4)


def by_varlen(inputs: Inputs, lengths: list[int]) -> Callable[[], torch.Tensor]:
    """Attend as `packed_attention` does where rows are long."""
    bounds, longest = bounds_of(lengths), max(lengths)

    def attend() -> torch.Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in inputs)
        return _varlen(query, key, value, bounds, longest, None, None)[None]

    return attend


def by_ours(inputs: Inputs, lengths: list[int]) -> Callable[[], torch.Tensor]:
    """Attend by tiles of the pack."""
    bounds, scale = bounds_of(lengths), inputs[0].shape[-1] ** -0.5
    return lambda: attend_rows(*inputs, bounds, scale)


def by_flex(inputs: Inputs, lengths: list[int]) -> Callable[[], torch.Tensor]:
    """Attend by flex_attention, compiled, with the blocks of 128 keys that each block of queries needs."""
    mask = blocks_of_rows(bounds_of(lengths), sum(lengths))
    return lambda: compiled_flex(*inputs, block_mask=mask, enable_gqa=True).transpose(1, 2)


compiled_flex: Any = torch.compile(flex_attention, dynamic=False)
WAYS = {"varlen": by_varlen, "ours": by_ours, "flex": by_flex}


def tuned(shapes: dict[str, Any], told: list[int] | None, end: float) -> Iterator[dict[str, Any]]:
    """Measure ways to cut each kernel, on rows like those of chats: forward by itself, the gradients together, one of them changed."""
    both = [(128, 64), (128, 32), (64, 64), (64, 32), (32, 64), (32, 32), (64, 128), (128, 128)]
    ways = [Tiles(*cut, warps, stages) for stages, cut, warps in product((2, 3, 1), both, (4, 8))]
    kernels = ("forward", "queries' gradient", "keys' gradient")
    for name, place in product(shapes, range(3)):
        heads, groups, size, total = shapes[name]
        inputs, grad = made(heads, groups, size, total)
        bounds, scale = bounds_of(rows_of(total, 0, told)), size**-0.5
        own, largest = tiles_for(size), next(each for each in row_attention.TILES if size <= each)
        share = time.monotonic() + (end - time.monotonic()) / (3 * len(shapes) - 3 * list(shapes).index(name) - place)
        for way in sorted(ways, key=lambda each: each != own[place]):  # the one in use comes first
            facts = {"shape": name, "kernel": kernels[place], "tiles": list(way), "own": way == own[place]}
            if not sensible(way, size, place):
                continue
            if time.monotonic() > share:
                yield facts | {"error": "left out, with those after it: time is over"}
                break
            row_attention.TILES[largest] = tuple(way if at == place else each for at, each in enumerate(own))
            yield facts | guarded(lambda: cut_time(inputs, grad, bounds, scale, place > 0))  # noqa: B023  called at once
        row_attention.TILES[largest] = own


def sensible(way: Tiles, size: int, place: int) -> bool:
    """Say whether registers could hold what a way to cut a kernel keeps in them, a thread's share of 255."""
    rows = way.queries if place < 2 else way.keys
    kept = rows * size * (2 if place == 2 else 1) + way.queries * way.keys * (1 if place == 0 else 2)
    return kept / (32 * way.warps) <= 220 and max(way.queries, way.keys) >= 8 * way.warps and not (way.warps == 8 and kept < 8192)


def cut_time(inputs: Inputs, grad: torch.Tensor, bounds: torch.Tensor, scale: float, back: bool) -> dict[str, Any]:
    """Return milliseconds of the forward kernels, or of those of the gradients."""
    with torch.no_grad():
        out, sums, places = row_attention._attend(*inputs, bounds, scale, 0)
        if not back:
            return {"ms": milliseconds(lambda: row_attention._attend(*inputs, bounds, scale, 0))}
        return {"ms": milliseconds(lambda: row_attention._attend_backward(grad, *inputs, out, sums, places, scale, 0))}


def best_of(found: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """Return the fastest ways to cut each kernel, and the one in use."""
    kept = []
    for case in dict.fromkeys((each["shape"], each["kernel"]) for each in found):
        ours = sorted((each for each in found if (each["shape"], each["kernel"]) == case and "ms" in each), key=lambda each: each["ms"])
        kept += ours[:count] + [each for each in ours[count:] if each["own"]]
    return kept


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a case gives, or what went wrong with it."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  one case's fault is told, and the others are still measured
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def rows_of(total: int, alike: int, told: list[int] | None) -> list[int]:
    """Return lengths that fill a pack: alike, as told, or drawn."""
    if alike:
        drawn = [alike] * (total // alike)
    elif told:
        drawn = [told[place % len(told)] for place in range(total // min(told) + 1)]
    else:
        drawn = np.clip(np.random.default_rng(0).lognormal(np.log(106) - 0.32, 0.8, total), 8, 980).astype(int).tolist()
    ends = list(accumulate(drawn))
    count = sum(end <= total for end in ends)
    left = total - (ends[count - 1] if count else 0)
    return drawn[:count] + ([left] if left else [])


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cuda")


def made(heads: int, groups: int, size: int, total: int) -> tuple[Inputs, torch.Tensor]:
    """Return query, key and value, and the gradient of the output."""
    torch.manual_seed(0)
    shapes = (heads, groups, groups, heads)
    query, key, value, grad = (torch.randn(1, total, each, size, device="cuda", dtype=torch.bfloat16) for each in shapes)
    return tuple(each.transpose(1, 2).requires_grad_() for each in (query, key, value)), grad


def line_of(found: dict[str, Any]) -> str:
    """Write a result as a line of the table."""
    case = f"{found['shape']:6} {found.get('kernel', found.get('lengths'))!s:18}"
    if "error" in found:
        return f"{case} {found.get('way', found.get('tiles'))!s:20} {found['error']}"
    if "ms" in found:
        return f"{case} {found['tiles']!s:20} {found['ms']:8.3f} ms{'  in use' if found['own'] else ''}"
    off = f"  off {max(found['off']):.2%}" if "off" in found else ""
    return f"{case} {found['way']:8} {found['forward']:8.3f} + {found['backward']:8.3f} = {found['both']:8.3f} ms{off}"


if __name__ == "__main__":
    main()
