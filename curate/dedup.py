"""Remove rows that another row stands for: the same text, or nearly the same meaning."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.example import Decision
from ..core.progress import Progress
from ..core.run import Run
from .config import DedupConfig
from .embed import embed_rows
from .rows import Outcome, input_rows, keys, record, row_ids
from .score import best_first, sort_columns
from .similarity import BLOCK, MARGIN, TILE, Candidates, Cosines, Indices, Vectors, exact_cosines


def dedup(run: Run, config: DedupConfig) -> list[Outcome]:
    """Remove duplicates, as the stages "dedup_exact" and "dedup_semantic"; return what each did.

    Rows are visited in the order of the scores `by`, best first, without any in input order. A row stays unless a row that
    stayed before it stands for it; that row is its witness.
    """
    outcomes = []
    run.configure("dedup", to_mapping(config), free=("*",))
    if config.exact:
        rows = input_rows(run, "dedup_exact")
        order = visiting_order(run, rows, config.by)
        outcomes.append(_record(run, "dedup_exact", rows, "exact_duplicate", exact_duplicates(texts(rows, config.on), order)))
    if config.semantic is not None:
        rows = input_rows(run, "dedup_semantic")
        order = visiting_order(run, rows, config.by)
        vectors = embed_rows(run, rows, config.on, config.embed)
        witness, cosine = cover(vectors, config.semantic, order)
        removed = {int(row): (int(witness[row]), float(cosine[row])) for row in np.flatnonzero(witness >= 0)}
        outcomes.append(_record(run, "dedup_semantic", rows, "semantic_duplicate", removed, config.semantic))
    return outcomes


def visiting_order(run: Run, rows: pl.DataFrame, by: Sequence[str]) -> list[int]:
    """Return the rows in the order in which they are visited: best first by the scores, of equals the earlier."""
    columns = sort_columns(run, rows, by)
    return sorted(range(len(rows)), key=lambda row: best_first(columns, row))


def texts(rows: pl.DataFrame, on: str) -> list[tuple[str, ...]]:
    """Return what is compared of each row: the prompt, or prompt and answer as a pair."""
    if on == "prompt":
        return [(prompt,) for prompt in rows["prompt"]]
    return [(prompt, response or "") for prompt, response in zip(rows["prompt"], rows["response"], strict=True)]


def normalised(text: str) -> str:
    """Return a text after NFKC, case folding and collapse of white space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def exact_duplicates(texts: Sequence[tuple[str, ...]], order: Sequence[int]) -> dict[int, tuple[int, None]]:
    """Return for each repeated text but the first in `order` that first one, by their places in `texts`."""
    first: dict[bytes, int] = {}
    removed: dict[int, tuple[int, None]] = {}
    for row in order:
        parts = json.dumps([normalised(part) for part in texts[row]])
        digest = hashlib.sha256(parts.encode()).digest()[:16]
        if first.setdefault(digest, row) != row:
            removed[row] = (first[digest], None)
    return removed


def cover(vectors: Vectors, threshold: float, order: Sequence[int], *, block: int = BLOCK) -> tuple[Indices, Cosines]:
    """Return the witness of each row, -1 for those that stay, and the cosine with it: greedy cover.

    Rows are visited in `order`; one stays if and only if its cosine with every row that stayed before is below the threshold
    (cosines by `exact_cosines`). The witness is the most similar of these, of equals the one visited first. The outcome
    depends on the order and not on the block size. Costs n²·d/2 multiplications at most, and memory for block × 8192 cosines.
    """
    visit = np.asarray(order, dtype=np.int64)
    witness, cosine = np.full(len(vectors), -1, dtype=np.int64), np.zeros(len(vectors))
    kept = np.empty(len(visit), dtype=np.int64)  # rows that stayed, in visiting order
    stayed = np.empty((len(visit), vectors.shape[1]), dtype=np.float32)  # and their vectors
    count = 0
    with Progress("dedup", total=len(visit), unit="rows") as progress:
        for start in range(0, len(visit), block):
            rows = visit[start : start + block]
            own = vectors[rows]
            earlier = Candidates(len(rows), threshold - MARGIN)
            for tile in range(0, count, TILE):
                earlier.add(own @ stayed[tile : min(tile + TILE, count)].T, tile)
            before = earlier.verified(vectors, rows, kept[:count])
            within, here = own @ own.T, np.zeros(len(rows), dtype=bool)  # `here`: rows of this block that stayed
            for place, row in enumerate(rows):
                close = np.flatnonzero(here[:place] & (within[place, :place] >= max(threshold, earlier.top[place]) - MARGIN))
                where, near = kept[before[place][0]], before[place][1]
                if len(close):
                    where = np.concatenate([where, rows[close]])
                    near = np.concatenate([near, exact_cosines(vectors, np.full(len(close), row), rows[close])])
                best = int(np.argmax(near)) if len(near) else -1
                if best >= 0 and near[best] >= threshold:
                    witness[row], cosine[row] = where[best], near[best]
                else:
                    here[place] = True
            fresh = rows[here]
            kept[count : count + len(fresh)], stayed[count : count + len(fresh)] = fresh, vectors[fresh]
            count += len(fresh)
            progress.advance(len(rows))
    return witness, cosine


def _record(
    run: Run,
    stage: str,
    rows: pl.DataFrame,
    rule: str,
    removed: dict[int, tuple[int, float]] | dict[int, tuple[int, None]],
    threshold: float | None = None,
) -> Outcome:
    names, ids = keys(rows), row_ids(rows)
    decisions = []
    for row, (example_id, index) in enumerate(names):
        if row in removed:
            witness, score = removed[row]
            decisions.append(Decision(example_id, index, stage, "rejected", rule, score, threshold, ids[witness]))
        else:
            decisions.append(Decision(example_id, index, stage, "kept"))
    return record(run, stage, rows, decisions)
