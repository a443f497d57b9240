"""What selecting and deduplicating by vectors takes in memory at its peak, known before it begins, and held to a limit."""

import logging

from ..core.errors import UserError
from ..core.files import load_object
from ..core.models import resolve_model
from . import fast_location
from .decide_config import EmbedConfig, SelectConfig
from .facility_location import NEIGHBORS

log = logging.getLogger(__name__)

GB = 10**9
TILES = 100_000_000  # bytes: cosines held at a time, in float32 and as comparisons
REMEMBERED = 68  # bytes for each similarity that facility location remembers, while they are gathered and turned
FEWEST = 16  # similarities of a row, below which facility location would only get slower
WORTH_SAYING = 500_000_000  # bytes


def select_bytes(method: str, num_rows: int, dimensions: int, size: int, neighbors: int = NEIGHBORS, *, fast: bool = False) -> int:
    """Return about how many bytes a method takes at its peak, the vectors included; linear in the rows but for dpp.

    `size` is the number of rows that are taken. Measured on 10,000 to 100,000 rows of 384 dimensions: see benchmarks/selection.py.
    """
    vectors = 4 * dimensions * num_rows
    own = 32 * num_rows + TILES
    if method == "k-center":
        own += 2 * 4 * dimensions * size  # the picks, in an array that doubles
    elif method in ("facility-location", "qdit") and fast:
        own += (REMEMBERED * fast_location.NEIGHBORS + 2 * fast_location.SAMPLE) * num_rows + 2 * vectors
    elif method in ("facility-location", "qdit"):
        own += REMEMBERED * min(neighbors, num_rows) * num_rows
    elif method == "dpp":
        own += 8 * size * num_rows + 2 * vectors
    return vectors + own


def cover_bytes(num_rows: int, dimensions: int) -> int:
    """Return about how many bytes duplicates by meaning take at their peak, the vectors included."""
    return 2 * 4 * dimensions * num_rows + 64 * num_rows + TILES


def fit_neighbors(config: SelectConfig, num_rows: int, dimensions: int, size: int, *, tell: bool = True) -> int:
    """Return how many similarities facility location may remember of each row, and say what the method will take, if that is much.

    With `fast` their number decides what is selected, so that it is not lowered. Raises UserError where memory_gb is too little for
    the method.
    """
    neighbors = NEIGHBORS
    limit = None if config.memory_gb is None else config.memory_gb * GB
    if config.method in ("facility-location", "qdit") and limit is not None and not config.fast:
        rest = limit - select_bytes(config.method, num_rows, dimensions, size, 0)
        neighbors = max(min(NEIGHBORS, int(rest / (REMEMBERED * num_rows))), FEWEST)
    what = f"select {config.method}"
    cure = "another method: cluster-balanced and stratified take little more than the vectors"
    if config.fast and limit is not None and select_bytes(config.method, num_rows, dimensions, size, FEWEST) <= limit:
        cure = f"leave fast out, or {cure}"
    needed = select_bytes(config.method, num_rows, dimensions, size, neighbors, fast=config.fast)
    hold_to(limit, needed, num_rows, what, cure, tell=tell)
    return neighbors


def least_dimensions(embed: EmbedConfig) -> int:
    """Return how long an embedder's vectors are by the files beside it, or 1, which is too few, where these do not say.

    So that what cannot be done is refused before an hour of embedding. Raises UserError for a model that is not there.
    """
    folder = resolve_model(embed.model).path
    if folder is None or not folder.is_dir():
        return 1
    told = [(file, "out_features") for file in sorted(folder.glob("*_Dense/config.json"), reverse=True)]
    told += [(folder / "1_Pooling" / "config.json", "word_embedding_dimension"), (folder / "config.json", "hidden_size")]
    for file, name in told:
        if file.exists() and isinstance(value := load_object(file).get(name), int):
            return value
    return 1


def hold_to(limit: float | None, needed: int, num_rows: int, what: str, cure: str, *, tell: bool = True) -> None:
    """Say what a step will take where it is much. Raises UserError where that is more than the limit, in bytes."""
    if limit is not None and needed > limit:
        raise UserError(
            f"{what}: takes about {needed / GB:.1f} GB for {num_rows:,} rows, memory_gb allows {limit / GB:g}: give more, fewer rows, or"
            f" {cure}"
        )
    if tell and needed >= WORTH_SAYING:
        log.info("%s: about %.1f GB of memory at its peak", what, needed / GB)
