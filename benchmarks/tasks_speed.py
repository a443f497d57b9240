"""Seconds of `sftkit evaluate tasks` on GSM8K, IFEval, HumanEval and MMLU, whole, its start included, and where they go.

    python benchmarks/tasks_speed.py random=qwen2.5-0.5b:TOKENIZER gemma=MODEL [--mmlu FILE] [--tasks gsm8k,ifeval,humaneval,mmlu]

A model is what a user may write, or a SHAPE (qwen2.5-0.5b, tiny) and a folder with a tokenizer: it gets random weights, which never
stop, so that every answer takes all the tokens it may have: the worst case. FILE has MMLU's questions, which do not come along. The
model runs in vLLM where that and a GPU are, as the command does it. Each stage's seconds are told as it ends: questions, prompts and
keys, start of the engine, answers (with their tokens), probabilities of choices, marks, statistics. Where there is no bubblewrap
HumanEval's answers are generated and its programs not run, and that is said; `--unsafe` runs them all the same. The bar is 6 minutes
for a model of half a billion parameters on one H200. --baseline asks for MMLU's probabilities once more as texts to score, one for
each choice, as an engine without `choices` is asked.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

BAR = 360.0  # seconds
SHAPES: dict[str, dict[str, Any]] = {  # as their makers publish them
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 49_152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


class Clock:
    """Seconds of each stage by name, told and written as they come."""

    def __init__(self, out: Path, model: str) -> None:
        self.out, self.model = out, model
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float, **more: Any) -> None:
        """Count seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        told = "".join(f", {value:,.0f} {name}" for name, value in more.items())
        print(f"{self.model}  {stage:34} {seconds:8.1f} s{told}", flush=True)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"model": self.model, "stage": stage, "seconds": round(seconds, 2), **more}) + "\n")


def clocked(clock: Clock, run_programs: bool) -> None:
    """Let the evaluation tell the seconds of its stages: each of its functions goes through a clock."""
    from sftkit.evaluate import ask as asking
    from sftkit.evaluate import benchmark

    def timed(function: Callable[..., Any], name: Callable[..., str], more: Callable[..., dict[str, float]] = lambda *_: {}) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            before, start = sum(clock.seconds.values()), time.perf_counter()
            result = function(*arguments, **named)
            inner = sum(clock.seconds.values()) - before  # stages within this one have told their own
            clock.add(name(*arguments), time.perf_counter() - start - inner, **more(result))
            return result

        return run

    def tokens(result: Any) -> dict[str, float]:
        given = [each for several in result[0] for each in several if not each.error]
        return {"answers": len(given), "tokens": sum(each.num_tokens for each in given), "errors": len(result[0]) - len(given)}

    benchmark.open_task = timed(benchmark.open_task, lambda name, *_: f"{name}: questions")
    benchmark.find_models = timed(benchmark.find_models, lambda *_: "look the model up")
    benchmark.ask = timed(benchmark.ask, lambda asked, task, *_: f"{task.name}: answers", tokens)
    likeliest = timed(benchmark.choose_likeliest, lambda asked, task, *_: f"{task.name}: probabilities", lambda result: {"new": result[1]})
    benchmark.choose_likeliest = likeliest
    asking._choices = timed(asking._choices, lambda model, items: "mmlu: prompts and keys")
    mark = benchmark._mark
    skipped = lambda task, name, items, answers, config: [[_unmarked(task)] * len(each) for each in answers]  # noqa: E731
    chosen = lambda task, *rest: mark(task, *rest) if run_programs or not task.code else skipped(task, *rest)  # noqa: E731
    benchmark._mark = timed(chosen, lambda task, *_: f"{task.name}: marks")
    benchmark._result = timed(benchmark._result, lambda task, *_: f"{task.name}: statistics, health")


def _unmarked(task: Any) -> dict[str, Any]:
    from sftkit.evaluate.tasks.base import Mark

    return {metric: Mark(0.0, False) for metric in task.metrics}


@contextmanager
def started(clock: Clock) -> Iterator[None]:
    """Time the opening of engines."""
    from sftkit.core import named_models

    opened = named_models.open_engine

    def run(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        engine = opened(*arguments, **named)
        clock.add(f"start of {type(engine).__name__}", time.perf_counter() - start)
        return engine

    named_models.open_engine = run
    try:
        yield
    finally:
        named_models.open_engine = opened


def as_texts(model: str, config: Any, clock: Clock, limit: int) -> None:
    """Ask for the probabilities of MMLU's choices as texts to score, on an engine that is warm."""
    from sftkit.core.engines.base import ChoiceRequest, choice_logprobs
    from sftkit.core.engines.registry import open_engine
    from sftkit.core.named_models import find_models
    from sftkit.evaluate.ask import _choices
    from sftkit.evaluate.tasks import open_task

    (found,) = find_models({"it": model}, config.engine)
    wanted = [each for one in _choices(found, open_task("mmlu", config).items[:limit]) for each in one.requests]
    choices = [each for each in wanted if isinstance(each, ChoiceRequest)]
    with closing(open_engine(model, config.engine)) as engine:
        for name, through in (("own choices", engine), ("texts to score", _Texts(engine)), ("own choices again", engine)):
            start = time.perf_counter()
            results = list(choice_logprobs(through, choices))
            seconds = time.perf_counter() - start
            failed = sum(each.error is not None for each in results)
            clock.add(f"baseline: {len(results):,} as {name}", seconds, questions_a_second=len(results) / seconds, errors=failed)


class _Texts:
    """An engine without choices of its own."""

    def __init__(self, engine: Any) -> None:
        self.logprobs = engine.logprobs


def one_model(name: str, source: str, given: argparse.Namespace, run_programs: bool) -> float:
    """Evaluate one model in this process; return its seconds, from the start of Python on."""
    clock = Clock(Path(given.out), name)
    clock.add("start of Python, imports", time.time() - given.since if given.since else 0.0)
    begun = time.perf_counter()
    from sftkit.core.engines.base import EngineConfig
    from sftkit.evaluate.benchmark import evaluate_tasks
    from sftkit.evaluate.config import TasksConfig

    clocked(clock, run_programs)
    config = TasksConfig(
        limit=given.limit,
        unsafe=given.unsafe or not run_programs,
        max_new_tokens=given.max_new_tokens,
        workers=given.workers,
        engine=EngineConfig(engine=given.engine, max_model_len=given.max_model_len),
    )
    with tempfile.TemporaryDirectory() as folder, started(clock):
        result = evaluate_tasks({name: source}, given.tasks.split(","), Path(folder) / "run", config)
        seconds = time.perf_counter() - begun
        clock.add("rest: files, closing the engine", seconds - sum(list(clock.seconds.values())[1:]))
    total = sum(clock.seconds.values())
    clock.add("ALL", total)
    print(result.summary())
    print(f"{name}: {total:.0f} s, the bar is {BAR:.0f}", flush=True)
    if not run_programs and "humaneval" in given.tasks:
        print(f"{name}: HumanEval's programs were not run (no sandbox here): its score is none", flush=True)
    if given.baseline:
        as_texts(source, replace(config, limit=None), clock, given.baseline)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--tasks", default="gsm8k,ifeval,humaneval,mmlu")
    parser.add_argument("--mmlu", type=Path, help="MMLU's questions, where `evaluate data get` has not fetched them")
    parser.add_argument("--limit", type=int, help="first questions of each task; all when not given")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 2), help="programs that run at once")
    parser.add_argument("--unsafe", action="store_true")
    parser.add_argument("--baseline", type=int, metavar="N", help="N of MMLU's questions through choices and through texts to score")
    parser.add_argument("--out", default="tasks_speed.jsonl")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    from sftkit.core.checks.sandbox import available

    refusal = available()
    run_programs = refusal is None or given.unsafe
    print(f"programs: {'run in a sandbox' if refusal is None else 'run without a sandbox' if given.unsafe else f'not run: {refusal}'}")
    if len(given.models) > 1 or given.since is None:  # each in a process of its own, as the command does it
        children(given)
    else:
        name, _, source = given.models[0].partition("=")
        one_model(name, source, given, run_programs)


def children(given: argparse.Namespace) -> None:
    """Run each model in a process of its own; go on where one fails. A table comes last."""
    import subprocess

    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(os.environ)
        if given.mmlu:
            environment["SFTKIT_CACHE"] = os.environ["SFTKIT_CACHE"] = str(Path(scratch) / "cache")
            from sftkit.evaluate.task_data import fetch_data

            _, rows = fetch_data("mmlu", str(given.mmlu))
            print(f"MMLU: {rows:,} rows")
        kept = [each for each in sys.argv[1:] if each not in given.models]
        failed = []
        for each in given.models:
            name, _, source = each.partition("=")
            shape, _, tokenizer = source.partition(":")
            if shape in SHAPES:
                source = random_weights(shape, tokenizer, Path(scratch) / name)
            command = [sys.executable, __file__, f"{name}={source}", *kept, "--since", str(time.time())]
            if subprocess.run(command, env=environment).returncode:
                failed.append(name)
                print(f"{name}: FAILED, going on", flush=True)
    print("\n| model | stage | seconds |\n|---|---|---|")
    for line in Path(given.out).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] == "ALL" or row["seconds"] >= 1:
            print(f"| {row['model']} | {row['stage']} | {row['seconds']:.1f} |")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def random_weights(shape: str, tokenizer: str, folder: Path) -> str:
    """Write a model with a shape, random weights and the tokenizer of another; return its folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    ends = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(**SHAPES[shape], eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id, bos_token_id=None)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    ends.save_pretrained(folder)
    print(f"{folder.name}: {sum(each.numel() for each in model.parameters()) / 1e6:.0f} M parameters, random", flush=True)
    return str(folder)


if __name__ == "__main__":
    main()
