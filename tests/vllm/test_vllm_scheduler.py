"""sftkit's scheduler for vLLM gives the answers of vLLM's own, with sequences that have to wait for room in the cache, and with room for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm_scheduler.py"


@pytest.mark.parametrize(("blocks", "asked"), [(9, 1.0), (9, 0.5), (128, 0.0)])
def test_a_step_ahead_of_the_card_the_answers_are_those_of_vllm(tiny_model: Path, blocks: int, asked: float) -> None:
    command = [sys.executable, str(SCRIPT), str(tiny_model), "--sequences", "16", "--steps", "90", "--blocks", str(blocks)]
    command += ["--asked", str(asked)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "the same answers"
