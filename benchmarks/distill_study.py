"""Where a step of vLLM goes: one engine after another, on each several ways to sample, and the clocks of its processes.

    python benchmarks/distill_study.py TOKENIZER [--shape 1.5b] [--engines vllm,gathering,graphs,sftkit] [--requests 2048]
        [--new-tokens 128] [--seconds 240] [--out study.jsonl] [--texts study/]

TOKENIZER is a folder with a tokenizer and a chat template (SmolLM2's, Qwen's), of which the teacher takes no more than that: it has a real
shape and random weights, and every answer has --new-tokens. The engines:

    vllm        vLLM at its defaults
    gathering   the same, told to speak of an answer when it is whole (core/engines/vllm_scheduler.py)
    graphs      the same as `vllm`, with graphs for steps of up to 2,048 tokens
    sftkit      both, as core/engines/vllm_engine.py starts it
    uncounted   the same, but nobody counts the logits that are not numbers
    sync        vLLM at its defaults, but not a step ahead of the card
    v1          vLLM at its defaults, with its older model runner

The ways to sample, each on the same requests: plain (temperature 0.8, top-p 0.95), logprobs (with that of the sampled token), seeds
(each request its own: what sftkit asks), both (what it asks for log-probabilities), no-top-p, greedy. With `seeds` and `both` the
engine's process is looked into: milliseconds of a step in all, of its main thread, of scheduling, of taking results in, of packing;
then cProfile and the card's kernels, as text files in --texts. In this process: milliseconds a message of unpacking and of taking the
outputs in.

An engine starts in 60 to 100 s (the first compiles) and is measured eight times, 5 to 10 s each; none is begun after --seconds.
To see on a CPU that it runs, in three minutes: --shape tiny --requests 24 --engines sftkit --ways both --new-tokens 60
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from teachers import random_teacher, write_questions

ENGINES = ("vllm", "gathering", "graphs", "sftkit", "uncounted", "sync", "v1")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8, "top_p": 0.95},
    "both": {"temperature": 0.8, "top_p": 0.95, "logprobs": 0, "flat_logprobs": True, "seed": 1},
    "logprobs": {"temperature": 0.8, "top_p": 0.95, "logprobs": 0, "flat_logprobs": True},
    "seeds": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    "no-top-p": {"temperature": 0.8, "top_p": 1.0},
    "greedy": {"temperature": 0.0},
}
LOOKED_AT = ("seeds", "both")


class Clock:
    """CPU seconds of a function of this process, over all its calls."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self.calls = 0.0, 0
        inner = getattr(owner, name)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start
                self.calls += 1

        setattr(owner, name, clocked)

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


def start(name: str, model: str) -> Any:
    """Start one of ENGINES with the clocks in it."""
    from sftkit.core.engines.base import EngineConfig
    from sftkit.core.engines.vllm_engine import GRAPH_SIZES, _arguments, _prepare_environment
    from sftkit.core.models import resolve_model

    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    _prepare_environment()
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = str(int(name == "sftkit"))
    if name == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    cpu = current_platform.is_cpu()
    ours = _arguments(resolve_model(model), EngineConfig(engine="vllm", max_model_len=2048))
    kept = ("model", "max_model_len", "generation_config", "disable_log_stats", "gpu_memory_utilization", "kv_cache_memory_bytes")
    arguments = ours if name in ("sftkit", "uncounted") else {key: value for key, value in ours.items() if key in kept}
    if name == "graphs" and not cpu:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": list(GRAPH_SIZES)}
    if cpu:
        arguments |= {"max_num_seqs": 8, "enforce_eager": True}
    ahead = not cpu and name != "sync"
    if not cpu:
        arguments["async_scheduling"] = ahead
    scheduler = ("Gathering" if name in ("sftkit", "uncounted", "gathering") else "Plain") + ("Async" if ahead else "")
    arguments["scheduler_cls"] = f"watched_scheduler.{scheduler}"
    return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


def run(engine: Any, prompts: list[list[int]], settings: dict[str, Any], new_tokens: int, look: Path | None = None) -> tuple[int, float]:
    """Give the engine all requests and let it run until it has none; return the tokens and the seconds from the first to the last."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    begin, tokens, steps = time.perf_counter(), 0, 0
    for number, ids in enumerate(prompts):
        own = {**settings, **({"seed": 1000 + number} if "seed" in settings else {})}
        params = SamplingParams(
            max_tokens=new_tokens, ignore_eos=True, detokenize=False, skip_clone=True, output_kind=RequestOutputKind.FINAL_ONLY, **own
        )
        engine.add_request(f"{begin}-{number}", {"type": "token", "prompt_token_ids": ids}, params)
    added = time.perf_counter()
    while engine.has_unfinished_requests():
        tokens += sum(len(each.outputs[0].token_ids) for each in engine.step() if each.finished)
        steps += 1
        if look is not None and time.perf_counter() - added > 0.5:
            look.touch()
            look = None
    return tokens, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--engines", default="vllm,sftkit,gathering,graphs")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--out", default="study.jsonl")
    parser.add_argument("--texts", default="study")
    given = parser.parse_args()
    began = time.monotonic()
    texts = Path(given.texts)
    texts.mkdir(parents=True, exist_ok=True)

    def note(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        watch = Path(scratch) / "watch"
        watch.mkdir()
        os.environ["SFTKIT_WATCH"] = str(watch)
        model = random_teacher(given.shape, Path(given.tokenizer), Path(scratch) / "model")
        questions = write_questions(Path(scratch) / "questions.jsonl", given.requests)
        from sftkit.core.chat import load_chat
        from sftkit.core.models import resolve_model

        chat = load_chat(resolve_model(model))
        asked = [json.loads(line)["prompt"] for line in questions.read_text().splitlines()]
        prompts = [list(chat.prompt([{"role": "user", "content": each}])) for each in asked]
        note({"prompts": len(prompts), "prompt tokens": sum(map(len, prompts)) / len(prompts), "prepared after": time.monotonic() - began})
        rates: dict[tuple[str, str], float] = {}
        for name in given.engines.split(","):
            if time.monotonic() - began > given.seconds:
                note({"engine": name, "left out": "no time"})
                continue
            try:
                begin = time.perf_counter()
                engine = start(name, model)
                scheduling = engine.vllm_config.scheduler_config
                note({
                    "engine": name,
                    "start": round(time.perf_counter() - begin, 1),
                    "sequences": scheduling.max_num_seqs,
                    "batched tokens": scheduling.max_num_batched_tokens,
                    "async": scheduling.async_scheduling,
                    "largest graph": engine.vllm_config.compilation_config.max_cudagraph_capture_size,
                    "new runner": getattr(engine.vllm_config, "use_v2_model_runner", None),
                })  # fmt: skip
                taking = Clock(engine.output_processor, "process_outputs")
                unpacking = Clock(engine.engine_core.decoder, "decode") if hasattr(engine.engine_core, "decoder") else None
                run(engine, prompts[: len(prompts) // 4], WAYS["both"], 16)  # kernels are compiled
                for way in given.ways.split(","):
                    for each in filter(None, (taking, unpacking)):
                        each.reset()
                    look = watch / "look" if way in LOOKED_AT else None
                    tokens, seconds = run(engine, prompts, WAYS[way], given.new_tokens, None)
                    row = {"engine": name, "way": way, "tokens": tokens, "seconds": round(seconds, 3), "rate": round(tokens / seconds)}
                    row["messages"], row["taking in, ms each"] = taking.calls, round(1e3 * taking.seconds / max(1, taking.calls), 3)
                    if unpacking is not None and unpacking.calls:
                        row["unpacking, ms each"] = round(1e3 * unpacking.seconds / unpacking.calls, 3)
                    rates[name, way] = tokens / seconds
                    note(row)
                    if look is None:
                        continue
                    run(engine, prompts, WAYS[way], given.new_tokens, look)  # looked into, and not counted
                    look.unlink(missing_ok=True)
                    if (watch / "clock.json").exists():
                        clock = json.loads((watch / "clock.json").read_text())
                        counts = {key: round(clock.pop(key)) for key in ("sequences", "tokens")}
                        note({"engine": name, "way": way, **counts, "ms": {key: round(1e3 * value, 2) for key, value in clock.items()}})
                    for file in ("clock.json", "host.txt", "card.txt"):
                        if (watch / file).exists():
                            shutil.move(watch / file, texts / f"{name}-{way}-{file}")
                engine.engine_core.shutdown(timeout=20)
                del engine
            except Exception as error:  # noqa: BLE001  one that does not run does not keep the others from it
                note({"engine": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        ways = given.ways.split(",")
        print(f"{'tokens/s':12}" + "".join(f"{way:>12}" for way in ways))
        for name in dict.fromkeys(name for name, _ in rates):
            print(f"{name:12}" + "".join(f"{rates.get((name, way), 0):12,.0f}" for way in ways))


if __name__ == "__main__":
    main()
