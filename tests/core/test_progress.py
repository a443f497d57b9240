"""Progress is a line now and then where nobody watches, a bar on a terminal, and never on stdout."""

import io
import logging
import sys

import pytest
from sftkit.core import progress as module
from sftkit.core.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes when a test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds(clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "sftkit")
    with Progress("distill", total=1800, unit="samples", done=600) as progress:
        for _ in range(30):
            clock[0] += 1
            progress.advance(20)
        assert (progress.done, progress.tokens) == (1200, 0)
        assert progress.rate() == "20.0 samples/s"
    assert caplog.messages == [
        "distill: 800 of 1,800 samples, 20.0 samples/s, 50 s left",
        "distill: 1,000 of 1,800 samples, 20.0 samples/s, 40 s left",
        "distill: 1,200 of 1,800 samples, 20.0 samples/s, 30 s left",  # once, though it ends here
    ]
    assert capsys.readouterr().out == ""


def test_the_rate_is_of_tokens_where_there_are_any(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sftkit")
    with Progress("distill", total=4, unit="samples") as progress:
        clock[0] += 2
        progress.advance(tokens=1000)
        progress.advance(3, tokens=2000)
    assert caplog.messages == ["distill: 4 of 4 samples, 1,500 tokens/s in 2 s"]


def test_tokens_of_a_unit_that_is_not_done_are_no_end(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sftkit")
    with Progress("score", total=4, unit="rows") as progress:
        clock[0] += 12
        progress.advance(0, tokens=84)
        progress.advance(4, tokens=84)
    assert caplog.messages == ["score: 0 of 4 rows, 7 tokens/s, 12 s so far", "score: 4 of 4 rows, 14 tokens/s in 12 s"]


def test_nothing_done_is_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sftkit")
    with Progress("distill", total=4, unit="samples", done=4):
        pass
    assert not caplog.messages


def test_what_was_done_is_said_when_a_fault_ends_it(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sftkit")
    progress = Progress("score", total=4, unit="rows")

    def fail() -> None:
        with progress:
            clock[0] += 1
            progress.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert caplog.messages == ["score: 1 of 4 rows, 1.0 rows/s, 3 s left"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO, "sftkit")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("distill", total=8, unit="samples", done=2) as progress:
        progress.advance(3, tokens=30)
    drawn = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "distill" in drawn
    assert "5/8" in drawn
    assert "tokens/s" in drawn
    assert not caplog.messages, "a bar needs no lines"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (45, "45 s"), (59.6, "1 min 0 s"), (60, "1 min 0 s"), (725, "12 min 5 s"),
        (3599.7, "1 h 0 min"), (12_000, "3 h 20 min"), (90_000, "25 h 0 min"),
    ],
)  # fmt: skip
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
