"""Remove rows that another row stands for: the same text, nearly the same words, or nearly the same meaning."""

import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ..core.config import to_mapping
from ..core.formats import read_examples
from ..core.hardware import pick_device
from ..core.models import resolve_model
from ..core.run import Run
from .cover import cover
from .decide_config import DedupConfig
from .decided import Outcome, decision_table, record, take_back
from .embed import embed_rows
from .memory import GB, cover_bytes, hold_to, least_dimensions
from .rows import KEY, TEXT, input_rows, load_rows, row_name, split_texts
from .scored import best_first, columns_for, sort_columns
from .similarity import Cosines, Indices

log = logging.getLogger(__name__)


def dedup(run: Run, config: DedupConfig) -> list[Outcome]:
    """Remove duplicates, as the stages "dedup_exact", "dedup_minhash" and "dedup_semantic"; return what each did.

    Rows are visited in the order of the scores `by`, best first, without any in input order. A row stays unless a row that
    stayed before it stands for it; that row is its witness. The rows of a second set, `against`, are visited before all others
    and all of them stay; as witnesses they are called FILE:ID. What an earlier dedup removed in a way that is not asked for, or that
    another now comes before, is taken back, with the stages after it.
    """
    second = read_second(config.against, config.on) if config.against is not None else pl.DataFrame(schema=COMPARED)
    outcomes = []
    using = {"dedup_exact": config.exact, "dedup_minhash": config.minhash is not None, "dedup_semantic": config.semantic is not None}
    asked = [stage for stage in using if using[stage]]
    stand = [stage for stage in run.ledger.stages() if stage in using]
    first = next((stage for place, stage in enumerate(stand) if asked[place : place + 1] != [stage]), None)  # that is not at its place
    _check_early(run, config, second, first or "dedup_semantic")
    run.configure("dedup", to_mapping(config), free=("*",))
    if first is not None:
        void = take_back(run, first)
        why = f"follows {asked[stand.index(first)]} now" if first in asked else "is not asked for now"
        log.info("dedup: %s %s: the former decisions of %s are taken back", first, why, ", ".join(void))
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
        limit = None if config.memory_gb is None else config.memory_gb * GB
        told = (len(stage.all), *BY_MEANING)
        hold_to(limit, cover_bytes(len(stage.all), least_dimensions(config.embed)), *told, tell=False)
        vectors = embed_rows(run, stage.all, config.on, config.embed)
        hold_to(limit, cover_bytes(len(vectors), vectors.shape[1]), *told)
        witness, near = cover(vectors, config.semantic, stage.order.tolist(), given=len(second), device=pick_device())
        outcomes.append(stage.decided(witness, near, config.semantic))
    return outcomes


def _check_early(run: Run, config: DedupConfig, second: pl.DataFrame, stage: str) -> None:
    """Raise UserError for what a later stage would refuse, before a former decision is lost: of memory, for the fewest rows there can be.

    These are of the input of `stage`, the first that is taken back or the one by meaning: what is before it stands.
    """
    columns_for(run, config.by)
    if config.semantic is None:
        return
    resolve_model(config.embed.model)
    if config.memory_gb is None:
        return
    rows = pl.concat([second.select(TEXT), load_rows(run, before=stage, columns=TEXT)])
    fewest = len(rows)
    if config.minhash is not None:
        fewest = len(second)  # how many it leaves is known only when it is done
    elif config.exact:
        fewest = int((exact_witnesses(rows, config.on, np.arange(len(rows)), given=len(second)) < 0).sum())
    hold_to(config.memory_gb * GB, cover_bytes(fewest, least_dimensions(config.embed)), fewest, *BY_MEANING, tell=False)


BY_MEANING = ("dedup by meaning", "--no-semantic")  # what takes memory, and what to do where it is too little
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

    What is normalised is compared, letter by letter, of the rows that share a hash of it. The first `given` rows of the order stay.
    """
    compared = TEXT if on == "pair" else TEXT[:1]

    def plan(rows: pl.DataFrame) -> pl.LazyFrame:
        each = [pl.col(name).fill_null("").map_batches(normalised_column, return_dtype=pl.String, is_elementwise=True) for name in compared]
        return rows.lazy().select(each)

    shared = plan(rows).select(pl.struct(compared).hash()).collect(engine="streaming").to_series().is_duplicated()
    alike = plan(rows.filter(shared)).collect(engine="streaming")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    own = place[shared.to_numpy()]
    first = alike.with_columns(place=pl.Series(own)).select(pl.col("place").min().over(compared)).to_series().to_numpy()
    witness = np.full(len(rows), -1, dtype=np.int64)
    witness[shared.to_numpy()] = np.where((first != own) & (own >= given), order[first], -1)
    return witness


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
