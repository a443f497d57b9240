"""What this machine computes with: which device, which number format is fast there, and which packages."""

import importlib.metadata
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

CONTROL = Path("/sys/fs/cgroup")  # of this process's container
SECONDS_BETWEEN_LOOKS = 1.0  # at what a GPU does


def pick_device(wanted: str | None = None) -> str:
    """Return the device to compute on: the one that is wanted, else a GPU where there is one, else the CPU.

    Raises UserError for what is no device, and for a GPU that is not there.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device {wanted}: expected cpu, cuda or cuda:NUMBER") from None
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {wanted}: this machine has no usable GPU; leave --device out, or give cpu")
    if device.type == "cuda" and device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise UserError(f"device {wanted}: the GPUs of this machine are numbered from 0 to {count - 1}")
    return wanted


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows each usable GPU."""
    import torch

    named = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(number) for number in range(count)]


def gpu_memory(name: str) -> tuple[float, float] | None:
    """Return (free, total) GiB of a GPU, as `visible_gpus` names it, without taking any of it; None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits", f"--id={name}"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        free, total = (float(each) / 1024 for each in told.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):  # no such program, an old driver, a card that keeps it to itself
        return None
    return free, total


class GpuBusy:
    """The share of time in which GPUs computed anything, by nvidia-smi, once a second while it is entered; all times count together."""

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        """`gpus`: as `visible_gpus` names them."""
        self._query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={','.join(gpus)}"]
        self._told = bool(gpus) and shutil.which("nvidia-smi") is not None
        self._percent: list[float] = []

    @property
    def share(self) -> float | None:
        """Return the mean, 0 to 1; None where nothing was told."""
        return sum(self._percent) / len(self._percent) / 100 if self._percent else None

    def __enter__(self) -> "GpuBusy":
        """Begin to ask."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._ended,), name="sftkit-gpu-busy", daemon=True)
        self._thread.start()
        return self

    def _watch(self, ended: threading.Event) -> None:
        while self._told and not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                told = subprocess.run(self._query, capture_output=True, text=True, check=True, timeout=30).stdout
                self._percent += map(float, told.split())
            except (OSError, subprocess.SubprocessError, ValueError):  # a card may keep it to itself
                self._told = False

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._ended.set()
        self._thread.join()


def half_precision(device: str) -> Any:
    """Return the 16-bit torch dtype that a device multiplies by itself: bfloat16, float16 on older GPUs, None on older CPUs."""
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return None
    return torch.bfloat16


def measured_peak(device: str) -> float:
    """Return the floating-point operations a second that a device reaches in a large 16-bit matrix product, measured: 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0.0
    import torch

    size, dtype = 8192, half_precision(device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        left @ right
    start.record()
    for _ in range(10):
        left @ right
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (start.elapsed_time(end) / 1000)


def usable_cores() -> int:
    """Return on how many processors this process may run: those it was given, not those of the machine, and a container's share of time."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(given, _share_of_time())))


def _share_of_time() -> float:
    """Return how many processors' time a container has, as Docker and Kubernetes limit it (cgroups v2, v1)."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if all((CONTROL / name).is_file() for name in names):
            quota, period = " ".join((CONTROL / name).read_text() for name in names).split()
            return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    return math.inf


def installed_version(package: str) -> str | None:
    """Return a package's version; None where none is installed, or by another name, as what is built from source may be."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
