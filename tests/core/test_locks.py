"""A lock that is waited for, and that processes which were started under it go on holding."""

import fcntl
import logging
import subprocess
from pathlib import Path

import pytest
from sftkit.core.locks import hold_alone


def test_it_is_held_by_all_that_inherited_it_and_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with hold_alone(tmp_path / "lock", "waiting") as number:
        started = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(number,))
    assert started.stdin is not None
    assert not caplog.messages
    with open(tmp_path / "lock", "w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.MonkeyPatch.context() as patch:
        flock = fcntl.flock

        def end_first(file: object, how: int) -> None:
            if how == fcntl.LOCK_EX:
                assert caplog.messages == ["waiting"]
                started.communicate()
            flock(file, how)  # type: ignore[arg-type]

        patch.setattr("fcntl.flock", end_first)
        with hold_alone(tmp_path / "lock", "waiting"):
            assert started.returncode == 0
