"""The store of samples: a finished answer is on disk within a second, and what is committed never changes."""

import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import polars as pl
from polars.io.plugins import register_io_source

from .engines.base import Sampling
from .errors import UserError
from .example import Message, Sample
from .files import write_atomically

SCHEMA_VERSION = 2  # of the file; 2 adds reasoning and prompt_tokens
KEY_VERSION = 1  # of what a key holds: another one makes every stored sample worthless
COMMIT_SAMPLES = 256
COMMIT_SECONDS = 0.8  # a commit takes some time too: together they stay below a second
CACHE_KIBIBYTES = 256 << 10  # taken as it is needed: the index of 5 million keys
CHECKPOINT_PAGES = 16_384  # of 4 KiB
PART = 65_536  # rows that are read at once

SCHEMA = """
create table settings (
    sampling_key text primary key,
    name text not null,
    settings text not null
) without rowid;
create table samples (
    key blob primary key not null,
    example_id text not null,
    sample_index integer not null,
    sampling_key text not null references settings,
    text text not null,
    finish_reason text not null,
    num_tokens integer not null,
    logprob real,
    reasoning text,
    prompt_tokens integer
);
create table failures (
    key blob primary key not null,
    example_id text not null,
    sample_index integer not null,
    error text not null,
    times integer not null
) without rowid;
"""

FRAME = {
    "key": pl.String,
    "example_id": pl.String,
    "sample_index": pl.Int32,
    "text": pl.String,
    "finish_reason": pl.String,
    "num_tokens": pl.Int64,
    "logprob": pl.Float64,
    "model": pl.String,
    "sampling_key": pl.String,
    "reasoning": pl.String,
    "prompt_tokens": pl.Int64,
}
SAMPLES = (  # the columns of FRAME
    "select lower(hex(key)), example_id, sample_index, text, finish_reason, num_tokens, logprob, name, sampling_key, reasoning,"
    " prompt_tokens from samples join settings using (sampling_key)"
)
FAILURES = {"key": pl.String, "example_id": pl.String, "sample_index": pl.Int32, "error": pl.String, "times": pl.Int64}


def sample_key(*, prompt: Sequence[int] | Sequence[Message], model_identity: str, sampling: Sampling, index: int) -> str:
    """Return the key of one sample: 64 hex digits, the SHA-256 of everything that decides it and of nothing else.

    `prompt` is the rendered token ids, or the messages where a server renders them.
    """
    decisive = {"schema": KEY_VERSION, "prompt": _digest(prompt), "index": index, **decisive_settings(model_identity, sampling)}
    return hashlib.sha256(_canonical(decisive)).hexdigest()


def decisive_settings(model_identity: str, sampling: Sampling) -> dict[str, Any]:
    """Return what the key of a sample holds beside its prompt and its index."""
    # what is not used is not in the key: keys from before there was any stay valid
    schema = {} if sampling.json_schema is None else {"json_schema": sampling.json_schema}
    stop = {"stop": list(sampling.stop)} if sampling.stop else {}
    return {
        "model": model_identity,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        **schema,
        **stop,
    }


def sampling_key(settings: Mapping[str, Any]) -> str:
    """Return the name of a set of settings that many samples share: 16 hex digits of their hash."""
    return hashlib.sha256(_canonical({"schema": KEY_VERSION, **settings})).hexdigest()[:16]


def sample_seed(key: str) -> int:
    """Return the seed of a sample's own stream of random numbers, below 2**63."""
    return int(key[:16], 16) >> 1


def _digest(prompt: Sequence[int] | Sequence[Message]) -> str:
    if prompt and isinstance(prompt[0], Mapping):
        return "messages:" + hashlib.sha256(_canonical(list(prompt))).hexdigest()
    ids = array("I", cast("Sequence[int]", prompt))  # four bytes an id
    if sys.byteorder == "big":
        ids.byteswap()
    return "ids:" + hashlib.sha256(ids.tobytes()).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("utf-8", "surrogatepass")


class SampleStore:
    """The samples of a run, one SQLite file. Reads see what is committed; `writer` alone writes.

    Raises UserError for a file that is damaged, of something else, or written by a newer sftkit. One of no bytes is what a kill leaves
    while it is made, and taken for new, unless it has been `made` before.
    """

    def __init__(self, path: Path, *, made: bool = False) -> None:
        self.path = path
        if made and path.exists() and not path.stat().st_size:
            raise _damaged(path, "it holds no byte")
        with mendable(path):
            self._connection = _connect(path)
            self._prepare()

    def _prepare(self) -> None:
        (version,) = self._connection.execute("pragma user_version").fetchone()
        (tables,) = self._connection.execute("select count(*) from sqlite_master").fetchone()
        if version == 0 and tables == 0:
            self._connection.execute("pragma journal_mode = wal")
            self._connection.executescript(f"begin immediate; {SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit;")
        elif version == 0:
            raise UserError(f"{self.path}: is a database of something else, not a store of samples; move it away")
        elif version > SCHEMA_VERSION:
            raise UserError(
                f"{self.path}: was written by a newer sftkit (schema {version}; this one reads {SCHEMA_VERSION}); upgrade sftkit"
            )
        elif version == 1 and _writable(self.path):
            self._migrate()
        _read_version_1(self._connection)

    def _migrate(self) -> None:
        """Add what is new in version 2, unless another process has just done so."""
        self._connection.execute("begin immediate")
        if self._connection.execute("pragma user_version").fetchone() == (1,):
            self._connection.execute("alter table samples add column reasoning text")
            self._connection.execute("alter table samples add column prompt_tokens integer")
            self._connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        self._connection.execute("commit")

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the last one out folds the write-ahead log into it."""
        self._connection.close()

    def keys(self) -> set[str]:
        """Return the keys of all samples."""
        return {key for (key,) in self._rows("select lower(hex(key)) from samples")}

    def count(self) -> int:
        """Return how many samples there are."""
        return int(next(self._rows("select count(*) from samples"))[0])

    def frame(self) -> pl.DataFrame:
        """Return all samples, columns as in FRAME, sorted by example_id and sample_index."""
        found = self._frame(SAMPLES, FRAME)
        return found.sort("example_id", "sample_index", "sampling_key")

    def tokens(self) -> tuple[int, int]:
        """Return the tokens of all answers, and those of the prompts they were answers to, a prompt counted for each."""
        written, read = next(self._rows("select coalesce(sum(num_tokens), 0), coalesce(sum(prompt_tokens), 0) from samples"))
        return int(written), int(read)

    def export(self, path: Path) -> int:
        """Write all samples to a Parquet file, columns as in FRAME, in the order of their keys; return how many.

        Memory holds a few parts of 65,536 rows, however many there are. Samples that are added meanwhile are left out.
        """
        written = 0

        def parts(columns: list[str] | None, *_: object) -> Iterator[pl.DataFrame]:
            nonlocal written
            with mendable(self.path):
                connection = _connect(self.path, any_thread=True)  # polars pulls from several threads, one at a time
                try:
                    _read_version_1(connection)
                    for part in _parts(connection, f"{SAMPLES} order by key", FRAME):
                        written += part.height
                        yield part.select(columns) if columns else part
                finally:
                    connection.close()

        with write_atomically(path) as temporary:
            register_io_source(parts, schema=FRAME).sink_parquet(temporary, row_group_size=PART, engine="streaming")
        return written

    def failures(self) -> pl.DataFrame:
        """Return the samples that failed and have not succeeded since, columns as in FAILURES."""
        found = self._frame("select lower(hex(key)), example_id, sample_index, error, times from failures", FAILURES)
        return found.sort("example_id", "sample_index", "key")

    def settings(self) -> list[tuple[str, str, dict[str, Any], int]]:
        """Return (sampling_key, name of the model, settings, number of samples) of each set of settings, most samples first."""
        found = self._rows(
            "select sampling_key, name, settings, (select count(*) from samples s where s.sampling_key = settings.sampling_key) as num"
            " from settings order by num desc, sampling_key"
        )
        return [(key, name, json.loads(text), num) for key, name, text, num in found]

    def remember(self, name: str, settings: Mapping[str, Any]) -> str:
        """Store a set of settings and the name of its model once, durably; return its `sampling_key`."""
        key = sampling_key(settings)
        with mendable(self.path, self.count):
            text = json.dumps(dict(settings), ensure_ascii=False, sort_keys=True)
            self._connection.execute("insert into settings values (?, ?, ?) on conflict do nothing", (key, name, text))
        return key

    def check(self) -> None:
        """Let SQLite check every page. Raises UserError if one is damaged."""
        found = [line for (line,) in self._rows("pragma integrity_check")]
        if found != ["ok"]:
            raise _damaged(self.path, found[0])

    def writer(self, on_durable: Callable[[int, int], None] | None = None) -> "SampleWriter":
        """Return the writer. It calls `on_durable(samples, tokens)`, in its own thread, once they are committed."""
        return SampleWriter(self.path, on_durable or (lambda samples, tokens: None), kept=self.count())

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        with mendable(self.path):
            yield from self._connection.execute(query)

    def _frame(self, query: str, schema: Mapping[str, Any]) -> pl.DataFrame:
        with mendable(self.path):
            return pl.concat([pl.DataFrame(schema=schema), *_parts(self._connection, query, schema)])


class SampleWriter:
    """Takes finished samples and commits them in groups, in a thread of its own. Use as a context manager.

    What goes wrong in the thread (a full disk) is raised by the next `put`, or at the end of the block: never lost.
    """

    def __init__(self, path: Path, on_durable: Callable[[int, int], None], *, kept: int) -> None:
        self.path = path
        self._on_durable = on_durable
        self._kept = kept
        self._condition = threading.Condition()
        self._waiting: list[tuple[Any, ...]] = []
        self._since = 0.0  # when the oldest waiting row was handed over
        self._closing = False
        self._error: Exception | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="sample-writer", daemon=True)

    def __enter__(self) -> "SampleWriter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()
        if self._error and not self._told:
            raise self._error

    def put(self, key: str, sample: Sample) -> None:
        """Hand over a finished sample, of settings that `remember` stored. One whose key is already stored changes nothing."""
        text = _storable(sample.text)
        reasoning = None if sample.reasoning is None else _storable(sample.reasoning)
        row = (sample.example_id, sample.index, sample.sampling_key, text, sample.finish_reason, sample.num_tokens, sample.logprob)
        self._put((bytes.fromhex(key), *row, reasoning, sample.prompt_tokens))

    def put_failure(self, key: str, example_id: str, index: int, error: str) -> None:
        """Hand over why a sample could not be made; a later success takes it away again."""
        self._put((bytes.fromhex(key), example_id, index, _storable(error)))

    def _put(self, row: tuple[Any, ...]) -> None:
        with self._condition:
            # a disk that is slower than the engine holds the engine up, instead of filling the memory
            self._condition.wait_for(lambda: self._error is not None or len(self._waiting) < 16 * COMMIT_SAMPLES)
            if self._error:
                self._told = True
                raise self._error
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(row)
            if len(self._waiting) in (1, COMMIT_SAMPLES):
                self._condition.notify_all()

    def _run(self) -> None:
        try:
            with mendable(self.path, lambda: self._kept):
                connection = _connect(self.path)
                # keys are hashes, so that every group touches pages all over their index: keep them, and write them back seldom
                connection.execute(f"pragma cache_size = -{CACHE_KIBIBYTES}")
                connection.execute(f"pragma wal_autocheckpoint = {CHECKPOINT_PAGES}")
                try:
                    connection.execute("delete from failures where false")  # says at once that nothing can be written here
                    while rows := self._next_group():
                        samples, tokens = _commit(connection, rows)
                        self._kept += samples
                        self._on_durable(samples, tokens)
                finally:
                    connection.close()
        except Exception as error:  # noqa: BLE001  whatever it is, the thread that puts has to raise it
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _next_group(self) -> list[tuple[Any, ...]]:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._closing)
            left = self._since + COMMIT_SECONDS - time.monotonic()
            self._condition.wait_for(lambda: len(self._waiting) >= COMMIT_SAMPLES or self._closing, timeout=left)
            rows, self._waiting = self._waiting, []
            self._condition.notify_all()
            return rows


def _parts(connection: sqlite3.Connection, query: str, schema: Mapping[str, Any]) -> Iterator[pl.DataFrame]:
    cursor = connection.execute(query)
    while rows := cursor.fetchmany(PART):
        columns = zip(schema.items(), zip(*rows, strict=True), strict=True)
        yield pl.DataFrame([pl.Series(name, values, kind) for (name, kind), values in columns])


def _commit(connection: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> tuple[int, int]:
    """Write one group in one transaction; return how many samples and tokens are new and now durable."""
    samples = tokens = 0
    connection.execute("begin immediate")
    try:
        for row in rows:
            if len(row) == 4:
                query = "insert into failures select ?, ?, ?, ?, 1 where not exists (select 1 from samples where key = ?)"
                connection.execute(query + " on conflict do update set error = excluded.error, times = times + 1", (*row, row[0]))
            elif connection.execute("insert into samples values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing", row).rowcount:
                samples, tokens = samples + 1, tokens + row[6]
                connection.execute("delete from failures where key = ?", row[:1])
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back when the disk is full
            connection.execute("rollback")
        raise
    return samples, tokens


def _writable(path: Path) -> bool:
    return os.access(path.parent, os.W_OK) or not path.exists()


def _connect(path: Path, *, any_thread: bool = False) -> sqlite3.Connection:
    if _writable(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=not any_thread)
        connection.execute("pragma synchronous = full")
        connection.execute("pragma foreign_keys = on")  # a sample without its settings would be missing from `frame`
        return connection
    # in a folder that cannot be written SQLite reads a write-ahead log only if it lies there, and needs none if it does not
    log = path.with_name(path.name + "-wal")
    way = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    return sqlite3.connect(f"file:{quote(str(path))}?{way}", uri=True, isolation_level=None, check_same_thread=not any_thread)


def _read_version_1(connection: sqlite3.Connection) -> None:
    """Let a connection that cannot migrate read what version 1 holds as version 2 holds it."""
    if connection.execute("pragma user_version").fetchone() == (1,):
        connection.execute("create temp view samples as select *, null as reasoning, null as prompt_tokens from main.samples")


@contextmanager
def mendable(path: Path, kept: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn SQLite's errors into a UserError that says what is kept (as `kept` counts it) and what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(error)) from error
        safe = ""
        if kept is not None:
            try:
                safe = f"; {kept():,} samples are safe in it"
            except (sqlite3.DatabaseError, UserError):
                safe = ""
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            cause, cure = "the disk is full or does not take writes", "free some space and run the same command again"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            cause, cure = "cannot be opened for writing", "make the folder writable, or give another one"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            cause, cure = "another program holds it", "close that program and run the same command again"
        else:
            raise
        raise UserError(f"{path}: {cause} ({error}){safe}; {cure}") from error


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: is damaged ({' '.join(found.split())}); nothing was written to it. Move it away and run the same command again to make"
        f" its samples anew, or save what is left with `sqlite3 {path.name} .recover`"
    )


def _storable(text: str) -> str:
    """Replace half surrogate pairs, which a server can send and UTF-8 cannot hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
