"""Remove rows that another row stands for: the same text, nearly the same words, or nearly the same meaning."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ..core.config import to_mapping
from ..core.formats import read_examples
from ..core.progress import Progress
from ..core.run import Run
from .config import DedupConfig
from .embed import embed_rows
from .rows import KEY, TEXT, Outcome, decision_table, input_rows, record, row_name, split_texts
from .scored import best_first, columns_for, sort_columns
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
        stage = _Stage(run, "dedup_exact", "exact_duplicate", second, config.by, TEXT)
        outcomes.append(stage.decided(exact_witnesses(stage.all, config.on, stage.order, given=len(second))))
    if config.minhash is not None:
        from .minhash import band_keys, near_duplicates, shingle_sets

        stage = _Stage(run, "dedup_minhash", "near_duplicate", second, config.by, TEXT)
        shingles = shingle_sets(["\n".join(parts) for parts in texts(stage.all, config.on)])
        keys = band_keys(shingles) if config.candidates == "lsh" else None
        witness, near = near_duplicates(shingles, config.minhash, stage.order.tolist(), keys=keys, given=len(second))
        outcomes.append(stage.decided(witness, near, config.minhash))
    if config.semantic is not None:
        stage = _Stage(run, "dedup_semantic", "semantic_duplicate", second, config.by, ("messages", *TEXT))
        vectors = embed_rows(run, stage.all, config.on, config.embed)
        witness, near = cover(vectors, config.semantic, stage.order.tolist(), given=len(second))
        outcomes.append(stage.decided(witness, near, config.semantic))
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


def visiting_order(run: Run, rows: pl.DataFrame, by: Sequence[str]) -> Indices:
    """Return the rows in the order in which they are visited: best first by the scores, of equals the earlier."""
    return best_first(sort_columns(run, rows, by)) if by else np.arange(len(rows))


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


def normalised_column(texts: pl.Series) -> pl.Series:
    """Return what `normalised` says of each text."""
    is_ascii = texts.str.len_bytes() == texts.str.len_chars()
    plain = pl.col("text").str.to_lowercase().str.replace_all(r"[ \t-\r\x1c-\x1f]{2,}|[\t-\r\x1c-\x1f]", " ").str.strip_chars(" ")
    found = texts.to_frame("text").select(pl.when(pl.lit(is_ascii)).then(plain)).to_series().alias(texts.name)
    if is_ascii.all():
        return found
    others = (~is_ascii).arg_true()
    return found.scatter(others, [normalised(text) for text in texts.gather(others)])


def exact_witnesses(rows: pl.DataFrame, on: str, order: Indices, *, given: int = 0) -> Indices:
    """Return the witness of each row whose text is repeated, -1 for those that stay: the first in `order` of its text.

    Texts are compared by 128 bits of the SHA-256 of what is normalised. The first `given` rows of the order stay.
    """

    def digests(texts: pl.Series) -> pl.Series:
        parts = texts.struct.unnest()
        prompts = normalised_column(parts["prompt"])
        both = prompts if on == "prompt" else prompts + "\x1f" + normalised_column(parts["response"].fill_null(""))  # white space itself
        return pl.Series(texts.name, [hashlib.sha256(text.encode()).digest()[:16] for text in both], pl.Binary)

    digest = pl.struct(TEXT).map_batches(digests, return_dtype=pl.Binary, is_elementwise=True)
    found = rows.lazy().select(digest.alias("digest")).collect(engine="streaming")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    found = found.with_columns(place=pl.Series(place)).select("place", first=pl.col("place").min().over("digest"))
    repeated = (found["first"] != found["place"]) & (found["place"] >= given)
    return np.where(repeated.to_numpy(), order[found["first"].to_numpy()], -1)


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

    def __init__(self, run: Run, name: str, rule: str, second: pl.DataFrame, by: Sequence[str], columns: Sequence[str]) -> None:
        self.run, self.name, self.rule = run, name, rule
        self.rows = input_rows(run, name, list(dict.fromkeys([*KEY, *columns, *columns_for(run, by)])))
        self.all = pl.concat([second.select("id", *columns), self.rows.select(row_name().alias("id"), *columns)])
        self.num_given = len(second)
        self.order = np.concatenate([np.arange(len(second)), len(second) + visiting_order(run, self.rows, by)])

    def decided(self, witness: Indices, near: Cosines | None = None, threshold: float | None = None) -> Outcome:
        """Record the stage: for each row, by its place in `all`, its witness, -1 for one that stays, and how like it is."""
        own = slice(self.num_given, None)
        removed = witness[own] >= 0
        place = pl.Series("place", witness[own]).set(pl.Series(~removed), None)
        score = pl.lit(None, pl.Float64) if near is None else pl.Series("near", near[own], pl.Float64)
        table = self.rows.select(KEY).with_columns(witness_id=self.all["id"].gather(place), removed=pl.Series(removed), near=score)
        decisions = decision_table(
            table,
            self.name,
            pl.when("removed").then(pl.lit(self.rule)),
            score=pl.when("removed").then("near"),
            threshold=pl.when("removed").then(pl.lit(threshold, pl.Float64)),
            witness_id=pl.col("witness_id"),
        )
        return record(self.run, self.name, self.rows, decisions)
