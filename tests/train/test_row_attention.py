"""Attention by tiles of the pack: see `row_attention_in_interpreter.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    told = [
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        str(Path(__file__).with_name("row_attention_in_interpreter.py")),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-m", "pytest", *told], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert "skipped" not in child.stdout
