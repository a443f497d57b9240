"""A distillation with vLLM from the command line: killed in every way, it goes on, and leaves no process behind."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPTS, K = 200, 4  # enough that none of the interruptions comes too late, also on a fast machine: commits come once a second


class Distillation:
    """The command, and what its run folder holds."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"What is {number} plus {number}?"}) + "\n" for number in range(PROMPTS)))
        engine = {"engine": "vllm", "dtype": "float32", "max_num_seqs": 2, "enforce_eager": True}
        settings = folder / "settings.yaml"
        settings.write_text(json.dumps({"engine": engine}))  # JSON is YAML
        self.run = folder / "run"
        arguments = [prompts, "-o", self.run, "--teacher", teacher, "-k", K, "--max-new-tokens", 100, "--config", settings]
        self.command = [sys.executable, "-m", "sftkit", "curate", "distill", *map(str, arguments)]
        self.errors = folder / "errors.txt"

    def start(self) -> subprocess.Popen[str]:
        """Start it in a process group of its own, as a terminal does."""
        with open(self.errors, "w") as errors:
            return subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/", start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs have it ignored
            )  # fmt: skip

    def stored(self) -> dict[str, str]:
        """Return the text of each committed sample by its key."""
        store = self.run / "curate" / "samples.sqlite"
        if not store.exists():
            return {}
        try:
            with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
                return dict(connection.execute("select hex(key), text from samples"))
        except sqlite3.OperationalError:
            return {}

    def start_and_wait(self, more: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        """Start it and wait until it has stored so many more samples; return it and the processes it has started."""
        before = len(self.stored())
        process = self.start()
        return process, self.wait(process, before + more)

    def wait(self, process: subprocess.Popen[str], stored: int) -> list[psutil.Process]:
        """Wait until so many samples are stored, while it runs; return the processes it has started."""
        deadline = time.monotonic() + 300
        while len(self.stored()) < stored and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, self.errors.read_text()
        assert len(self.stored()) >= stored, self.errors.read_text()
        started = psutil.Process(process.pid).children(recursive=True)
        assert [each for each in started if each.name().startswith("VLLM::EngineCor")]
        return started


@pytest.fixture
def distillation(tmp_path: Path, tiny_for_vllm: Path) -> Iterator[Distillation]:
    yield Distillation(tmp_path, tiny_for_vllm)
    for each in psutil.process_iter(["cmdline"]):  # only after a failure: nothing of this test may go on
        if str(tmp_path) in " ".join(each.info["cmdline"] or []):
            each.kill()


def assert_gone(started: list[psutil.Process]) -> None:
    """Assert that all have ended, or do so shortly."""
    _, alive = psutil.wait_procs([each for each in started if each.is_running()], timeout=30)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_an_interruption_of_the_start_is_not_lost(distillation: Distillation) -> None:
    process = distillation.start()
    deadline = time.monotonic() + 120
    started: list[psutil.Process] = []
    while not started and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        started = [each for each in psutil.Process(process.pid).children(recursive=True) if each.name().startswith("VLLM")]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, distillation.errors.read_text()
    assert_gone(started)
    said = distillation.errors.read_text()
    assert "goes on from here" in said
    assert "Traceback" not in said
    assert distillation.stored() == {}


def test_whatever_ends_it_the_same_command_goes_on(distillation: Distillation) -> None:
    process, started = distillation.start_and_wait(more=5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_gone(started)  # else the GPU's memory would be gone for the next one
    after_kill = distillation.stored()

    process, started = distillation.start_and_wait(more=5)
    engine = next(each for each in started if each.name().startswith("VLLM::EngineCor"))
    engine.kill()
    psutil.wait_procs([engine], timeout=30)
    at_death = distillation.stored()
    assert after_kill.items() < at_death.items()
    started += distillation.wait(process, len(at_death) + 5)  # another engine has taken its place
    said = distillation.errors.read_text()
    assert "is started again" in said
    assert "SIGKILL" in said
    assert "custom scheduler" not in said  # vLLM warns of any that is not its own
    assert "Traceback" not in said
    after_death = distillation.stored()
    assert at_death.items() < after_death.items()

    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: every process of the group gets it
    assert process.wait(timeout=120) == 130, distillation.errors.read_text()
    assert_gone(started)
    said = distillation.errors.read_text()
    assert "goes on from here" in said
    assert "Traceback" not in said
    assert "leaked" not in said.rpartition("starting vLLM")[2]  # the one before was killed, and could not clear away
    after_interrupt = distillation.stored()
    assert after_death.items() <= after_interrupt.items()
    assert len(after_interrupt) < PROMPTS * K

    process = distillation.start()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, distillation.errors.read_text()
    assert f"{PROMPTS * K:,} of {PROMPTS * K:,} samples" in out
    assert f"new: {PROMPTS * K - len(after_interrupt)} samples" in out
    complete = distillation.stored()
    assert len(complete) == PROMPTS * K
    assert after_interrupt.items() < complete.items()
    assert len(set(complete.values())) > PROMPTS  # four different answers to a prompt, not one

    process = distillation.start()  # knows all keys without starting vLLM
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "new: none, everything that was asked for is there" in out
    assert "starting vLLM" not in distillation.errors.read_text()
    assert distillation.stored() == complete
    assert_gone(started)
