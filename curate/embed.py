"""Turn the texts of rows into unit vectors, each text once: what was embedded before is read from the run's folder."""

import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.engines.base import EmbeddingEngine, EmbedRequest, EngineConfig
from ..core.engines.embedder import open as open_here
from ..core.engines.registry import open_embedder
from ..core.errors import DamagedFile, UserError
from ..core.files import read_parquet, write_atomically
from ..core.hardware import half_precision, pick_device
from ..core.models import model_identity, resolve_model
from ..core.progress import Progress
from ..core.run import Run
from .decide_config import EmbedConfig
from .rows import split_texts
from .similarity import Vectors, unit_vectors

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 30.0


def embed_rows(run: Run, rows: pl.DataFrame, on: str, config: EmbedConfig) -> Vectors:
    """Return one unit vector per row, in order; keep them in curate/embeddings.npy, by the text and what embeds it.

    System turns are left out: one that all rows share would make them all alike, and use up the tokens that are read.
    """
    identity = model_identity(resolve_model(config.model))
    dtype = _resolve_dtype(config)
    texts = [embedded_text(messages, on) for messages in rows["messages"]]
    settings = json.dumps([identity, config.max_seq_length, dtype])
    names = [hashlib.sha256(f"{settings}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts]
    store = EmbeddingStore(run.room("curate"), identity)
    fresh = {name: text for name, text in zip(names, texts, strict=True) if name not in store.places}
    if fresh:
        if store.places:
            log.info("embed: %s of %s texts are embedded already", f"{len(set(names)) - len(fresh):,}", f"{len(set(names)):,}")
        _embed(fresh, store, dtype, config)
    run.configure("embed", {**to_mapping(config), "identity": identity, "dtype": dtype}, free=("*",))
    return store.vectors([store.places[name] for name in names])


def embedded_text(messages: str, on: str) -> str:
    """Return the text of a conversation, given as JSON, that is embedded: without system turns, and without the answer for "prompt"."""
    turns = [message for message in json.loads(messages) if message.get("role") != "system"]
    prompt, response = split_texts(turns)
    return prompt if on == "prompt" or response is None else f"{prompt}\n{response}"


def stored_vectors(folder: Path) -> tuple[pl.DataFrame, Vectors] | None:
    """Return the names (columns name, model) and the vectors that a run's folder keeps, read from disk as they are used; None without.

    Raises DamagedFile for vectors that were cut short.
    """
    matrix = folder / "embeddings.npy"
    if not matrix.exists() or not (folder / "embeddings.parquet").exists():
        return None
    table = read_parquet(folder / "embeddings.parquet")
    try:
        vectors = np.load(matrix, mmap_mode="r")
    except (ValueError, EOFError):
        vectors = None
    if vectors is None or len(vectors) < len(table):
        raise DamagedFile(f"{matrix}: damaged or cut short; take it from a copy, or remove it: what is needed is embedded again")
    return table, vectors[: len(table)]


class EmbeddingStore:
    """Vectors of one embedder by name, in embeddings.npy and embeddings.parquet. They are only ever added to.

    The table of names is written after the vectors, so that a crash between the two loses the newest and mixes up none.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._matrix_path, self._names_path, self._identity = folder / "embeddings.npy", folder / "embeddings.parquet", identity
        self.places: dict[str, int] = {}
        self._parts: list[Vectors] = []
        stored = stored_vectors(folder)
        if stored is not None and stored[0]["model"].unique().to_list() == [identity]:
            self.places = {name: place for place, name in enumerate(stored[0]["name"])}
            self._parts = [stored[1]]

    def add(self, names: Sequence[str], vectors: Vectors) -> None:
        """Add vectors to the store, in memory until `save`."""
        for name in names:
            self.places[name] = len(self.places)
        self._parts.append(vectors)

    def save(self) -> None:
        """Write everything to disk."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        if self._names_path.exists() and read_parquet(self._names_path, ["model"])["model"].unique().to_list() != [self._identity]:
            self._names_path.unlink()  # the vectors of another embedder are replaced
        with write_atomically(self._matrix_path) as temporary, open(temporary, "wb") as file:
            np.save(file, self._parts[0])
        with write_atomically(self._names_path) as temporary:
            pl.DataFrame({"name": list(self.places), "model": [self._identity] * len(self.places)}).write_parquet(temporary)

    def vectors(self, places: Sequence[int]) -> Vectors:
        """Return the vectors at these places."""
        return (np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0])[places]


def _embed(fresh: dict[str, str], store: EmbeddingStore, dtype: str, config: EmbedConfig) -> None:
    """Embed texts by name and put them into the store. Where processes do it, this one only counts the tokens."""
    settings = EngineConfig(engine="transformers", device=config.device, dtype=dtype, max_model_len=config.max_seq_length)
    apart = config.replicas is not None or config.executor == "ray"
    saved = time.monotonic()
    with ExitStack() as stack:
        here = open_here(config.model, replace(settings, device="cpu") if apart else settings)
        stack.callback(here.close)
        lengths = here.num_tokens(list(fresh.values()))
        longest = here.context_length or config.max_seq_length
        if longest < config.max_seq_length:
            log.info("embed: %s reads %d tokens at most", config.model, longest)
        cut = sum(length > longest for length in lengths)
        if cut:
            told = f"{cut:,} of {len(lengths):,} texts are longer than {longest} tokens; only their beginning is compared"
            log.info("embed: %s", told)
        sizes = dict(zip(fresh, (min(length, longest) for length in lengths), strict=True))
        on_cpu = (config.device or "cpu") == "cpu" if config.executor == "ray" else pick_device(config.device) == "cpu"
        batches = length_batches(sizes, config.batch_tokens * (1 if on_cpu else 32))
        random.Random(0).shuffle(batches)  # so that the time left is told rightly from the first minute
        engine: EmbeddingEngine = here
        if apart:
            where = replace(settings, replicas=config.replicas, executor=config.executor, ray_address=config.ray_address)
            engine = stack.enter_context(closing(open_embedder(config.model, where)))
            if engine.identity != here.identity:
                raise UserError(f"{config.model}: is not the same model where it runs as it is here; put the same files there")
        progress = stack.enter_context(Progress("embed", total=len(fresh), unit="texts"))
        stack.callback(lambda: store.save() if store.places else None)  # what is done stays done when this is interrupted
        requests = (EmbedRequest(key=str(place), texts=tuple(fresh[name] for name in batch)) for place, batch in enumerate(batches))
        for found in engine.embed(requests):
            if found.error:
                raise UserError(f"{config.model}: {found.error}; what is embedded is kept, and the same command goes on")
            batch = batches[int(found.key)]
            store.add(batch, unit_vectors(found.vectors))
            progress.advance(len(batch), tokens=sum(sizes[name] for name in batch))
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                store.save()
                saved = time.monotonic()


def length_batches(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Return batches of texts of like length whose padded tokens stay within `limit`. The order of `sizes` makes no difference."""
    batches: list[list[str]] = []
    longest = 0
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = max(sizes[name], 1)
        batches[-1].append(name)
    return batches


def _resolve_dtype(config: EmbedConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    fast = half_precision(pick_device(config.device))
    return "float32" if fast is None else str(fast).removeprefix("torch.")
