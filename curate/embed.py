"""Turn the texts of rows into unit vectors, each text once: what was embedded before is read from the run's folder."""

import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError
from ..core.files import write_atomically
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
    reference = resolve_model(config.model)
    identity = model_identity(reference)
    dtype = _resolve_dtype(config)
    texts = [embedded_text(messages, on) for messages in rows["messages"]]
    settings = json.dumps([identity, config.max_seq_length, dtype])
    names = [hashlib.sha256(f"{settings}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts]
    store = EmbeddingStore(run.room("curate"), identity)
    fresh = {name: text for name, text in zip(names, texts, strict=True) if name not in store.places}
    if fresh:
        if store.places:
            log.info("embed: %s of %s texts are embedded already", f"{len(set(names)) - len(fresh):,}", f"{len(set(names)):,}")
        _embed(fresh, store, reference, dtype, config)
    run.configure("embed", {**to_mapping(config), "identity": identity, "dtype": dtype}, free=("*",))
    return store.vectors([store.places[name] for name in names])


def embedded_text(messages: str, on: str) -> str:
    """Return the text of a conversation, given as JSON, that is embedded: without system turns, and without the answer for "prompt"."""
    turns = [message for message in json.loads(messages) if message.get("role") != "system"]
    prompt, response = split_texts(turns)
    return prompt if on == "prompt" or response is None else f"{prompt}\n{response}"


class EmbeddingStore:
    """Vectors of one embedder by name, in embeddings.npy and embeddings.parquet. They are only ever added to.

    The table of names is written after the vectors, so that a crash between the two loses the newest and mixes up none.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._matrix_path, self._names_path, self._identity = folder / "embeddings.npy", folder / "embeddings.parquet", identity
        self.places: dict[str, int] = {}
        self._parts: list[Vectors] = []
        if self._names_path.exists() and self._matrix_path.exists():
            table = pl.read_parquet(self._names_path)
            if table["model"].unique().to_list() == [identity]:
                self.places = {name: place for place, name in enumerate(table["name"])}
                self._parts = [np.load(self._matrix_path)[: len(table)]]

    def add(self, names: Sequence[str], vectors: Vectors) -> None:
        """Add vectors to the store, in memory until `save`."""
        for name in names:
            self.places[name] = len(self.places)
        self._parts.append(vectors)

    def save(self) -> None:
        """Write everything to disk."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        if self._names_path.exists() and pl.read_parquet(self._names_path)["model"].unique().to_list() != [self._identity]:
            self._names_path.unlink()  # the vectors of another embedder are replaced
        with write_atomically(self._matrix_path) as temporary, open(temporary, "wb") as file:
            np.save(file, self._parts[0])
        with write_atomically(self._names_path) as temporary:
            pl.DataFrame({"name": list(self.places), "model": [self._identity] * len(self.places)}).write_parquet(temporary)

    def vectors(self, places: Sequence[int]) -> Vectors:
        """Return the vectors at these places."""
        return (np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0])[places]


def _embed(fresh: dict[str, str], store: EmbeddingStore, reference: Any, dtype: str, config: EmbedConfig) -> None:
    import torch

    embedder, device = _load(reference, config)
    lengths = _num_tokens(list(fresh.values()), embedder)
    longest = embedder.max_seq_length or config.max_seq_length
    cut = sum(length > longest for length in lengths)
    if cut:
        log.info(
            "embed: %s of %s texts are longer than %d tokens; only their beginning is compared", f"{cut:,}", f"{len(lengths):,}", longest
        )
    sizes = dict(zip(fresh, (min(length, longest) for length in lengths), strict=True))
    limit = config.batch_tokens * (1 if device == "cpu" else 32)
    batches = length_batches(sizes, limit)
    random.Random(0).shuffle(batches)  # so that the time left is told rightly from the first minute
    saved = time.monotonic()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("embed", total=len(fresh), unit="texts"))
        stack.callback(lambda: store.save() if store.places else None)  # what is done stays done when this is interrupted
        if dtype != "float32":
            stack.enter_context(torch.autocast(device, getattr(torch, dtype)))
        for batch in batches:
            vectors = embedder.encode(
                [fresh[name] for name in batch], batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True
            )
            store.add(batch, unit_vectors(vectors))
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


def _load(reference: Any, config: EmbedConfig) -> tuple[Any, str]:
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    name, arguments = reference.pretrained()
    device = pick_device(config.device)
    try:
        embedder = SentenceTransformer(name, device=device, revision=arguments.get("revision"))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{config.model}: is not an embedding model that sentence-transformers can load: {reason}") from error
    own = embedder.max_seq_length
    embedder.max_seq_length = config.max_seq_length if own is None else min(config.max_seq_length, own)
    if own is not None and own < config.max_seq_length:
        log.info("embed: %s reads %d tokens at most", config.model, own)
    return embedder, device.split(":")[0]


def _num_tokens(texts: list[str], embedder: Any) -> list[int]:
    tokenizer = embedder.tokenizer
    if not callable(tokenizer):  # a static embedder has a bare tokenizer, and no padding to save
        return [max(len(text) // 4, 1) for text in texts]
    counts = []
    for start in range(0, len(texts), 1024):
        counts += [len(ids) for ids in tokenizer(texts[start : start + 1024], truncation=False, verbose=False)["input_ids"]]
    return counts


def _resolve_dtype(config: EmbedConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    fast = half_precision(pick_device(config.device))
    return "float32" if fast is None else str(fast).removeprefix("torch.")
