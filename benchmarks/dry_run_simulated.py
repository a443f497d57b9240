"""What a dry run's look at the pace says of engines that are simulated, so that what the rest takes is known: cold, uneven, in waves.

    python benchmarks/dry_run_simulated.py [--draws 3]        no model, 2 min

An engine has slots for so many answers at once; a step takes a time of its own, one for each sequence, and one for each prompt that it
reads, and is now slower, now faster for 60 steps. The first full batch of the first process takes `cold` seconds more; of these the
process of the run after it pays a share. Its pace is looked at as a dry run does, on half of the samples at most, and the rest is then
made. "by the rate": all that the look took, for as many tokens as are left.
"""

import argparse
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, product
from unittest import mock

import numpy as np
from sftkit.core.engines.base import Completion
from sftkit.curate import pace as pace_module
from sftkit.curate.pace import WITHIN, Pace

PER_STEP, PER_TOKEN, PER_PROMPT = 0.018, 1.1e-5, 1e-4  # seconds
COLD = 4.0
SHARES = 0.0, 0.5, 1.0
EVEN_FOR = 60  # steps
LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "equal": lambda draw: 128,
    "nearly all cut": lambda draw: 128 if draw.random() < 0.9 else draw.randint(20, 127),
    "uniform": lambda draw: draw.randint(20, 236),
    "exponential, cut": lambda draw: min(512, 1 + int(draw.expovariate(1 / 150))),
    "every eighth long": lambda draw: 512 if draw.random() < 1 / 8 else 64,
}


class Engine:
    """Answers requests, which are lengths, on a clock of its own; twice as many as there are slots are in flight."""

    def __init__(self, slots: int, *, cold: float, uneven: float, seed: int) -> None:
        self.now, self._slots, self._cold, self._uneven, self._draw = 0.0, slots, cold, uneven, random.Random(seed)

    def generate(self, requests: Iterator[tuple[str, int]]) -> Iterator[tuple[Completion, int]]:
        """Yield each answer, and how many are under way."""
        queue, running = deque[tuple[str, int]](), list[tuple[str, int]]()
        left, steps, speed = np.zeros(0, dtype=int), 0, 1.0
        self.now += self._cold
        while True:
            queue.extend(islice(requests, 2 * self._slots - len(queue) - len(running)))
            new = [queue.popleft() for _ in range(min(len(queue), self._slots - len(running)))]
            running += new
            left = np.concatenate([left, [length for _, length in new]]).astype(int)
            if not running:
                return
            self.now += PER_PROMPT * len(new)
            for _ in range(left.min()):
                if steps % EVEN_FOR == 0:
                    speed = max(0.5, 1 + self._draw.gauss(0, self._uneven))
                steps += 1
                self.now += speed * (PER_STEP + PER_TOKEN * len(running))
            left -= left.min()
            ended, running = (
                [each for each, more in zip(running, left, strict=True) if not more],
                [each for each, more in zip(running, left, strict=True) if more],
            )
            left = left[left > 0]
            for number, (key, length) in enumerate(ended, 1):
                yield Completion(key=key, num_tokens=length), len(running) + len(queue) + len(ended) - number


def look(wanted: list[tuple[str, int]], engine: Engine) -> tuple[Pace, list[str]]:
    """Look at the pace of an engine as a dry run does; return it, and what was asked."""
    asked: list[str] = []
    enough = False

    def ask() -> Iterator[tuple[str, int]]:
        for each in wanted:
            if enough:
                return
            asked.append(each[0])
            yield each

    with mock.patch.object(pace_module.time, "monotonic", side_effect=lambda: engine.now):
        pace = Pace(begin=0.0)
        for completion, under_way in engine.generate(ask()):
            enough = pace(completion, under_way) or enough
    return pace, asked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--uneven", type=float, default=0.12)
    parser.add_argument("--each", action="store_true", help="a line for each case")
    given = parser.parse_args()
    rows = []
    for share, slots, (name, length), samples in product(SHARES, (64, 400, 1024), LENGTHS.items(), (1200, 3000, 5500, 10000, 30000)):
        for seed in range(given.draws):
            draw = random.Random(seed)
            wanted = [(str(number), length(draw)) for number in range(samples)]
            pace, asked = look(wanted[: samples // 2], Engine(slots, cold=COLD, uneven=given.uneven, seed=seed))
            rest = wanted[len(asked) :]
            lengths = random.Random(0).choices(list(pace.tokens.values()), k=len(rest))
            said = pace.forecast(asked, lengths, 0.0, in_batches=False)
            run = Engine(slots, cold=share * COLD, uneven=given.uneven, seed=1000 + seed)
            for _ in run.generate(iter(rest)):
                pass
            plain = pace.times[-1] * sum(lengths) / sum(pace.tokens.values())
            least, most = said.least * max(0.0, 1 - said.unlike), said.most * (1 + said.unlike)
            rows.append(
                {
                    "share of the cold beginning": share,
                    "slots": slots,
                    "lengths": name,
                    "samples": samples,
                    "turns looked at": round(len(asked) / slots, 1),
                    "seconds": round(run.now, 1),
                    "off by %": round(100 * (said.seconds / run.now - 1), 1),
                    "by the rate off by %": round(100 * (plain / run.now - 1), 1),
                    "said between": [round(least, 1), round(most, 1)],
                    "within": bool(least <= run.now <= most),
                    "vague": bool(least < (1 - WITHIN) * said.seconds or most > (1 + WITHIN) * said.seconds),
                }
            )
            if given.each:
                print(json.dumps(rows[-1]), flush=True)
    for share in SHARES:
        for turns, some in (
            ("fewer than 3 turns looked at", [row for row in rows if row["turns looked at"] < 3]),
            ("3 turns and more", [row for row in rows if row["turns looked at"] >= 3]),
        ):
            these = [row for row in some if row["share of the cold beginning"] == share]
            clear = [row for row in these if not row["vague"]]
            told = {"share of the cold beginning": share, "of": turns, "cases": len(these)}
            told |= {"within 15 %": sum(abs(row["off by %"]) <= 15 for row in these)}
            told |= {"by the rate within 15 %": sum(abs(row["by the rate off by %"]) <= 15 for row in these)}
            told |= {"in what was said": sum(row["within"] for row in these), "not said to be vague": len(clear)}
            print(json.dumps({**told, "of these within 15 %": sum(abs(row["off by %"]) <= 15 for row in clear)}))


if __name__ == "__main__":
    main()
