"""Killed at a rename, a step leaves no data set rather than a wrong one, and the same command mends it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.core.sources import iterate_rows
from sftkit.curate.certificate import check_run

KILLED = """
import os, signal, sys
real, name = os.replace, sys.argv.pop(1)
def replace(a, b):
    if os.path.basename(b) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
from sftkit.cli import main
main()
"""


def files(run: Path) -> dict[str, bytes]:
    names = [each for each in run.rglob("*") if each.is_file() and each.name not in ("run.lock", "versions.json")]
    return {str(each.relative_to(run)): each.read_bytes() for each in names}


@pytest.mark.parametrize("step", ["import", "select"])
@pytest.mark.parametrize("at", ["dataset.jsonl", "README.md"])
def test_a_step_killed_after_its_decisions_were_entered(
    step: str, at: str, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    data, run, whole = tmp_path / "data.jsonl", tmp_path / "run", tmp_path / "whole" / "run"
    data.write_text("".join(json.dumps({"prompt": f"p{n}", "response": "r" * n}) + "\n" for n in range(1, 6)))
    take = ["curate", "import", str(data), "-o"]
    choose = ["curate", "select", "--method", "longest", "--budget", "2"]
    for out in (run, whole):
        assert step == "import" or cli(*take, str(out))[0] == 0
    command = take if step == "import" else choose
    assert cli(*command, str(whole))[0] == 0

    killed = subprocess.run([sys.executable, "-c", KILLED, at, *command, str(run)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    left = Run.open(run)
    assert left.ledger.stages()[-1] == step
    if at == "dataset.jsonl":
        with pytest.raises(UserError, match=r"has no data set .* run its last step again"):
            next(iter(iterate_rows(run)))
        told = [fault for check in check_run(left) for fault in check.faults]
        assert told == [f"it is not: {step} was cut off before it was written; run that again"]

    assert cli(*command, str(run))[0] == 0
    assert files(run) == files(whole)
    assert not [fault for check in check_run(left) for fault in check.faults]
