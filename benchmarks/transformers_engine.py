"""Tokens per second of the embedded engine against `generate` of transformers: the same prompts, settings and batches.

    python benchmarks/transformers_engine.py [MODEL]      (default smollm2-135m-instruct, from the catalogue)
    python benchmarks/transformers_engine.py --prompts 252 --large     on a GPU: its own batches, and those of 16,384 tokens

Both sample at temperature 0.8, top-p 0.95, at most 160 new tokens, in batches under 16,384 tokens, longest prompts first.
`generate` runs each batch until its last row ends; its tokens are counted up to each row's end. Three rounds in turn, medians.
With --large the engine's batches are as large as it makes them by itself, and `generate` is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files

import torch
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.engines.transformers_engine import TransformersEngine
from sftkit.core.formats import read_examples

SAMPLING = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=160)


def ours(engine: TransformersEngine, requests: list[Request]) -> tuple[int, float, float]:
    """Return tokens, seconds, and the mean seconds after which an answer was there."""
    start, tokens, waited = time.perf_counter(), 0, 0.0
    for completion in engine.generate(requests):
        tokens += completion.num_tokens
        waited += time.perf_counter() - start
    return tokens, time.perf_counter() - start, waited / len(requests)


def theirs(engine: TransformersEngine, requests: list[Request]) -> tuple[int, float, float]:
    """Return the same for `generate`, whose answers are there when their batch ends."""
    assert engine.chat
    device, start, tokens, waited = engine.model.device, time.perf_counter(), 0, 0.0
    left = sorted(requests, key=lambda each: len(each.prompt_ids), reverse=True)
    while left:
        size = 16_384 // (len(left[0].prompt_ids) + SAMPLING.max_new_tokens)
        batch, left = left[:size], left[size:]
        longest = max(len(each.prompt_ids) for each in batch)
        ids = torch.tensor([[engine.chat.pad_id] * (longest - len(each.prompt_ids)) + list(each.prompt_ids) for each in batch])
        mask = torch.tensor([[0] * (longest - len(each.prompt_ids)) + [1] * len(each.prompt_ids) for each in batch])
        out = engine.model.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=True, temperature=SAMPLING.temperature, top_p=SAMPLING.top_p, top_k=0,
            max_new_tokens=SAMPLING.max_new_tokens, eos_token_id=list(engine.chat.stop_ids), pad_token_id=engine.chat.pad_id,
        )  # fmt: skip
        for row in out[:, longest:].tolist():
            stops = [place for place, token in enumerate(row) if token in engine.chat.stop_ids]
            tokens += stops[0] + 1 if stops else len(row)
        waited += (time.perf_counter() - start) * len(batch)
    return tokens, time.perf_counter() - start, waited / len(requests)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--large", action="store_true", help="the engine's batches by itself beside those of 16,384 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    engine = open_engine(given.model, EngineConfig(engine="transformers", batch_tokens=16_384))
    assert isinstance(engine, TransformersEngine)
    assert engine.chat
    examples = read_examples(str(files("sftkit.pipelines") / "data" / "self_instruct_user_oriented.jsonl"))[: given.prompts]
    requests = [
        Request(key=each.id, prompt_ids=tuple(engine.chat.prompt(each.messages)), messages=each.messages, sampling=SAMPLING, seed=number)
        for number, each in enumerate(examples)
    ]
    print(f"{given.model}, {engine.model.dtype}, {engine.model.device}, {torch.get_num_threads()} threads, {len(requests)} prompts")
    ways: dict[str, Callable[[], tuple[int, float, float]]]
    if given.large:
        small = open_engine(given.model, EngineConfig(engine="transformers", batch_tokens=16_383))  # a number that was given stays
        assert isinstance(small, TransformersEngine)
        ways = {"small": partial(ours, small, requests), "sftkit": partial(ours, engine, requests)}
    else:
        ways = {"generate": partial(theirs, engine, requests), "sftkit": partial(ours, engine, requests)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, run in ways.items():
            tokens, seconds, waited = run()
            rates[name].append(tokens / seconds)
            print(
                f"{name:9} {tokens:7,} tokens  {seconds:6.1f} s  {tokens / seconds:7.1f} tokens/s  answers wait {waited:5.1f} s", flush=True
            )
    other = next(iter(ways))
    print(f"median ratio sftkit / {other}: {statistics.median(rates['sftkit']) / statistics.median(rates[other]):.2f}")


if __name__ == "__main__":
    main()
