"""Files that are whole or absent: written beside their place, flushed to disk, then renamed. Folders that one process writes."""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import DamagedFile, UserError

if TYPE_CHECKING:  # help reads this file, and needs no tables
    import polars as pl

PARQUET = b"PAR1"  # how such a file ends
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error it is flushed and takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        number = _number_of(error, temporary)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _number_of(error: Exception, temporary: Path) -> int | None:
    """Return the system's number of an error while writing that names no file, or `temporary`, or is polars' or numpy's; else None."""
    if isinstance(error, OSError) and error.errno is not None:
        is_ours = error.errno in FULL if error.filename is None else error.filename == str(temporary)
        return error.errno if is_ours else None
    if told := re.search(r"\(os error (\d+)\)", str(error)):
        return int(told[1])
    full = "thrift: transport error" in str(error) or (isinstance(error, OSError) and "written" in str(error))
    return errno.ENOSPC if full else None


def hold_folder(folder: Path, name: str, doing: str) -> IO[str]:
    """Make a folder, if needed, and hold its file `name` for this process until what is returned is closed.

    Raises UserError for a folder that cannot be written or locked, and for one that another process holds: it is `doing` something.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "w")  # noqa: SIM115  held until the caller closes it
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; give another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_ino != os.stat(folder / name).st_ino:  # another has ended meanwhile, and taken its file away
            raise BlockingIOError
    except OSError as error:
        lock.close()
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise UserError(f"{folder}: another process is {doing}; wait for it, or give another folder") from None
        raise UserError(f"{folder}: cannot be locked: {error.strerror}; give a folder on another disk") from None
    return lock


def read_parquet(path: Path, columns: list[str] | None = None) -> "pl.DataFrame":
    """Return a Parquet file of a run as a table, all its columns or some. Raises UserError as `scan_parquet` does."""
    found = scan_parquet(path)
    return (found if columns is None else found.select(columns)).collect()


def scan_parquet(path: Path) -> "pl.LazyFrame":
    """Return a Parquet file of a run as a plan that reads only what is asked of it.

    Its name stands for itself: polars would take `[1]` or `*` in a folder's name for a pattern. Raises UserError for a file that was
    cut short: what reads it would not say which it is.
    """
    import polars as pl

    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(PARQUET)))
        if file.read() != PARQUET:
            raise UserError(f"{path}: damaged or cut short; take it from a copy, or remove it and run the steps again")
    return pl.scan_parquet(path, glob=False)


def clear_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and those below it; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinities raise ValueError: they are no JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file that came from elsewhere. Raises ValueError for one that is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_object(path: Path) -> dict[str, Any]:
    """Return the settings in a JSON file that came with a model; none where there is no such file. Raises UserError for a damaged one."""
    try:
        found = load_json(path) if path.exists() else {}
    except ValueError as error:  # what is not UTF-8 is a ValueError, too
        raise UserError(f"{path}: is not valid JSON ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object; copy the file again")
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file that a step has written. Raises DamagedFile for one that is none any more."""
    try:
        return load_json(path)
    except ValueError as error:
        raise DamagedFile(f"{path}: damaged or cut short ({error}); take it from a copy, or remove it and run the step again") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines that grows; none where there is no file. A last line that was cut off while it was written is left out.

    Raises DamagedFile for another line that is no JSON.
    """
    if not path.exists():
        return []
    lines = [each for each in path.read_text(encoding="utf-8", errors="replace").split("\n") if each]  # a text may hold other ends of lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DamagedFile(f"{path}: line {number} is damaged ({error}); take the file from a copy, or remove it") from error
    return found


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a file of JSON lines atomically."""
    text = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in values)
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # a lone surrogate, as in a file's name, is an escape in JSON too
