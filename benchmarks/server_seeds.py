"""What a seed for each answer is for: two servers that were started alike are asked the same prompts, with and without.

    python benchmarks/server_seeds.py MODEL PROMPTS [--shape tiny] [--prompts 40] [--concurrency 1,8] [--server-args "..."]

vLLM's random numbers begin with the same seed at every start (its --seed, 0 if none is given). So what a second server says, or the
same one once it is started again, may be what the first one said. Each prompt's samples 0 and 1 are asked of one server, 2 and 3 of
another, as `distill` does with two addresses, or with a larger `-k` later; told is how many of the second server's answers its prompt
had already. On a CPU: --shape tiny --server-args "--enforce-eager --max-num-seqs 8".
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections import defaultdict
from contextlib import closing
from itertools import islice
from pathlib import Path

from server_client import NAME, SHAPES, server, shaped_model
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.openai_engine import open as open_server
from sftkit.core.formats import iterate_examples, split_prompt
from sftkit.core.store import sample_key, sample_seed

SAMPLING = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=32)
EACH = 2  # samples of a prompt from each server


def ask(address: str, prompts: list[str], first: int, concurrency: int, *, seeds: bool) -> dict[str, set[str]]:
    """Return the answers to each prompt: samples from `first` on, from one server."""
    requests = []
    for number, prompt in enumerate(prompts):
        for index in range(first, first + EACH):
            messages = [{"role": "user", "content": prompt}]
            seed = sample_seed(sample_key(prompt=messages, model_identity=NAME, sampling=SAMPLING, index=index))
            requests.append(Request(key=f"{number}/{index}", prompt_ids=(), messages=messages, sampling=SAMPLING, seed=seed))
    found: dict[str, set[str]] = defaultdict(set)
    with closing(open_server(NAME, EngineConfig(base_url=f"{address}/v1", concurrency=concurrency))) as engine:
        if not seeds:
            engine._refused.add("seed")
        for completion in engine.generate(requests):
            assert not completion.error, completion.error
            found[completion.key.partition("/")[0]].add(completion.text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--server-args", default="")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no server behind
    prompts = [split_prompt(each)[0][-1]["content"] for each in islice(iterate_examples(given.file), given.prompts)]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = shaped_model(Path(given.model), given.shape, place / "model") if given.shape else Path(given.model)
        for concurrency in map(int, given.concurrency.split(",")):
            told: dict[bool, list[dict[str, set[str]]]] = {False: [], True: []}
            for first in (0, EACH):  # each server fresh
                with server(model, shlex.split(given.server_args), place / "server.log", 600.0) as address:
                    for seeds in told:
                        told[seeds].append(ask(address, prompts, first, concurrency, seeds=seeds))
            for seeds, (one, other) in told.items():
                again = sum(len(answers & one[prompt]) for prompt, answers in other.items())
                row = {"concurrency": concurrency, "seeds": seeds, "answers": EACH * len(prompts), "said before": again}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
