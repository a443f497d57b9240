"""Remove rows that another row stands for: the same text, nearly the same words, or nearly the same meaning."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ..core.config import to_mapping
from ..core.example import Decision
from ..core.formats import read_examples
from ..core.progress import Progress
from ..core.run import Run
from .config import DedupConfig
from .embed import embed_rows
from .rows import Outcome, input_rows, keys, record, row_ids, split_texts
from .score import best_first, sort_columns
from .similarity import BLOCK, MARGIN, TILE, Candidates, Cosines, Indices, Vectors, exact_cosines

log = logging.getLogger(__name__)

SHORTEST = 32  # dimensions of a shorter vector, or a multiple of it
MOST_PROPOSED = 1e-4  # share of all pairs whose cosines may be left to compute
REST = 1e-5  # added to the squared length of a rest: above the rounding of float32, which must not make a bound too low


def dedup(run: Run, config: DedupConfig) -> list[Outcome]:
    """Remove duplicates, as the stages "dedup_exact", "dedup_minhash" and "dedup_semantic"; return what each did.

    Rows are visited in the order of the scores `by`, best first, without any in input order. A row stays unless a row that
    stayed before it stands for it; that row is its witness. The rows of a second set, `against`, are visited before all others
    and all of them stay; as witnesses they are called FILE:ID.
    """
    second = read_second(config.against, config.on) if config.against is not None else pl.DataFrame(schema=COMPARED)
    outcomes = []
    run.configure("dedup", to_mapping(config), free=("*",))
    if config.exact:
        stage = _Stage(run, "dedup_exact", "exact_duplicate", second, config.by)
        outcomes.append(stage.decided(exact_duplicates(texts(stage.all, config.on), stage.order, given=len(second))))
    if config.minhash is not None:
        from .minhash import band_keys, near_duplicates, shingle_sets

        stage = _Stage(run, "dedup_minhash", "near_duplicate", second, config.by)
        shingles = shingle_sets(["\n".join(parts) for parts in texts(stage.all, config.on)])
        keys = band_keys(shingles) if config.candidates == "lsh" else None
        witness, near = near_duplicates(shingles, config.minhash, stage.order, keys=keys, given=len(second))
        outcomes.append(stage.decided(_removed(witness, near), config.minhash))
    if config.semantic is not None:
        stage = _Stage(run, "dedup_semantic", "semantic_duplicate", second, config.by)
        vectors = embed_rows(run, stage.all, config.on, config.embed)
        witness, near = cover(vectors, config.semantic, stage.order, given=len(second))
        outcomes.append(stage.decided(_removed(witness, near), config.semantic))
    return outcomes


COMPARED = {"id": pl.String, "messages": pl.String, "prompt": pl.String, "response": pl.String}


def read_second(source: str, on: str) -> pl.DataFrame:
    """Return the rows of a second set, columns as in COMPARED; each is called by the file's name and its id."""
    rows = []
    for example in read_examples(source):
        prompt, response = split_texts(example.messages)
        rows.append((f"{Path(source).name}:{example.id}", json.dumps(example.messages, ensure_ascii=False), prompt, response))
    found = pl.DataFrame(rows, schema=COMPARED, orient="row")
    if on == "pair" and found["response"].null_count() == len(found):
        log.warning("%s: its rows have no answers, so none is like a pair of prompt and answer; compare prompts alone, on: prompt", source)
    return found


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
    """Return a text after NFKC, case folding and collapse of white space. Of ASCII, lower case is all of that, and quicker."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def exact_duplicates(texts: Sequence[tuple[str, ...]], order: Sequence[int], *, given: int = 0) -> dict[int, tuple[int, None]]:
    """Return for each repeated text but the first in `order` that first one, by their places in `texts`.

    The first `given` rows of the order stay even if repeated.
    """
    first: dict[bytes, int] = {}
    removed: dict[int, tuple[int, None]] = {}
    for place, row in enumerate(order):
        parts = json.dumps([normalised(part) for part in texts[row]])
        digest = hashlib.sha256(parts.encode()).digest()[:16]
        if first.setdefault(digest, row) != row and place >= given:
            removed[row] = (first[digest], None)
    return removed


def cover(vectors: Vectors, threshold: float, order: Sequence[int], *, block: int = BLOCK, given: int = 0) -> tuple[Indices, Cosines]:
    """Return the witness of each row, -1 for those that stay, and the cosine with it: greedy cover.

    Rows are visited in `order`; one stays if and only if its cosine with every row that stayed before is below the threshold
    (cosines by `exact_cosines`). The witness is the most similar of these, of equals the one visited first. The outcome
    depends on the order and not on the block size. The first `given` rows of the order stay whatever they are like.
    Costs n²·d/2 multiplications at most, a few times less where `bounding_vectors` serve, and memory for block × 8192 cosines.
    """
    bounding = bounding_vectors(vectors, threshold)
    compared = vectors if bounding is None else bounding
    visit = np.asarray(order, dtype=np.int64)
    witness, cosine = np.full(len(vectors), -1, dtype=np.int64), np.zeros(len(vectors))
    kept = np.empty(len(visit), dtype=np.int64)  # rows that stayed, in visiting order
    stayed = np.empty((len(visit), compared.shape[1]), dtype=np.float32)  # and what they are compared by
    count = 0
    with Progress("dedup", total=len(visit), unit="rows") as progress:
        for start in range(0, len(visit), block):
            rows = visit[start : start + block]
            own, short = vectors[rows], compared[rows]
            earlier = (Candidates if bounding is None else _Bounded)(len(rows), threshold - MARGIN)
            for tile in range(0, count, TILE):
                earlier.add(short @ stayed[tile : min(tile + TILE, count)].T, tile)
            before = earlier.verified(vectors, rows, kept[:count])
            within, here = own @ own.T, np.zeros(len(rows), dtype=bool)  # `here`: rows of this block that stayed
            for place, row in enumerate(rows):
                close = np.flatnonzero(here[:place] & (within[place, :place] >= max(threshold, earlier.top[place]) - MARGIN))
                where, near = kept[before[place][0]], before[place][1]
                if len(close):
                    where = np.concatenate([where, rows[close]])
                    near = np.concatenate([near, exact_cosines(vectors, np.full(len(close), row), rows[close])])
                best = int(np.argmax(near)) if len(near) else -1
                if best >= 0 and near[best] >= threshold and start + place >= given:
                    witness[row], cosine[row] = where[best], near[best]
                elif best < 0 or near[best] < 1:  # else a given row that an equal one stands before: that one is always the witness
                    here[place] = True
            fresh = rows[here]
            kept[count : count + len(fresh)], stayed[count : count + len(fresh)] = fresh, compared[fresh]
            count += len(fresh)
            progress.advance(len(rows))
    return witness, cosine


def bounding_vectors(vectors: Vectors, threshold: float) -> Vectors | None:
    """Return shorter vectors whose products are never below the cosines, or None where they would rule out too few pairs.

    The vectors are turned so that the first directions hold most of their length. Of the rest only the length is kept: by
    Cauchy and Schwarz a·b is at most the product of the first parts plus that of the lengths of the rests.
    """
    dimensions = vectors.shape[1]
    if len(vectors) < 4 * BLOCK or dimensions < 2 * SHORTEST:
        return None
    sample = vectors[:: max(len(vectors) // (2 * BLOCK), 1)].astype(np.float64)
    _, directions = np.linalg.eigh(sample.T @ sample)
    turn = directions[:, ::-1]
    pairs = np.triu_indices(len(sample), 1)
    for size in range(SHORTEST, dimensions // 2 + 1, SHORTEST):
        short = _shortened(sample.astype(np.float32), turn[:, :size])
        if np.mean((short @ short.T)[pairs] >= threshold - MARGIN) <= MOST_PROPOSED:
            return np.concatenate([_shortened(vectors[row : row + TILE], turn[:, :size]) for row in range(0, len(vectors), TILE)])
    return None


def _shortened(vectors: Vectors, turn: Cosines) -> Vectors:
    first = vectors @ turn.astype(np.float32)
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64) - np.einsum("ij,ij->i", first, first, dtype=np.float64)
    return np.hstack([first, np.sqrt(np.maximum(squares, 0) + REST)[:, None].astype(np.float32)])


class _Bounded(Candidates):
    """Candidates by products that are bounds and no cosines: the largest says nothing about the others."""

    def add(self, cosines: npt.NDArray[np.float32], first_column: int) -> None:
        rows = np.flatnonzero(cosines.max(axis=1) >= self.floor)
        if len(rows):
            places, columns = np.nonzero(cosines[rows] >= self.floor)
            self._found.append((rows[places], columns + first_column, cosines[rows[places], columns]))


class _Stage:
    """The rows that a stage decides on, behind those of the second set."""

    def __init__(self, run: Run, name: str, rule: str, second: pl.DataFrame, by: Sequence[str]) -> None:
        self.run, self.name, self.rule = run, name, rule
        self.rows = input_rows(run, name)
        own = self.rows.select(pl.Series("id", row_ids(self.rows), pl.String), "messages", "prompt", "response")
        self.all = pl.concat([second, own])
        self.num_given = len(second)
        self.order = [*range(len(second)), *(len(second) + row for row in visiting_order(run, self.rows, by))]

    def decided(self, removed: Mapping[int, tuple[int, float | None]], threshold: float | None = None) -> Outcome:
        """Record the stage: for each row that was removed, by its place in `all`, its witness and how like it is."""
        ids = self.all["id"].to_list()
        decisions = []
        for row, (example_id, index) in enumerate(keys(self.rows), start=self.num_given):
            if row in removed:
                witness, score = removed[row]
                decisions.append(Decision(example_id, index, self.name, "rejected", self.rule, score, threshold, ids[witness]))
            else:
                decisions.append(Decision(example_id, index, self.name, "kept"))
        return record(self.run, self.name, self.rows, decisions)


def _removed(witness: Indices, near: Cosines) -> dict[int, tuple[int, float]]:
    return {int(row): (int(witness[row]), float(near[row])) for row in np.flatnonzero(witness >= 0)}
