"""What this machine and this installation can do, and what to mend: the facts behind `sftkit doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from .catalogue import cache_dir
from .hardware import installed_version, usable_cores

LITTLE_DISK = 5 << 30  # bytes; a small model, its checkpoints and its final weights
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes
EXTRAS = {  # what is gained by each extra
    "vllm": "distillation and evaluation several times as fast on a GPU",
    "quant": "--qlora",
    "math": "answers compared as mathematics, beyond numbers",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. A problem keeps sftkit, or a part that was asked for, from working; a note says what is not to be had here."""

    level: Literal["ok", "note", "problem"]
    about: str
    text: str


def examine() -> Iterator[Finding]:
    """Yield what is found, the installation first; nothing is changed and nothing is fetched."""
    machine = f"{platform.system()} {platform.machine()}, {usable_cores()} cores, {_memory()}"
    yield Finding("ok", "python", f"{platform.python_version()} on {machine}")
    yield from _packages()
    yield from _torch()
    yield from _sandbox()
    yield from _disk()
    yield from _hub()


def _memory() -> str:
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        most = min(most, int(MEMORY_LIMIT.read_text()))
    except (OSError, ValueError):  # there is none, or it is "max"
        pass
    return f"{most / 2**30:.0f} GiB of memory"


def _packages() -> Iterator[Finding]:
    """Hold what is installed against what sftkit's own metadata asks for."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("sftkit") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "packages", "sftkit runs from a folder and is not installed: what it needs is not known, and not looked for")
        return
    found, right = [], True
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            right = False
            have = "is not installed" if version is None else f"{version} is installed"
            yield Finding("problem", each.name, f"{have}, sftkit needs {each.specifier}: pip install '{each.name}{each.specifier}'")
        else:
            found.append(f"{each.name} {version}")
    if right:
        yield Finding("ok", "packages", ", ".join(found))
    for extra, gain in EXTRAS.items():
        needs = [each for each in wanted if each.marker is not None and re.search(rf"""extra == ["']{extra}["']""", str(each.marker))]
        missing = [each.name for each in needs if installed_version(each.name) is None]
        if missing:
            yield Finding("note", extra, f"{', '.join(missing)} is not installed; it brings {gain}: pip install 'sftkit[{extra}]'")
        else:
            yield Finding("ok", extra, ", ".join(f"{each.name} {installed_version(each.name)}" for each in needs))


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of the system is missing, or of another kind
        yield Finding("problem", "torch", f"does not load: {str(error).splitlines()[0]}")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            free, _ = torch.cuda.mem_get_info(number)
            half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16, no bfloat16"
            text = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free, computes in {half}"
            yield Finding("ok", f"GPU {number}", text)
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda
        cure = f"its CUDA {built} does not find the card: is the driver older than that?" if built else "it is a build for CPUs"
        yield Finding("problem", "GPU", f"there is one, and torch {torch.__version__} cannot use it: {cure}")
    else:
        yield Finding("note", "GPU", "none: models of some hundred million parameters can be trained here, larger ones want a GPU")


def _sandbox() -> Iterator[Finding]:
    from .checks import sandbox

    reason = sandbox.available()
    if reason is None:
        yield Finding("ok", "sandbox", "programs that models write can be run")
    else:
        yield Finding("note", "sandbox", f"programs that models write are not run here: {reason}")


def _disk() -> Iterator[Finding]:
    places = {"this folder": Path.cwd(), "sftkit's cache": cache_dir()}
    for name, place in places.items():
        there = next(each for each in (place, *place.parents) if each.exists())
        free = shutil.disk_usage(there).free
        level: Literal["ok", "note"] = "note" if free < LITTLE_DISK else "ok"
        yield Finding(level, "disk", f"{free / 2**30:,.0f} GiB free for {name}, {place}")
        if not os.access(there, os.W_OK):
            cure = ": SFTKIT_CACHE names another place for the cache" if place == cache_dir() else ""
            yield Finding("problem", "disk", f"{there} may not be written by this user{cure}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "Hub", "HF_HUB_OFFLINE is set: models and data come from this machine alone")
    else:
        token = "a token is there" if get_token() else "no token: models that ask for one want `hf auth login`"
        yield Finding("ok", "Hub", f"asked only for what you name; {token}")
