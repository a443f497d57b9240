"""Tokens per second of distillation with vLLM, every answer durable, against vLLM given all requests at once and storing nothing.

    python benchmarks/distill_throughput.py MODEL PROMPTS [-k 4] [--limit 1000] [--max-new-tokens 256] [--out FILE]

One engine, three repetitions of each in turn, the median ratio last. `raw` adds every request and steps until all are done, as
`LLM.generate` does; `raw, a seed each` does the same with the seed that sftkit gives each sample; `sftkit` is `distill` into a run
folder. `--random FOLDER` takes the config and tokenizer of FOLDER with random weights, for machines without the model.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distillation


def raw(engine: Any, wanted: list[Any], config: DistillConfig, *, seeded: bool) -> tuple[int, float]:
    """Return tokens and seconds of vLLM itself."""
    inner, start, tokens = engine._engine, time.perf_counter(), 0
    for number, each in enumerate(wanted):
        params = engine._params(config.sampling, **({"seed": each.seed} if seeded else {}), logprobs=0)
        inner.add_request(f"raw-{start}-{number}", {"type": "token", "prompt_token_ids": list(each.prompt.ids)}, params)
    while inner.has_unfinished_requests():
        tokens += sum(len(each.outputs[0].token_ids) for each in inner.step() if each.finished)
    return tokens, time.perf_counter() - start


def random_model(source: Path, folder: Path) -> Path:
    """Write a model with the config and tokenizer of `source` and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", default="distill_throughput.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = str(random_model(Path(given.model), Path(scratch) / "model")) if given.random else given.model
        start = time.perf_counter()
        engine: Any = open_engine(model, EngineConfig(engine="vllm"))
        print(f"engine start: {time.perf_counter() - start:.0f} s; at most {engine._in_flight // 2} sequences at once", flush=True)
        rates: dict[str, list[float]] = {}
        for repetition in range(given.repetitions + 1):  # the first warms up and is not counted
            config = DistillConfig(
                teacher=model,
                k=given.k,
                limit=given.limit,
                max_new_tokens=given.max_new_tokens,
                seed=repetition,
                engine=EngineConfig(engine="vllm"),
            )
            for name in ("raw", "raw, a seed each", "sftkit"):
                with distillation(given.prompts, Path(scratch) / f"run-{repetition}-{name[:9]}-{len(rates)}", config) as work:
                    work.teacher._engine = engine
                    if name == "sftkit":
                        _, tokens, seconds = work.generate(work.missing())
                    else:
                        tokens, seconds = raw(engine, work.wanted, config, seeded="seed" in name)
                    work.teacher._engine = None  # it is used again
                print(f"{name:18} {tokens:9,} tokens {seconds:6.1f} s {tokens / seconds:10,.0f} tokens/s", flush=True)
                if repetition:
                    rates.setdefault(name, []).append(tokens / seconds)
                    with open(given.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"variant": name, "tokens": tokens, "seconds": round(seconds, 3)}) + "\n")
        medians = {name: statistics.median(each) for name, each in rates.items()}
        for name in ("raw", "raw, a seed each"):
            print(f"sftkit / {name}: {medians['sftkit'] / medians[name]:.3f}")
        engine.close()


if __name__ == "__main__":
    main()
