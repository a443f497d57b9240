"""Attention by tiles of the pack: see `row_attention_in_interpreter.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sftkit.train.attention import tried_once


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


def test_a_trial_knows_nothing_of_the_pass_that_it_is_made_in() -> None:
    """Recomputed activations go by what a pass saves: in their first pass a trial inside it was saved, in the second there was none."""

    @tried_once
    def trial() -> tuple[bool, float]:
        weight = torch.full((2, 2), 3.0, requires_grad=True)
        (slope,) = torch.autograd.grad((weight @ weight).sum(), weight)
        return torch.is_autocast_enabled("cpu"), float(slope.sum())

    def refuse(_: object) -> None:
        raise AssertionError("saved")

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert trial() == (False, 48.0)


def test_what_is_tried_once_is_a_constant_to_compiled_code() -> None:
    calls: list[int] = []

    @tried_once
    def doubles(number: int) -> bool:
        calls.append(number)
        return number > 1

    def layer(values: torch.Tensor, number: int) -> torch.Tensor:
        return values * 2 if doubles(number) else values

    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    for number, factor in ((1, 1), (2, 2), (1, 1), (2, 2)):
        assert compiled(torch.ones(3), number).tolist() == [factor] * 3
    assert calls == [1, 2]
