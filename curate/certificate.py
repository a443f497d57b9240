"""Prove from a run's files alone that no row went missing and that every duplicate, and only those, is gone.

Nothing here calls what made the decisions: texts are compared by SHA-256, shingles as tuples of words by Python's hash of them,
overlaps by a sparse matrix product, cosines in float64 from the stored vectors. Texts are taken apart piece by piece: a row of many
megabytes costs a few times its size.
"""

import hashlib
import json
import re
import unicodedata
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse

from ..core.errors import UserError
from ..core.example import row_id
from ..core.formats import iterate_examples
from ..core.ngrams import WORD
from ..core.run import Run
from ..core.text import counted
from .embed import embedded_text, stored_vectors
from .rows import load_rows, split_texts

RULES = {"dedup_exact": "exact_duplicate", "dedup_minhash": "near_duplicate", "dedup_semantic": "semantic_duplicate"}
FIRST = ("import", "prompts")  # stages that begin a ledger
SLACK = 1e-8  # decisions round cosines to 9 digits
FREQUENT = 500  # rows that share a shingle before it is one of the frequent, which alone make no candidate
BLOCK = 2048

PARSED = 256  # rows of a table that are turned into objects at a time
PIECE = 1 << 20  # characters of a text that are taken apart at a time
CUT = re.compile(r"[ \t\n](?=[0-9A-Za-z])")  # on both sides of it a text is normalised as it is within the whole

Shingles = npt.NDArray[np.int64]  # hashes of runs of five words, rising, each once


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about a run, and what contradicts it."""

    stage: str
    statement: str
    faults: tuple[str, ...] = ()


def check_run(run: Run) -> list[Check]:
    """Return what was checked of a run. Raises UserError where it has no ledger yet, or a file that is needed is gone."""
    ledger = run.ledger.read()
    if ledger.is_empty():
        raise UserError(f"{run.path}: no step has decided anything yet, so there is nothing to verify")
    rows = load_rows(run, all=True)
    checks = [*_conservation(run, ledger, rows), *_representatives(ledger)]
    for stage in RULES:
        part = ledger.filter(pl.col("stage") == stage)
        if not part.is_empty():
            checks += _duplicates(run, stage, part, rows)
    return checks


def report(checks: Sequence[Check], *, most: int = 10) -> str:
    """Write what was checked for people: a line for each statement, below it the rows that contradict it."""
    lines = []
    for check in checks:
        lines.append(f"{'FAILS' if check.faults else 'holds'}  {check.stage}: {check.statement}")
        lines += [f"         {fault}" for fault in check.faults[:most]]
        lines += [f"         and {len(check.faults) - most:,} more"] if len(check.faults) > most else []
    return "\n".join(lines)


def _conservation(run: Run, ledger: pl.DataFrame, rows: pl.DataFrame) -> Iterator[Check]:
    stages = ledger.select("step", "stage").unique().sort("step")
    before: Counter[str] | None = None
    previous = ""
    for step, stage in stages.iter_rows():
        part = ledger.filter(pl.col("step") == step)
        ids = _ids(part)
        decided = Counter(ids)
        faults = [f"{name}: {count} decisions" for name, count in decided.items() if count > 1]
        for name, action, rule in zip(ids, part["action"], part["rule"], strict=True):
            if action not in ("kept", "rejected", "failed") or (action != "kept" and not rule):
                faults.append(f"{name}: {action} by the rule {rule!r}")
        if before is not None and stage == "distill":  # samples of the prompts that were kept
            prompts = set(part["example_id"])
            faults += [f"{name}: kept by {previous}, but no sample of it is accounted for" for name in before if name not in prompts]
            faults += [f"{name}: no prompt that {previous} kept" for name in sorted(prompts) if name not in before]
        elif before is not None:
            faults += [f"{name}: kept by {previous}, gone without a decision" for name in (before - decided)]
            faults += [f"{name}: decided on, but {previous} did not keep it" for name in (decided - before)]
        elif stage not in FIRST:
            faults.append(f"the ledger begins with {stage}")
        kept = part.filter(pl.col("action") == "kept")
        before, previous = Counter(_ids(kept)), stage
        told = Counter(part["action"])
        yield Check(
            stage,
            f"{counted(len(part), 'row')} in = {told['kept']:,} kept + {told['rejected']:,} rejected + {told['failed']:,} failed, each "
            "once, each removal with its rule",
            tuple(faults),
        )
    assert before is not None
    made = run.path / "curate" / "dataset.jsonl"
    if previous == "prompts":
        return
    if not made.exists():
        yield Check("data set", "dataset.jsonl is there", (f"it is not: {previous} was cut off before it was written; run that again",))
    else:
        stored = dict(zip(_ids(rows), rows.select("messages", "source", "meta").iter_rows(), strict=True))
        written, changed, others = _read_data_set(made, stored)
        faults = [f"{name}: kept by {previous}, but not in the data set" for name in before - written]
        faults += [f"{name}: in the data set, but not kept by {previous}" for name in written - before]
        faults += [f"{name}: kept by {previous}, but no row of this run" for name in before if name not in stored]
        yield Check("data set", f"dataset.jsonl holds exactly the {counted(before.total(), 'row')} that {previous} kept", tuple(faults))
        yield Check("data set", "each of its rows has the conversation, source and meta that it came with", tuple(changed))
        yield Check("data set", "dataset.parquet holds the same rows in the same order", tuple(others))


Stored = tuple[str, str | None, str | None]  # messages, source, meta


def _read_data_set(path: Path, stored: Mapping[str, Stored]) -> tuple[Counter[str], list[str], list[str]]:
    """Return the ids of a dataset.jsonl, its rows that are not as stored, and how dataset.parquet differs. One row at a time is parsed."""
    written: Counter[str] = Counter()
    changed, others = [], []
    beside = path.with_suffix(".parquet")
    try:
        table = pl.read_parquet(beside, glob=False) if beside.exists() else None
    except pl.exceptions.PolarsError as error:
        table = None
        others.append(f"it cannot be read ({error})")
    rows = iter(()) if table is None else (row for part in table.iter_slices(PARSED) for row in part.iter_rows(named=True))
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, start=1):
            if text == "\n":
                continue
            row = next(rows, None)
            try:
                line = json.loads(text)
                name, own = str(line["id"]), (line["messages"], line["source"], line["meta"])
            except (ValueError, KeyError, TypeError):
                changed.append(f"line {number}: is no row as this run writes it")
                continue
            written[name] += 1
            if name in stored:
                messages, source, meta = stored[name]
                if own != (json.loads(messages), source, json.loads(meta or "{}")):
                    changed.append(f"{name}: is not as it came")
            if row is not None:
                conversation = row["messages"] if row.get("extra") is None else json.loads(row["extra"])
                if (row["id"], own) != (name, (conversation, row["source"], json.loads(row["meta"] or "{}"))):
                    others.append(f"{name}: differs from the row {row['id']} in its place")
    if not beside.exists():
        others.append("it is not there; run the last step again")
    elif table is not None and len(table) != written.total():
        others.insert(0, f"it has {counted(len(table), 'row')}, dataset.jsonl {written.total():,}")
    return written, changed, others


def _representatives(ledger: pl.DataFrame) -> Iterator[Check]:
    """Yield whether the rows that stand for those not chosen or not selected were kept by the same stage."""
    for stage, rule in (("best", "not_best"), ("select", "not_selected")):
        part = ledger.filter(pl.col("stage") == stage)
        kept = set(_ids(part.filter(pl.col("action") == "kept")))
        lost = (pl.col("rule") == rule) | pl.col("rule").str.starts_with("unscored:")
        removed = part.filter(lost & pl.col("witness_id").is_not_null())
        if removed.is_empty():
            continue
        faults = [
            f"{name}: its witness {each} was not kept"
            for name, each in zip(_ids(removed), removed["witness_id"], strict=True)
            if each not in kept
        ]
        yield Check(stage, f"{counted(len(removed), 'row')} removed as {rule}, each for a kept witness", tuple(faults))


@dataclass(frozen=True, slots=True)
class _Compared:
    """The rows that a stage compared: ids, and what each is compared by."""

    ids: list[str]
    pairs: list[tuple[str, ...]]
    messages: list[str]
    num_second: int


def _duplicates(run: Run, stage: str, part: pl.DataFrame, rows: pl.DataFrame) -> list[Check]:
    settings = run.config().get("dedup", {})
    name = stage.removeprefix("dedup_")
    if settings.get(name) in (None, False):
        told = f"cannot be certified: the settings it was run with were replaced by a later dedup without {name}; run dedup again"
        return [Check(stage, "its duplicates", (told,))]
    threshold = 1.0 if stage == "dedup_exact" else float(settings[name])
    compared = _compared(rows, part, settings)
    place = {each: number for number, each in enumerate(compared.ids)}
    kept = [place[each] for each in _ids(part.filter(pl.col("action") == "kept")) if each in place]
    stands = {*range(compared.num_second), *kept}
    removed, faults = [], []
    for row in part.filter(pl.col("action") != "kept").iter_rows(named=True):
        who, witness = row_id(row["example_id"], row["sample_index"]), row["witness_id"]
        if row["rule"] != RULES[stage]:
            faults.append(f"{who}: removed by the rule {row['rule']!r}")
        elif witness not in place or place[witness] not in stands:
            faults.append(f"{who}: its witness {witness} was not kept")
        elif stage != "dedup_exact" and row["threshold"] != threshold:
            faults.append(f"{who}: removed at {row['threshold']}, the settings say {threshold}")
        elif who in place:
            removed.append((place[who], place[witness], row["score"]))
        else:
            faults.append(f"{who}: no row of this run")
    measure = {"dedup_exact": _same_texts, "dedup_minhash": _same_words, "dedup_semantic": _same_meaning}[stage]
    return measure(run, compared, removed, kept, threshold, faults, settings)


Removed = Sequence[tuple[int, int, float | None]]


def _same_texts(
    _run: Run, compared: _Compared, removed: Removed, kept: Sequence[int], _threshold: float, faults: list[str], _settings: Any
) -> list[Check]:
    texts = {row: _digest(compared.pairs[row]) for row in {*kept, *(each for row in removed for each in row[:2])}}
    faults = [*faults, *(f"{compared.ids[a]}: its text is not that of {compared.ids[b]}" for a, b, _ in removed if texts[a] != texts[b])]
    first = {_digest(compared.pairs[row]): row for row in range(compared.num_second)}
    again = []
    for row in kept:
        other = first.setdefault(texts[row], row)
        if other != row:
            again.append(f"{compared.ids[row]}: kept, as was {compared.ids[other]}, whose text is the same")
    return [
        Check("dedup_exact", f"{counted(len(removed), 'removed row')}, each with a kept witness of the same text", tuple(faults)),
        Check("dedup_exact", f"no two of {len(kept):,} kept rows have the same text", tuple(again)),
    ]


def _same_words(
    _run: Run, compared: _Compared, removed: Removed, kept: Sequence[int], threshold: float, faults: list[str], settings: Any
) -> list[Check]:
    for row, witness, score in removed:
        near = jaccard(_shingles(compared.pairs[row]), _shingles(compared.pairs[witness]))
        if near < threshold or score is None or abs(near - score) > 1e-9:
            faults.append(f"{compared.ids[row]}: Jaccard {near:.6f} with {compared.ids[witness]}, recorded {score}, threshold {threshold}")
    stands = [*range(compared.num_second), *kept]
    pairs = like_pairs([compared.pairs[row] for row in stands], threshold, compared.num_second)
    again = [f"{compared.ids[stands[b]]}: kept, Jaccard {near:.6f} with {compared.ids[stands[a]]}" for a, b, near in pairs]
    hint = "; the candidates were those of lsh, which misses some" if again and settings.get("candidates") == "lsh" else ""
    gone = counted(len(removed), "removed row")
    return [
        Check("dedup_minhash", f"{gone}, each with a kept witness of Jaccard {threshold:g} or more", tuple(faults)),
        Check("dedup_minhash", f"no two of {len(kept):,} kept rows have a Jaccard of {threshold:g} or more{hint}", tuple(again)),
    ]


def _same_meaning(
    run: Run, compared: _Compared, removed: Removed, kept: Sequence[int], threshold: float, faults: list[str], settings: Any
) -> list[Check]:
    needed = sorted({*range(compared.num_second), *kept, *(each for row in removed for each in row[:2])})
    at = {row: number for number, row in enumerate(needed)}
    vectors = _stored_vectors(run, [compared.messages[row] for row in needed], settings["on"])
    for row, witness, score in removed:
        cosine = float(vectors[at[row]] @ vectors[at[witness]])
        if cosine < threshold - SLACK or score is None or abs(cosine - score) > SLACK:
            faults.append(f"{compared.ids[row]}: cosine {cosine:.8f} with {compared.ids[witness]}, recorded {score}, threshold {threshold}")
    stands = [*range(compared.num_second), *kept]
    matrix = vectors[[at[row] for row in stands]]
    again = []
    for start in range(0, len(stands), BLOCK):
        cosines = matrix[start : start + BLOCK] @ matrix[start:].T
        for a, b in np.argwhere(cosines >= threshold + SLACK).tolist():
            if b > a and start + b >= compared.num_second:
                first, second = compared.ids[stands[start + a]], compared.ids[stands[start + b]]
                again.append(f"{second}: kept, cosine {cosines[a, b]:.8f} with {first}")
    gone = counted(len(removed), "removed row")
    return [
        Check("dedup_semantic", f"{gone}, each with a kept witness of cosine {threshold:g} or more", tuple(faults)),
        Check("dedup_semantic", f"no two of {len(kept):,} kept rows have a cosine of {threshold:g} or more", tuple(again)),
    ]


def jaccard(a: Shingles, b: Shingles) -> float:
    """Return the Jaccard similarity of two sets; of two empty ones 0, as nothing says that they are alike."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both) if len(a) or len(b) else 0.0


def like_pairs(texts: Sequence[tuple[str, ...]], threshold: float, num_second: int = 0) -> list[tuple[int, int, float]]:
    """Return all pairs of texts whose Jaccard similarity is the threshold or more, but those within the first `num_second`.

    Overlaps are entries of the product of the table texts × shingles with itself, in blocks. Shingles of many texts are left out
    of it: they are added to each overlap as if both had them all; texts made of hardly any others are compared by all.
    """
    marks = [_shingles(text) for text in texts]
    sizes = np.array([len(each) for each in marks], dtype=np.int64)
    values = np.concatenate([np.empty(0, dtype=np.int64), *marks])
    shingles, column, often = np.unique(values, return_inverse=True, return_counts=True)
    table = scipy.sparse.csr_matrix(
        (np.ones(len(values), dtype=np.int32), (np.repeat(np.arange(len(texts)), sizes), column)), shape=(len(texts), len(shingles))
    )
    frequent = np.asarray(table[:, often > FREQUENT].sum(axis=1)).ravel()
    proposed = set(_overlapping(table[:, (often > 1) & (often <= FREQUENT)], sizes, frequent, threshold))
    mostly = np.flatnonzero((frequent >= threshold * sizes - 1e-9) & (frequent > 0))
    if len(mostly):
        within = _overlapping(table[mostly][:, often > 1], sizes[mostly], np.zeros(len(mostly)), threshold)
        proposed |= {(int(mostly[a]), int(mostly[b])) for a, b in within}
    found = []
    for a, b in sorted(proposed):
        near = jaccard(marks[a], marks[b]) if b >= num_second else 0.0
        if near >= threshold:
            found.append((a, b, near))
    return found


def _overlapping(table: Any, sizes: npt.NDArray[np.int64], unseen: npt.NDArray[Any], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose overlap, with up to `unseen` more, can make the threshold."""
    turned = table.T.tocsr()
    for start in range(0, table.shape[0], BLOCK):
        product = (table[start : start + BLOCK] @ turned).tocoo()
        a, b = product.row + start, product.col
        both = product.data + np.minimum(unseen[a], unseen[b])
        like = (b > a) & (both >= threshold * (sizes[a] + sizes[b] - both) - 1e-9)
        yield from zip(a[like].tolist(), b[like].tolist(), strict=True)


def _compared(rows: pl.DataFrame, part: pl.DataFrame, settings: Any) -> _Compared:
    ids, pairs, messages = [], [], []
    if settings.get("against"):
        for example in iterate_examples(settings["against"]):
            ids.append(f"{Path(settings['against']).name}:{example.id}")
            messages.append(json.dumps(example.messages, ensure_ascii=False))
            pairs.append(split_texts(example.messages))
    num_second = len(ids)
    took_part = set(_ids(part))
    for name, conversation, prompt, response in zip(_ids(rows), rows["messages"], rows["prompt"], rows["response"], strict=True):
        if name in took_part:
            ids.append(name)
            messages.append(conversation)
            pairs.append((prompt, response))
    chosen: Callable[[str, str | None], tuple[str, ...]] = (
        (lambda prompt, _: (prompt,)) if settings["on"] == "prompt" else (lambda prompt, response: (prompt, response or ""))
    )
    return _Compared(ids, [chosen(*pair) for pair in pairs], messages, num_second)


def _stored_vectors(run: Run, messages: Sequence[str], on: str) -> npt.NDArray[np.float64]:
    """Return the vectors that curate/embeddings.npy has of these conversations, scaled to length 1 in float64."""
    told, stored = run.config().get("embed", {}), stored_vectors(run.path / "curate")
    if stored is None or not told:
        raise UserError(f"{run.path}: the embeddings that dedup decided by are gone (curate/embeddings.npy); run dedup again")
    place = {name: number for number, name in enumerate(stored[0]["name"])}
    settings = json.dumps([told["identity"], told["max_seq_length"], told["dtype"]])
    wanted = []
    for conversation in messages:
        name = hashlib.sha256(f"{settings}\n{embedded_text(conversation, on)}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
        if name not in place:
            raise UserError(f"{run.path}: curate/embeddings.npy has other vectors than those that dedup decided by; run dedup again")
        wanted.append(place[name])
    vectors = stored[1][wanted].astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text as `_plain` has it, in pieces that end with a word."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE)
        end = cut.start() if cut else len(text)
        piece = _plain(text[start:end])
        if piece:
            yield piece
        start = end


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _digest(parts: Sequence[str]) -> tuple[bytes, ...]:
    """Return a hash of each text, equal for texts that are equal but for case, white space and compatible letters."""
    digests = []
    for part in parts:
        state = hashlib.sha256()
        for number, piece in enumerate(_pieces(part)):
            state.update((" " * (number > 0) + piece).encode("utf-8", "surrogatepass"))
        digests.append(state.digest())
    return tuple(digests)


def _shingles(parts: Sequence[str]) -> Shingles:
    """Return the runs of five words, or all words of a text that has fewer."""
    last: deque[str] = deque(maxlen=5)
    hashes = array("q")
    for piece in _pieces("\n".join(parts)):
        for match in WORD.finditer(piece):
            last.append(match[0])
            if len(last) == 5:
                hashes.append(hash(tuple(last)))
    if last and not hashes:
        hashes.append(hash(tuple(last)))
    return np.unique(np.frombuffer(hashes, dtype=np.int64))


def _ids(table: pl.DataFrame) -> list[str]:
    return [row_id(*key) for key in table.select("example_id", "sample_index").iter_rows()]
