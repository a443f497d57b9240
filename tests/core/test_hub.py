"""A machine that does not reach the Hub says so once, and takes what it has: the libraries would ask for each file for half a minute."""

import os
import subprocess
import sys
from pathlib import Path

ASKED = """
import logging, sys
from sftkit.core.models import load_settings, model_identity, resolve_model
from sftkit.core.sources import iterate_rows
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
for ask in (lambda: next(iterate_rows("no/data")), lambda: model_identity(resolve_model("no/model")), lambda: load_settings(resolve_model("no/model"))):
    try:
        ask()
    except Exception as error:
        print(type(error).__name__, error)
print("child:", __import__("os").environ["HF_HUB_OFFLINE"])
"""


def test_a_hub_that_is_not_reached_is_asked_once(tmp_path: Path) -> None:
    """Nobody listens at port 9."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**rest, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, env=env, cwd=tmp_path)
    away = "http://127.0.0.1:9 cannot be reached: [Errno 111] Connection refused"
    model = f"UserError model no/model: not found on the Hub, nor in its cache ({away}); check the name, `--revision`,"
    first, data, *models, child = result.stdout.splitlines()
    assert first == f"{away}; what is in this machine's cache of the Hub is used"
    assert data.startswith(f"UserError no/data: no such file, and not to be had as a data set of the Hub ({away}; nor is it in the Hub's")
    assert [each.startswith(model) for each in models] == [True, True], models
    assert child == "child: 1"
    assert "Retrying" not in result.stderr
