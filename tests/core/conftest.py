"""What the tests of engines share: a server, and waits that last a thousandth of what is usual."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sftkit.core.engines import openai_engine

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package: servers and toys of theirs are found beside them

from openai_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a thousandth of what is usual between attempts, and for nobody who is not there."""
    monkeypatch.setattr(openai_engine, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(openai_engine, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(openai_engine, "PATIENCE", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
