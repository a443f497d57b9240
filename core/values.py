"""Numbers that were expensive to compute, by the hash of what decides them: computed once, kept through a kill."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .store import mendable

VERSION = 1
SCHEMA = "create table if not exists vals (key blob primary key not null, numbers blob not null, text text not null) without rowid;"


def value_key(*decisive: Any) -> str:
    """Return the key of what these settings decide: 64 hex digits. They are written as JSON."""
    written = json.dumps([VERSION, *decisive], ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()


class ValueStore:
    """Numbers (float32), and a text where there is one, by key, in one SQLite file. Use as a context manager.

    What `put` has returned from outlives a kill of the process; a power cut may cost the last seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with mendable(path):
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=30)
            (version,) = self._connection.execute("pragma user_version").fetchone()
            if version > VERSION:
                raise UserError(f"{path}: was written by a newer sftkit (schema {version}; this one reads {VERSION}); upgrade sftkit")
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = normal")
            self._connection.executescript(f"{SCHEMA} pragma user_version = {VERSION};")

    def __enter__(self) -> "ValueStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return which of these keys are stored."""
        with mendable(self.path):
            return {key for key in set(keys) if self._row(key) is not None}

    def __contains__(self, key: str) -> bool:
        with mendable(self.path):
            return self._row(key) is not None

    def __getitem__(self, key: str) -> NDArray[np.float32]:
        return self.entry(key)[0]

    def entry(self, key: str) -> tuple[NDArray[np.float32], str]:
        """Return the numbers of a key and its text. Raises KeyError where it is not stored."""
        with mendable(self.path):
            row = self._row(key)
        if row is None:
            raise KeyError(key)
        return np.frombuffer(row[0], dtype="<f4"), row[1]

    def put(self, key: str, numbers: Sequence[float], text: str = "") -> None:
        """Store numbers, and a text; a key that is stored already keeps what it has."""
        blob = np.asarray(numbers, dtype="<f4").tobytes()
        clean = text.encode("utf-8", "replace").decode()
        with mendable(self.path):
            self._connection.execute("insert into vals values (?, ?, ?) on conflict do nothing", (bytes.fromhex(key), blob, clean))

    def _row(self, key: str) -> tuple[bytes, str] | None:
        found = self._connection.execute("select numbers, text from vals where key = ?", (bytes.fromhex(key),)).fetchone()
        return None if found is None else (found[0], found[1])
