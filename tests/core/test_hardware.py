"""Which device is taken, and which is refused."""

import pytest
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


def test_of_the_processors_those_count_that_this_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on a Mac
    assert usable_cores() == 128
