"""Rows rendered once: kept by what decides them, so that the next run on the same data begins at once."""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from .. import __version__
from ..core.catalogue import cache_dir
from ..core.chat import Chat
from ..core.example import Example
from ..core.files import read_json, write_json
from ..core.run import is_done, mark_done
from ..core.sources import kind_of
from .account import prepare, say
from .config import PreferenceConfig, TrainConfig
from .data import DataReport, Row, TrainingData
from .mixture import Mixture, read_mixture
from .parity import checked
from .scores import read_scored, score_files

log = logging.getLogger(__name__)

SCHEMA = 7  # counts up when the same rows would be rendered, stored or reported otherwise
LEAST_ROWS = 5_000  # fewer are rendered in seconds
KEPT = 8  # preparations
ABANDONED = 24 * 3600.0  # seconds after which what was half written will not be finished
DECISIVE = (  # settings
    *("max_length", "overlong", "train_on", "mask_thinking", "mask_tool_calls", "validation", "limit", "seed", "weight_by", "curriculum"),
)


class Preparation:
    """The rows of a data source as they are trained on: from the cache where they are in it, else rendered and put there."""

    def __init__(
        self,
        data: str | Path | Sequence[str],
        chat: Chat,
        config: TrainConfig,
        *,
        context: int | None,
        vocabulary: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """Look into the cache; read the rows where they are not in it. Raises UserError as `read_examples` does."""
        self.data, self.chat, self.config, self.context, self.vocabulary = data, chat, config, context, vocabulary
        pairs = isinstance(config, PreferenceConfig)  # few enough to be rendered each time
        mixed = not isinstance(data, (str, Path))
        key = None if pairs or mixed else _key(str(data), chat, config, context, vocabulary)
        self.place = (cache or cache_dir() / "prepared") / key if key else None
        self._mixture = Mixture()
        self._examples: list[Example] | None = None
        if isinstance(data, (str, Path)):
            self._examples = None if self.place and is_done(self.place) else read_scored(data, config)
        else:
            self._examples, self._mixture = read_mixture(data, config.seed, config.limit, lambda source: read_scored(source, config))

    def rows(self, ledger: Path | None = None) -> TrainingData:
        """Return them, with a decision for each in `ledger`, a file. Raises UserError as `prepare` does."""
        if self._examples is None:
            found = self._kept(ledger)
            if found:
                return found
            self._examples = read_scored(str(self.data), self.config)
        keeps = self.place is not None and len(self._examples) >= LEAST_ROWS
        if keeps and self.place:
            self.place.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.place.with_name(f".{self.place.name}.{os.getpid()}.tmp") if self.place and keeps else None
        where = scratch / "ledger.parquet" if scratch else ledger
        try:
            made = prepare(
                self._examples,
                self.chat,
                self.config,
                context=self.context,
                vocabulary=self.vocabulary,
                ledger=where,
                mixture=self._mixture,
            )
            if scratch:
                if ledger:
                    ledger.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(scratch / "ledger.parquet", ledger)
                self._keep(scratch, made)
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
        return made

    def _kept(self, ledger: Path | None) -> TrainingData | None:
        """Return the rows that are in the cache; None where its files are gone or damaged: another process may take old ones out."""
        assert self.place
        try:
            found = _load(self.place)
            if ledger:
                ledger.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.place / "ledger.parquet", ledger)
            os.utime(self.place)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            log.warning("data: %s cannot be read (%s): the rows are rendered again", self.place, error)
            shutil.rmtree(self.place, ignore_errors=True)
            return None
        log.info("data: rendered before, taken from %s", self.place)
        say(found.report)
        return found

    def _keep(self, scratch: Path, made: TrainingData) -> None:
        assert self.place
        try:
            _save(scratch, made)
            if not is_done(self.place):  # else another process was first, and a third may be reading it
                shutil.rmtree(self.place, ignore_errors=True)
                os.replace(scratch, self.place)
            _tidy(self.place.parent)
        except OSError as error:  # a full disk, or others that tidy up: the rows are here all the same
            log.warning("the cache of rendered rows: %s", error)


def _tidy(cache: Path) -> None:
    """Take the oldest preparations out of the cache, and what processes left in it that were killed."""
    old = sorted((each for each in cache.iterdir() if is_done(each) and each.suffix != ".tmp"), key=lambda each: -each.stat().st_mtime)
    left = [each for each in cache.glob(".*.tmp") if time.time() - each.stat().st_mtime > ABANDONED]
    for each in [*old[KEPT:], *left]:
        shutil.rmtree(each, ignore_errors=True)


def load_rows(
    data: str | Path | Sequence[str],
    chat: Chat,
    config: TrainConfig,
    *,
    context: int | None,
    vocabulary: int | None = None,
    cache: Path | None = None,
) -> TrainingData:
    """Return the rows of a data source as they are trained on; see `Preparation`."""
    return Preparation(data, chat, config, context=context, vocabulary=vocabulary, cache=cache).rows()


def _key(data: str, chat: Chat, config: TrainConfig, context: int | None, vocabulary: int | None) -> str | None:
    """Return a hash of all that decides what the rows become; None for data that is not in files here, or a tokenizer without one."""
    files = list(_files(Path(data).expanduser()))
    if not files or not chat.tokenizer.is_fast:
        return None
    digest = hashlib.sha256()
    for file in [*files, *score_files(data, config)]:
        with open(file, "rb") as opened:
            digest.update(f"{file}\0".encode() + hashlib.file_digest(opened, "sha256").digest())
    decisive = {
        "schema": SCHEMA,
        "versions": [__version__, *(importlib.metadata.version(each) for each in ("transformers", "tokenizers"))],
        "chat": [chat.fingerprint(), chat.name],
        "settings": {name: getattr(config, name) for name in DECISIVE},
        "limits": [context, vocabulary],
    }
    digest.update(json.dumps(decisive, sort_keys=True).encode())
    digest.update(chat.tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _files(path: Path) -> Iterator[Path]:
    """Yield the files that may hold the rows of a path, in order."""
    made = path / "curate" / "dataset.jsonl"
    if path.is_file() and kind_of(path):
        yield path
    elif made.exists():
        yield made
    elif path.is_dir() and not (path / "config.yaml").exists():
        yield from sorted(each for each in path.rglob("*") if each.is_file())


def _save(folder: Path, made: TrainingData) -> None:
    rows = [*made.train, *made.validation]
    np.save(folder / "tokens.npy", np.concatenate([row.tokens for row in rows]))
    np.save(folder / "trained.npy", np.concatenate([row.trained for row in rows]))
    if any(row.written is not row.trained for row in rows):
        np.save(folder / "written.npy", np.concatenate([row.written for row in rows]))
    asked = {id(row) for row in checked(rows)}
    table = pl.DataFrame(
        {
            "example_id": [row.key[0] for row in rows],
            "sample_index": [row.key[1] for row in rows],
            "source": [row.source for row in rows],
            "length": [len(row) for row in rows],
            "weight": [row.weight for row in rows],
            "score": [row.score for row in rows],
            "messages": [json.dumps(list(row.messages)) if id(row) in asked else None for row in rows],
            "tools": [json.dumps(list(row.tools)) if id(row) in asked else None for row in rows],
        },
        schema={
            **{"example_id": pl.String, "sample_index": pl.Int64, "source": pl.String, "length": pl.Int64},
            **{"weight": pl.Float64, "score": pl.Float64, "messages": pl.String, "tools": pl.String},
        },
    )
    table.write_parquet(folder / "rows.parquet")
    write_json(folder / "report.json", made.report.facts())
    mark_done(folder)


def _load(folder: Path) -> TrainingData:
    names = ("tokens", "trained", *(("written",) if (folder / "written.npy").exists() else ()))
    files = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
    tokens, trained, *written = (each.view(np.ndarray) for each in files)  # whose parts are taken in half the time
    table = pl.read_parquet(folder / "rows.parquet", glob=False)
    ends = table["length"].cum_sum().to_list()
    facts = read_json(folder / "report.json")
    facts.pop("trained_share")
    report = DataReport(**{**facts, "warnings": tuple(facts["warnings"])})
    rows = []
    for (name, index, source, length, weight, score, messages, tools), end in zip(table.iter_rows(), ends, strict=True):
        row = Row((name, index), tokens[end - length : end], trained[end - length : end], source, json.loads(messages) if messages else ())
        if written:
            row.written = written[0][end - length : end]
        row.weight, row.score, row.tools = weight, score, json.loads(tools) if tools else ()
        rows.append(row)
    return TrainingData(rows[: report.train_rows], rows[report.train_rows :], report)
