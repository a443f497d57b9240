"""Which device is taken, and which is refused."""

from pathlib import Path

import pytest
from sftkit.core import hardware
from sftkit.core.errors import UserError
from sftkit.core.hardware import pick_device, usable_cores


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [pick_device(each) for each in (None, "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(UserError, match="device cuda:2: the GPUs of this machine are numbered from 0 to 1"):
        pick_device("cuda:2")
    with pytest.raises(UserError, match="expected cpu, cuda or cuda:NUMBER"):
        pick_device("gpu0")


def test_of_the_processors_those_count_that_this_process_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "CONTROL", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on a Mac
    assert usable_cores() == 128
    for told, cores in (("max 100000\n", 128), ("150000 100000\n", 2), ("5000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(told)
        assert usable_cores() == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in ((-1, 128), (400_000, 4)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert usable_cores() == cores
