"""Tokens per second of distillation with vLLM, every answer durable, against vLLM's own `LLM.chat`, which stores nothing.

    python benchmarks/distill_throughput.py TOKENIZER --shape 1.5b [--engines vllm,sftkit,process,2] [--requests 2048]
        [--new-tokens 128] [--repetitions 3] [--long-tailed] [--seconds 400] [--out FILE]
    python benchmarks/distill_throughput.py MODEL --prompts FILE [-k 4]

With --shape the teacher has a real shape, random weights and the tokenizer of the folder: every answer has --new-tokens. The engines:

    vllm      LLM at its defaults: `chat`
    sftkit    LLM with sftkit's settings: `chat`; `chat-asked`, which asks for what sftkit asks (a seed for each);
              `distill` into a run folder, fed by sftkit in this process; and where --ways names them `raw`, rendered requests all at once,
              `chunks` of 512 of them, each waited for, as the peers do, and `chat-logprobs` and `distill-logprobs`, with log-probabilities
    process   `distill` as the command runs it: the engine in a process of its own, which is started again when it dies
    2, 3      so many of them on the card

On one engine the ways take turns, each time with another seed; a round that warms up is not counted. `chat` renders its prompts itself, so
`with prompts` adds to `distill` the time to read, render and key them. After each engine come medians and the ratios that count, each the
median over the rounds. Start-up is told apart. The share of time that the card is busy is nvidia-smi's, once a second. --long-tailed lets
every eighth answer take eight times as long. A round of 2,048 requests takes 3 to 10 s for each way, an engine 50 to 100 s to start;
no engine and no further round is begun after --seconds. For the bars, in order of what is left out first:

    --engines sftkit,vllm,2,process --repetitions 3 --seconds 330                             420 s, or 510 with the last
    --engines sftkit --ways chunks,distill --long-tailed --repetitions 3 --seconds 150        200 s

To see on a CPU that it runs: --shape tiny --requests 16 --new-tokens 16 --repetitions 1 --engines sftkit,process --max-num-seqs 8
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftkit.core.engines.base import EngineConfig
from sftkit.core.engines.registry import open_engine
from sftkit.core.hardware import GpuBusy, visible_gpus
from sftkit.core.models import model_identity, resolve_model
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import Wanted, distillation, wanted_sample
from teachers import random_teacher, write_questions

CHUNK = 512
CONTEXT = 4096
WAYS = {"vllm": ("chat",), "sftkit": ("chat", "distill", "chat-asked")}  # raw and chunks where they are asked for
BARS = (  # of the first to the second, and what is asked of it
    ("sftkit distill", "sftkit chat", 0.97),
    ("process distill", "sftkit chat", 0.97),
    ("sftkit distill", "sftkit chat-asked", 0.97),
    ("sftkit distill-logprobs", "sftkit chat-logprobs", 0.97),
    ("sftkit distill", "vllm chat", 1.5),
    ("process distill", "vllm chat", 1.5),
    ("2 distill", "vllm chat", 1.5),
    ("3 distill", "vllm chat", 1.5),
    ("sftkit distill", "vllm chat-asked", 1.5),
    ("sftkit distill", "sftkit chunks", 1.25),
)


def open_vllm(model: str, config: EngineConfig, *, tuned: bool) -> tuple[Any, Any]:
    """Open vLLM's LLM, at its defaults or with sftkit's settings; return it, and sftkit's engine around it."""
    from sftkit.core.chat import load_chat
    from sftkit.core.engines.vllm_engine import VllmEngine, _arguments, _prepare_environment
    from sftkit.core.engines.vllm_processes import Processes

    ref, processes = resolve_model(model), Processes()
    _prepare_environment()
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = str(int(tuned))  # which sftkit asks for, and vLLM's defaults do not
    from vllm import LLM

    arguments = _arguments(ref, config)
    if not tuned:
        kept = ("model", "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes", "generation_config")
        arguments = {name: value for name, value in arguments.items() if name in kept}
    try:
        llm = processes.start(lambda: LLM(**arguments))
    except BaseException:
        processes.close()
        raise
    return llm, VllmEngine(llm.llm_engine, processes, load_chat(ref), identity=model_identity(ref))


def chat(llm: Any, wanted: list[Wanted], *, seeds: bool = False, logprobs: bool = False) -> int:
    """Let `LLM.chat` answer, with a seed and log-probabilities where they are wanted; return the tokens."""
    from vllm import SamplingParams

    def params(each: Wanted) -> Any:
        more = {"seed": each.seed if seeds else None, "logprobs": 0 if logprobs else None}
        sampling = each.sampling
        return SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, **more)

    outputs = llm.chat([each.prompt.messages for each in wanted], [params(each) for each in wanted], use_tqdm=False)
    return sum(len(each.outputs[0].token_ids) for each in outputs)


def raw(engine: Any, wanted: list[Wanted], chunk: int | None = None) -> int:
    """Give vLLM all requests, or one chunk after the other, with what sftkit asks; return the tokens."""
    inner, start, tokens = engine._engine, time.perf_counter(), 0
    for first in range(0, len(wanted), chunk or len(wanted)):
        for number, each in enumerate(wanted[first : first + (chunk or len(wanted))]):
            params = engine._params(each.sampling, seed=each.seed)
            inner.add_request(f"raw-{start}-{first + number}", {"type": "token", "prompt_token_ids": list(each.prompt.ids)}, params)
        while inner.has_unfinished_requests():
            tokens += sum(len(each.outputs[0].token_ids) for each in inner.step() if each.finished)
    return tokens


def lengthened(wanted: list[Wanted], teacher: Any) -> list[Wanted]:
    """Let every eighth answer be eight times as long."""
    longest = [
        replace(each.sampling, max_new_tokens=each.sampling.max_new_tokens * (1 if place % 8 else 8)) for place, each in enumerate(wanted)
    ]
    return [wanted_sample(teacher, each.prompt, each.index, sampling) for each, sampling in zip(wanted, longest, strict=True)]


class Rounds:
    """Measures ways on open engines, and keeps what it found."""

    def __init__(self, given: argparse.Namespace, base: DistillConfig, prompts: Path, scratch: Path) -> None:
        self.given, self.base, self.prompts, self.scratch = given, base, prompts, scratch
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.began = time.monotonic()
        self._told: set[str] = set()

    def note(self, row: dict[str, Any]) -> None:
        """Print a finding and write it to the file."""
        print(json.dumps(row), flush=True)
        with open(self.given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def measure(self, name: str, engine: Any, llm: Any, ways: tuple[str, ...]) -> None:
        """Let the ways take turns on one engine."""
        for repetition in range(self.given.repetitions + 1):
            if repetition > 1 and time.monotonic() - self.began > self.given.seconds:
                self.note({"engine": name, "rounds left out": self.given.repetitions + 1 - repetition})
                break
            for way in ways if repetition % 2 else ways[::-1]:  # so that none always comes first
                folder = self.scratch / f"{name}-{way}-{repetition}"
                begin = time.perf_counter()
                with distillation(self.prompts, folder, replace(self.base, seed=repetition, logprobs=way == "distill-logprobs")) as work:
                    wanted = lengthened(work.wanted, work.teacher) if self.given.long_tailed else work.wanted
                    if not repetition:
                        wanted = wanted[: max(1, len(wanted) // 4)]
                    prepared = time.perf_counter() - begin
                    doing: dict[str, Callable[[], int]] = {
                        "chat": lambda wanted=wanted: chat(llm, wanted),
                        "chat-asked": lambda wanted=wanted: chat(llm, wanted, seeds=True),
                        "chat-logprobs": lambda wanted=wanted: chat(llm, wanted, seeds=True, logprobs=True),
                        "raw": lambda wanted=wanted: raw(engine, wanted),
                        "chunks": lambda wanted=wanted: raw(engine, wanted, CHUNK),
                        "distill": lambda wanted=wanted, work=work: work.generate(wanted)[1],
                        "distill-logprobs": lambda wanted=wanted, work=work: work.generate(wanted)[1],
                    }
                    work.teacher._engine = engine
                    with GpuBusy(visible_gpus()[:1]) as gpu:
                        start = time.perf_counter()
                        tokens = doing[way]()
                        seconds = time.perf_counter() - start
                    work.teacher._engine = None  # it is used again
                if not repetition:
                    continue
                self.rates[f"{name} {way}"].append(tokens / seconds)
                row = {"engine": name, "way": way, "round": repetition, "tokens": tokens, "seconds": round(seconds, 3)}
                row |= {"rate": round(tokens / seconds), "busy %": None if gpu.share is None else round(100 * gpu.share)}
                if way.startswith("distill"):
                    row |= {"rate with prompts": round(tokens / (seconds + prepared)), "prepared in": round(prepared, 2)}
                self.note(row)

    def summary(self) -> None:
        """Print medians, and the bars that are not told yet."""
        for name, rates in self.rates.items():
            print(f"{name:22} {statistics.median(rates):10,.0f} tokens/s", flush=True)
        for first, second, bar in BARS:
            ratio = f"{first} / {second}"
            if ratio not in self._told and self.rates.get(first) and self.rates.get(second):
                self._told.add(ratio)
                found = statistics.median(one / other for one, other in zip(self.rates[first], self.rates[second], strict=False))
                self.note({"ratio": ratio, "is": round(found, 3), "asked": bar})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--shape")
    parser.add_argument("--prompts")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engines", default="vllm,sftkit,process,2")
    parser.add_argument("--ways", help="on the engine sftkit, parted by commas")
    parser.add_argument("--long-tailed", action="store_true")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--out", default="distill_throughput.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_teacher(given.shape, Path(given.model), folder / "model") if given.shape else given.model
        limit = -(-given.requests // given.k)
        prompts = Path(given.prompts) if given.prompts else write_questions(folder / "prompts.jsonl", limit)
        plain = EngineConfig(engine="vllm", max_model_len=CONTEXT, max_num_seqs=given.max_num_seqs)
        base = DistillConfig(teacher=model, k=given.k, limit=limit, max_new_tokens=given.new_tokens, engine=plain)
        rounds = Rounds(given, base, prompts, folder)
        for name in given.engines.split(","):
            if time.monotonic() - rounds.began > given.seconds:
                rounds.note({"engine": name, "left out": "no time"})
                continue
            try:
                start = time.perf_counter()
                if name in WAYS:
                    llm, engine = open_vllm(model, plain, tuned=name == "sftkit")
                    ways = tuple(given.ways.split(",")) if given.ways and name == "sftkit" else WAYS[name]
                else:
                    replicas = 1 if name == "process" else int(name)
                    llm, engine, ways = None, open_engine(model, replace(plain, replicas=replicas)), ("distill",)
                    engine.wait_for_all()
                with closing(engine):
                    rounds.note({"engine": name, "start": round(time.perf_counter() - start, 1)})
                    rounds.measure(name, engine, llm, ways)
                    rounds.summary()
            except Exception as error:  # noqa: BLE001  one that does not run does not keep the others from it
                rounds.note({"engine": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})


if __name__ == "__main__":
    main()
