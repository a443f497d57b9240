"""Tokens per second that the openai engine gets out of a local `vllm serve`, against the server's own benchmark client.

    python benchmarks/server_client.py MODEL PROMPTS [--shape 0.5b] [--concurrency 64,256] [--seconds 300] [--out FILE]

One server, without its prefix cache; the variants take turns at it with the same prompts, sampling and longest answer, each at the
same number of requests under way, and each is first once. Medians of three repetitions come last, and of the ratios within one:

    bench            `vllm bench serve`, as it is: answers streamed, no seed, no log-probabilities
    sftkit           the openai engine, as `distill` asks it: a seed for each answer
    distill          `distill` with it, into a run folder: each answer on disk

and, where --variants names them, of what is asked for besides:

    bench-same       bench, asked for what sftkit asks for: a seed
    bench-logprobs   the same, asked for the log-probability of each token, too
    sftkit-logprobs  sftkit, asked for them

At 11,000 tokens/s the three take 160 s beside the server's start. A measurement of 5 s says little: by one each, `distill` had 0.90
of the rate of `sftkit` at 64 under way, and 1.09 at 256.
Tokens are those the server counts. `--shape` takes the tokenizer of MODEL and random weights in a real shape. The server is the one of
the Python that runs this; `--server-args` has more arguments for it: on a CPU "--enforce-eager --max-num-seqs 8" and a tiny shape.
The last repetition begins before --seconds have passed since the start. What fails is told, and the rest goes on.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import httpx
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.formats import iterate_examples, split_prompt
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distillation

NAME = "benchmarked"
VARIANTS = ("bench", "sftkit", "distill", "bench-same", "bench-logprobs", "sftkit-logprobs")
RATIOS = (
    *((variant, over) for over in ("bench", "bench-same") for variant in ("sftkit", "distill")),
    ("distill", "sftkit"),
    ("sftkit-logprobs", "bench-logprobs"),
)
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
}
DONE = "that was one"
CLIENT = f"""
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print({DONE!r}, flush=True)
"""


def shaped_model(tokenizer_folder: Path, shape: str, folder: Path) -> Path:
    """Write a Qwen2 of a shape with random weights, for the words of a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape],
        vocab_size=-(-len(tokenizer) // 64) * 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def ending(process: subprocess.Popen[Any]) -> Iterator[None]:
    """End a process and its children when the block is left."""
    try:
        yield
    finally:
        for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, sign)
                process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@contextmanager
def server(model: Path, more: list[str], log_file: Path, patience: float) -> Iterator[str]:
    """Serve a model; yield the address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--no-enable-prefix-caching"]
    command += ["--disable-uvicorn-access-log", *more]
    with open(log_file, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=environment())
    with ending(process):
        deadline = time.monotonic() + patience
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; it said:\n{log_file.read_text(errors='replace')[-6000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"


def environment() -> dict[str, str]:
    """Return what the server and its client run with: this folder's own `evaluate` must not stand for the package of that name."""
    return {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PYTHONSAFEPATH": "1",
    }


class Bench:
    """`vllm bench serve`, in one process for all its runs, since to import it takes longer than to run it."""

    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file
        with open(log_file, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env=environment(),
            )

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        with ending(self._process):
            pass

    def run(self, arguments: list[str], result: Path) -> dict[str, Any]:
        """Run it once; return what it measured."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([*arguments, "--result-dir", str(result.parent), "--result-filename", result.name]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.strip() == DONE:
                found: dict[str, Any] = json.loads(result.read_text())
                return found
        raise RuntimeError(f"vllm bench serve ended; it said:\n{self._log_file.read_text(errors='replace')[-4000:]}")


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--concurrency", default="64,256")
    parser.add_argument("--waves", default="10,3", help="requests of a measurement at each concurrency, in times it")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS[:3]), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--server-args", default="")
    parser.add_argument("--out", default="server_client.jsonl")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no server behind
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=given.max_new_tokens)
    variants = given.variants.split(",")
    waves = dict(zip(map(int, given.concurrency.split(",")), map(int, given.waves.split(",")), strict=True))  # by the concurrency
    found: dict[tuple[int, str], dict[int, float]] = {}  # rates by repetition

    def tell(row: dict[str, Any]) -> None:
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = shaped_model(Path(given.model), given.shape, place / "model") if given.shape else Path(given.model)
        texts = dict.fromkeys(split_prompt(example)[0][-1]["content"] for example in iterate_examples(given.prompts))
        short = [each for each in texts if 0 < len(each) < 2000]
        with Bench(place / "bench.log") as bench, server(model, shlex.split(given.server_args), place / "server.log", 300.0) as address:
            tell({"stage": "started", "seconds": round(time.monotonic() - start, 1), "prompts": len(short)})

            def prompt_file(number: int) -> Path:
                file = place / f"prompts-{number}.jsonl"
                file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in islice(cycle(short), number)))
                return file

            def benched(number: int, level: int, repetition: int, extra: dict[str, Any]) -> tuple[int, float, int]:
                arguments = ["--backend", "openai-chat", "--base-url", address, "--endpoint", "/v1/chat/completions", "--model", NAME]
                arguments += ["--tokenizer", str(model), "--dataset-name", "custom", "--dataset-path", str(prompt_file(number))]
                arguments += ["--custom-output-len", str(sampling.max_new_tokens), "--skip-chat-template", "--disable-shuffle"]
                arguments += ["--num-prompts", str(number), "--max-concurrency", str(level), "--seed", str(repetition), "--disable-tqdm"]
                arguments += ["--temperature", str(sampling.temperature), "--top-p", str(sampling.top_p), "--save-result"]
                if extra:
                    arguments += ["--extra-body", json.dumps(extra)]
                result = bench.run(arguments, place / f"result-{level}-{repetition}-{len(extra)}.json")
                return result["total_output_tokens"], result["duration"], number - result["completed"]

            def config(level: int) -> EngineConfig:
                return EngineConfig(engine="openai", base_url=f"{address}/v1", concurrency=level)

            def answered(number: int, level: int, repetition: int, logprob: bool) -> tuple[int, float, int]:
                requests = [
                    Request(
                        key=str(n),
                        prompt_ids=(),
                        messages=[{"role": "user", "content": text}],
                        sampling=sampling,
                        seed=n + repetition * number,
                        logprob=logprob,
                    )
                    for n, text in enumerate(islice(cycle(short), number))
                ]
                tokens = failed = 0
                with closing(open_engine(NAME, config(level))) as engine:
                    begun = time.perf_counter()
                    for completion in engine.generate(requests):
                        tokens += completion.num_tokens
                        failed += completion.error is not None
                    return tokens, time.perf_counter() - begun, failed

            def distilled(number: int, level: int, repetition: int) -> tuple[int, float, int]:
                settings = DistillConfig(
                    teacher=NAME,
                    k=1,
                    seed=repetition,
                    engine=config(level),
                    temperature=0.8,
                    top_p=0.95,
                    max_new_tokens=given.max_new_tokens,
                )
                with distillation(prompt_file(number), place / f"run-{level}-{repetition}", settings) as work:
                    _, tokens, seconds = work.generate(work.wanted)
                    return tokens, seconds, 0

            runs: dict[str, Callable[[int, int, int], tuple[int, float, int]]] = {
                "bench": lambda *what: benched(*what, {}),
                "bench-same": lambda *what: benched(*what, {"seed": what[-1]}),
                "bench-logprobs": lambda *what: benched(*what, {"seed": what[-1], "logprobs": True}),
                "sftkit": lambda *what: answered(*what, False),
                "sftkit-logprobs": lambda *what: answered(*what, True),
                "distill": distilled,
            }
            for variant in variants:  # graphs, kernels, connections
                try:
                    runs[variant](max(waves), max(waves), given.repetitions)
                except Exception:  # noqa: BLE001  told, and the rest goes on
                    traceback.print_exc()
            tell({"stage": "warm", "seconds": round(time.monotonic() - start, 1)})
            for repetition in range(given.repetitions):
                if time.monotonic() - start > given.seconds:
                    print(f"no time for repetition {repetition + 1}", flush=True)
                    break
                first = repetition % len(variants)
                for level, times in waves.items():
                    for variant in (*variants[first:], *variants[:first]):
                        try:
                            tokens, seconds, failed = runs[variant](times * level, level, repetition)
                        except Exception as error:  # noqa: BLE001  told, and the rest goes on
                            traceback.print_exc()
                            tell({"stage": "failed", "variant": variant, "concurrency": level, "error": str(error)[:300]})
                            continue
                        rate = tokens / seconds
                        found.setdefault((level, variant), {})[repetition] = rate
                        row = {"variant": variant, "concurrency": level, "repetition": repetition, "tokens": tokens}
                        tell({**row, "seconds": round(seconds, 3), "rate": round(rate), "failed": failed})
    for (level, variant), rates in found.items():
        print(f"{level:4} under way  {variant:16} {statistics.median(rates.values()):10,.0f} tokens/s of {len(rates)}", flush=True)
    for level, (variant, over) in product(waves, RATIOS):
        one, other = found.get((level, variant), {}), found.get((level, over), {})
        if both := [one[each] / other[each] for each in one.keys() & other.keys()]:
            ratios = {"is": round(statistics.median(both), 3), "least": round(min(both), 3), "most": round(max(both), 3)}
            tell({"concurrency": level, "ratio": f"{variant} / {over}", **ratios})


if __name__ == "__main__":
    main()
