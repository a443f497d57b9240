"""The run folder: one folder that explains itself, refuses to be mixed up with another run, and knows what is done."""

import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from .config import read_yaml
from .errors import UserError
from .files import clear_temporaries, hold_folder, read_json, write_json, write_text
from .hardware import installed_version
from .ledger import Ledger

log = logging.getLogger(__name__)

PACKAGES = ("sftkit", "torch", "transformers", "trl", "datasets", "vllm", "sentence-transformers", "polars", "peft", "accelerate")


class Run:
    """A run folder. `config.yaml` holds one section per step; a step given again with other settings is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path / "ledger.parquet")
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path) -> "Run":
        """Open a run folder for writing, making it if needed, and hold it for this process until `close`.

        Raises UserError for a file, a folder that is not a run, or a run that another process is writing.
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; give a folder for the run")
        if path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").exists() and not (path / "run.lock").exists():
            raise UserError(f"{path}: is not empty and not a run of sftkit; give a new folder")
        run = cls(path)
        run._lock = hold_folder(path, "run.lock", "writing this run")
        clear_temporaries(path)
        if not (path / "config.yaml").exists():
            write_text(path / "config.yaml", "{}\n")
        write_json(path / "versions.json", versions())
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run folder for reading. Raises UserError if it is none."""
        if not (path / "config.yaml").exists():
            raise UserError(f"{path}: is not a run of sftkit (no config.yaml); `sftkit curate distill` or `build` makes one")
        return cls(path)

    def close(self) -> None:
        """Let other processes write this run."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def room(self, name: str) -> Path:
        """Return the folder of a room (curate, train, evaluate), made if needed."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def config(self) -> dict[str, Any]:
        """Return the settings of the steps so far, one section each."""
        return read_yaml(self.path / "config.yaml")

    def configure(self, section: str, settings: Mapping[str, Any], *, free: tuple[str, ...] = ()) -> list[str]:
        """Write a step's settings; return the names of those that differ from last time.

        Settings named in `free` (or all of them, with `free=("*",)`) may change between calls: they do not decide
        what is made. Any other change raises UserError, naming the setting with its old and new value. A setting that is off now and
        was not known to the sftkit that began the folder has not changed.
        """
        config = self.config()
        before = config.get(section)
        changed = [] if before is None else sorted(k for k in {*before, *settings} if not _same(before, settings, k))
        fixed = [name for name in changed if name not in free and free != ("*",)]
        if fixed and before is not None:
            told = "; ".join(each for name in fixed for each in _differences(f"{section}.{name}", before.get(name), settings.get(name)))
            raise UserError(f"{self.path}: this folder holds another run ({told}); give another folder, or the settings it began with")
        if changed or before is None:
            config[section] = dict(settings)
            write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return changed


def _same(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    """Say whether a setting is what it was; one that is off (False, None) and was not known before is."""
    if name not in before:
        return now[name] is None or now[name] is False
    one, other = before[name], now.get(name)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_same(one, other, each) for each in {*one, *other})
    return bool(one == other)


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """Say how a setting differs; of settings within settings only those that do."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before and now:
        names = [each for each in {**before, **now} if not _same(before, now, each)]
        return [told for each in names for told in _differences(f"{name}.{each}", before.get(each), now.get(each))]
    return [f"{name} was {before!r}, now {now!r}"]


def is_done(folder: Path) -> bool:
    """Say whether a step finished: its `done.json` is written last."""
    return (folder / "done.json").exists()


def mark_done(folder: Path, **facts: Any) -> None:
    """Write `done.json`, after everything else in the folder."""
    write_json(folder / "done.json", facts)


def read_done(folder: Path) -> dict[str, Any]:
    """Return the facts that `mark_done` wrote."""
    return read_json(folder / "done.json")


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cpus": str(os.cpu_count())}
    return {**found, **{package: installed_version(package) for package in PACKAGES}}
