"""Tokens per second of distillation with vLLM, every answer durable, against vLLM given all requests at once and storing nothing.

    python benchmarks/distill_throughput.py MODEL PROMPTS [-k 4] [--limit 1000] [--max-new-tokens 256] [--tune 30] [--out FILE]

Each variant opens one engine, warms it up, and is measured three times with another seed each; medians and their ratios come last.

    raw          every request is added, then vLLM steps until all are done, as `LLM.generate` does
    raw-seeds    the same with the seed that sftkit gives each sample
    chunks       the same in blocking chunks of 512 requests, as the peers feed it
    inside       `distill` into a run folder, the engine in this process
    sftkit       `distill` as the command runs it: the engine in a process of its own, which is started again when it dies
    tuned        the same with what `--tune SECONDS` (or `sftkit curate tune` before) found the fastest

Start-up is told apart. The share of time that the card was busy is nvidia-smi's, sampled twice a second, where that is there.
`--long-tailed` lets every eighth answer take eight times --max-new-tokens. `--random` takes the config and tokenizer of MODEL with
random weights. `--engine transformers --variants inside,sftkit,tuned` runs without a GPU.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.core.engines.tuning import tuned
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import Wanted, distillation, wanted_sample
from sftkit.curate.estimate import tune_teacher

VARIANTS = ("raw", "raw-seeds", "chunks", "inside", "sftkit", "tuned")
CHUNK = 512


def raw(engine: Any, wanted: list[Wanted], *, seeded: bool, chunk: int | None = None) -> tuple[int, float]:
    """Return tokens and seconds of vLLM itself."""
    inner, start, tokens = engine._engine, time.perf_counter(), 0
    for first in range(0, len(wanted), chunk or len(wanted)):
        for number, each in enumerate(wanted[first : first + (chunk or len(wanted))]):
            params = engine._params(each.sampling, **({"seed": each.seed} if seeded else {}), logprobs=0)
            inner.add_request(f"raw-{start}-{first + number}", {"type": "token", "prompt_token_ids": list(each.prompt.ids)}, params)
        while inner.has_unfinished_requests():
            tokens += sum(len(each.outputs[0].token_ids) for each in inner.step() if each.finished)
    return tokens, time.perf_counter() - start


@contextmanager
def busy_share(found: list[float]) -> Iterator[None]:
    """Append the share of time that the first card was busy, in percent, while the block runs."""
    if shutil.which("nvidia-smi") is None:
        yield
        return
    ended, samples = threading.Event(), []
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]

    def watch() -> None:
        while not ended.wait(0.5):
            samples.append(float(subprocess.run(query, capture_output=True, text=True, check=True).stdout))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()
    if samples:
        found.append(statistics.mean(samples))


def random_model(source: Path, folder: Path) -> Path:
    """Write a model with the config and tokenizer of `source` and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def lengthened(wanted: list[Wanted], teacher: Any) -> list[Wanted]:
    """Let every eighth answer be eight times as long."""
    longest = [
        replace(each.sampling, max_new_tokens=each.sampling.max_new_tokens * (1 if place % 8 else 8)) for place, each in enumerate(wanted)
    ]
    return [wanted_sample(teacher, each.prompt, each.index, sampling) for each, sampling in zip(wanted, longest, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tune", type=float, help="seconds of each measurement")
    parser.add_argument("--long-tailed", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", default="distill_throughput.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = str(random_model(Path(given.model), Path(scratch) / "model")) if given.random else given.model
        plain = EngineConfig(engine=given.engine)
        base = DistillConfig(teacher=model, k=given.k, limit=given.limit, max_new_tokens=given.max_new_tokens, engine=plain)
        if given.tune:
            print("tuning", flush=True)
            tune_teacher(given.prompts, base, seconds=given.tune, tell=lambda trial: print(f"  {trial}", flush=True))
        medians: dict[str, float] = {}
        for variant in given.variants.split(","):
            with distillation(given.prompts, Path(scratch) / f"look-{variant}", base) as work:
                identity = work.teacher.identity
            config = {"sftkit": replace(plain, replicas=1), "tuned": tuned(plain, identity)}.get(variant, plain)
            if variant == "tuned" and config.replicas is None:
                config = replace(config, replicas=1)
            start = time.perf_counter()
            with closing(open_engine(model, config)) as engine:
                started, rates, busy = time.perf_counter() - start, [], []
                for repetition in range(given.repetitions + 1):  # the first warms up and is not counted
                    with distillation(given.prompts, Path(scratch) / f"{variant}-{repetition}", replace(base, seed=repetition)) as work:
                        work.teacher._engine = engine
                        wanted = lengthened(work.wanted, work.teacher) if given.long_tailed else work.wanted
                        share: list[float] = []
                        with busy_share(share):
                            if variant in ("raw", "raw-seeds", "chunks"):
                                tokens, seconds = raw(engine, wanted, seeded=variant != "raw", chunk=CHUNK if variant == "chunks" else None)
                            else:
                                work.wanted = wanted
                                _, tokens, seconds = work.generate(wanted)
                        work.teacher._engine = None  # it is used again
                    if repetition:
                        rates.append(tokens / seconds)
                        busy += share
                        with open(given.out, "a", encoding="utf-8") as file:
                            row = {"variant": variant, "tokens": tokens, "seconds": round(seconds, 3), "start": round(started, 1)}
                            file.write(json.dumps({**row, "busy": share[0] if share else None}) + "\n")
            medians[variant] = statistics.median(rates)
            told = f", card busy {statistics.mean(busy):.0f} %" if busy else ""
            print(f"{variant:10} {medians[variant]:10,.0f} tokens/s (start {started:.0f} s{told})", flush=True)
        for over in ("raw", "raw-seeds", "chunks", "sftkit"):
            for variant in ("inside", "sftkit", "tuned"):
                if over in medians and variant in medians and over != variant:
                    print(f"{variant} / {over}: {medians[variant] / medians[over]:.3f}")


if __name__ == "__main__":
    main()
