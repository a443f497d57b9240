"""How a command ends: its exit code, and one line where the user can mend it."""

import errno
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner
from sftkit.core.cli import Commands, run_command_line
from sftkit.core.errors import TooManyFailures, UserError, missing_package, unknown_name


def fails(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def stopped_with_a_reason() -> None:
    raise click.Abort from KeyboardInterrupt("Nothing was written.")


ENDINGS: dict[str, tuple[Callable[[], Any], int, list[str]]] = {
    "fine": (lambda: click.echo("made it"), 0, []),
    "a mistake": (fails(UserError("found x, expected y; do z")), 1, ["error: found x, expected y; do z"]),
    "too many failures": (fails(TooManyFailures("3 of 4 failed")), 3, ["error: 3 of 4 failed"]),
    "a wrong option": (fails(click.UsageError("no such thing")), 2, ["Error: no such thing"]),
    "an exit": (fails(click.exceptions.Exit(5)), 5, []),
    "Ctrl-C": (fails(KeyboardInterrupt()), 130, ["stopped. Everything that finished is kept: the same command goes on from here."]),
    "Ctrl-C with a reason": (stopped_with_a_reason, 130, ["stopped. Nothing was written."]),
    "a full disk": (
        fails(OSError(errno.ENOSPC, "No space left on device", "/full/x")),
        1,
        ["error: /full/x: No space left on device; make room or name another place: the same command goes on from here"],
    ),
    "a place that may not be written": (
        fails(PermissionError(errno.EACCES, "Permission denied", "/locked/x")),
        1,
        ["error: /locked/x: Permission denied; give this user the right to it, or name another place: the same command goes on from here"],
    ),
    "a disk that may not be written": (
        fails(OSError(errno.EROFS, "Read-only file system", "/cd/x")),
        1,
        ["error: /cd/x: Read-only file system; name another place: the same command goes on from here"],
    ),
    "a name that no disk takes": (
        fails(OSError(errno.ENAMETOOLONG, "File name too long", "aaaa")),
        1,
        ["error: aaaa: File name too long; give a shorter one\n"],  # and no more
    ),
    "no place for what is passing": (
        fails(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/work']")),
        1,
        [
            "error: No usable temporary directory found in ['/tmp', '/work']; let TMPDIR name a folder that can be written:"
            " the same command goes on from here"
        ],
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_how_a_command_ends(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    callback, code, words = ENDINGS[name]
    monkeypatch.setattr(sys, "argv", ["sftkit"])
    ended = 0
    try:
        run_command_line(click.Command("sftkit", callback=callback))
    except SystemExit as stop:
        ended = int(stop.code or 0)
    said = capsys.readouterr()
    assert ended == code
    assert said.out == ("made it\n" if name == "fine" else "")
    assert [line for line in said.err.splitlines() if line][-1:] == words or words[0] in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), OSError(errno.EBADF, "Bad file descriptor"), FileNotFoundError(errno.ENOENT, "x"), AssertionError("ours")],
)
def test_a_bug_keeps_its_traceback(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sftkit"])
    with pytest.raises(type(error)):
        run_command_line(click.Command("sftkit", callback=fails(error)))


def test_talk_goes_to_stderr_as_plain_sentences(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def talk() -> None:
        logging.getLogger("sftkit.curate").info("%d rows", 3)
        logging.getLogger("another.library").info("never heard")

    monkeypatch.setattr(sys, "argv", ["sftkit"])
    run_command_line(click.Command("sftkit", callback=talk))
    assert capsys.readouterr() == ("", "3 rows\n")


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    code = (
        "import click; from sftkit.core.cli import run_command_line;"
        "run_command_line(click.Command('sftkit', callback=lambda: [click.echo('line ' * 20) for _ in range(50_000)]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_commands_stand_in_the_order_of_the_chain() -> None:
    group = Commands("sftkit")
    for name in ("distill", "best", "filter"):
        group.add_command(click.Command(name))
    assert group.list_commands(click.Context(group)) == ["distill", "best", "filter"]


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    assert str(unknown_name("scorer", "numerik", ["numeric", "length"], "score.yaml")) == (
        "score.yaml: unknown scorer 'numerik': did you mean 'numeric'? known are length, numeric"
    )
    assert str(unknown_name("scorer", "zzz", {"a": 1})) == "unknown scorer 'zzz': known are a"
    assert str(unknown_name("task", "zzz", ["b", "a"], also="a file")) == "unknown task 'zzz': known are a, b; or give a file"
    assert str(missing_package("vllm", "vllm")) == "vllm is not installed: pip install 'sftkit[vllm]'"


def test_ctrl_c_before_the_first_command_is_known_ends_as_later() -> None:
    code = """
import sys

class Stopped:
    def find_spec(self, name, path=None, target=None):
        if name == "sftkit.evaluate.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stopped())
from sftkit.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (130, "")


def test_a_list_of_commands_cuts_no_sentence_off() -> None:
    help = "Take rows of a file that stands anywhere, a folder of them or what comes from another command, into a run. More is said below."

    @click.group(cls=Commands)
    def room() -> None:
        """Do things."""

    room.command("import", help=help)(lambda: None)
    told = " ".join(CliRunner().invoke(room, ["--help"]).output.split())
    assert f"Commands: import {help.partition('. ')[0]}." in told


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path) -> None:
    code = (
        "import os, signal, time, click; from sftkit.core.cli import run_command_line\n"
        "def command():\n"
        "    if os.fork() == 0:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "    click.echo(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "run_command_line(click.command()(command))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (130, "143\n")  # a process that was forked off it ends without a word
    assert result.stderr.strip() == "stopped. Everything that finished is kept: the same command goes on from here."


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stop_that_comes_while_an_object_is_taken_apart_is_not_dropped(tmp_path, number: str) -> None:
    """Python ignores what is raised there; an import of transformers takes thousands of a pattern's parts apart."""
    code = (
        "import os, signal, time, click; from sftkit.core.cli import run_command_line\n"
        "class Pattern:\n"
        f"    def __del__(self): os.kill(os.getpid(), signal.{number}); time.sleep(9)\n"
        "def command():\n"
        "    Pattern()\n"
        "    time.sleep(9)\n"
        "    click.echo('went on')\n"
        "run_command_line(click.command()(command))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.strip() == "stopped. Everything that finished is kept: the same command goes on from here."


def test_what_libraries_tell_each_other_is_not_heard(tmp_path) -> None:
    code = (
        "import warnings, click; from sftkit.core.cli import run_command_line\n"
        "def command():\n"
        "    for module in ('transformers.modeling_utils', 'mine'):\n"
        "        warnings.warn_explicit('renamed', FutureWarning, 'x.py', 1, module=module)\n"
        "run_command_line(click.command()(command))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr.count("renamed") == 1
