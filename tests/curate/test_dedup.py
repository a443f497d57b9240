"""Duplicates: one of each stays, every removed row has a kept row that stands for it, and blocks do not matter."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sftkit.core.config import load_config
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import cover as covering
from sftkit.curate.certificate import check_run
from sftkit.curate.cover import cover
from sftkit.curate.decide_config import DedupConfig, EmbedConfig, SelectConfig
from sftkit.curate.dedup import dedup, exact_witnesses, normalised, normalised_column
from sftkit.curate.rows import load_rows, row_ids
from sftkit.curate.selection import select
from sftkit.curate.similarity import Candidates, Vectors, exact_cosines, nearest, unit_vectors


def at_angles(*degrees: float) -> Vectors:
    turns = np.radians(degrees)
    return unit_vectors(np.stack([np.cos(turns), np.sin(turns)], axis=1))


def cosine_table(vectors: Vectors) -> np.ndarray:
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    lengths[lengths == 0] = 1
    return np.round(wide @ wide.T / np.outer(lengths, lengths), 9)


def oracle(vectors: Vectors, threshold: float, order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Cover by the definition, one row at a time: the kept rows, and the witness of each row."""
    table = cosine_table(vectors)
    kept: list[int] = []
    witness = [-1] * len(vectors)
    for row in order:
        near = max(kept, key=lambda other: table[row, other], default=None)  # of equals the one visited first
        if near is not None and table[row, near] >= threshold:
            witness[row] = near
        else:
            kept.append(row)
    return kept, witness


def kept_of(witness: np.ndarray) -> list[int]:
    return np.flatnonzero(witness < 0).tolist()


def test_of_a_pair_exactly_one_stays() -> None:
    """Cosine .94 at a threshold of .9: distilabel's EmbeddingDedup keeps neither."""
    vectors = at_angles(0, np.degrees(np.arccos(0.94)))
    for order in ([0, 1], [1, 0]):
        witness, cosine = cover(vectors, 0.9, order)
        assert kept_of(witness) == [order[0]]
        assert witness[order[1]] == order[0]
        assert cosine[order[1]] == pytest.approx(0.94, abs=1e-6)


def test_of_a_chain_both_ends_stay() -> None:
    """semhash, SemDeDup and NeMo keep one of the three, distilabel none."""
    witness, _ = cover(at_angles(0, 20, 40), 0.9, [0, 1, 2])  # cos 20° = .940, cos 40° = .766
    assert kept_of(witness) == [0, 2]
    assert witness[1] == 0


def test_the_best_row_duplicated_leaves_one_copy() -> None:
    """distilabel drops both copies."""
    witness, cosine = cover(at_angles(30, 30, 90), 1.0, [1, 0, 2])
    assert kept_of(witness) == [1, 2]
    assert (witness[0], cosine[0]) == (1, 1.0)


def test_a_cosine_of_exactly_the_threshold_is_a_duplicate() -> None:
    vectors = unit_vectors([[1, 0], [3, 4]])  # cosine 3/5
    assert kept_of(cover(vectors, 0.6, [0, 1])[0]) == [0]
    assert kept_of(cover(vectors, 0.600001, [0, 1])[0]) == [0, 1]


@pytest.mark.parametrize("block", [1, 8, 64, 256, 5000])
def test_blocks_do_not_change_the_set(block: int) -> None:
    """deita's filter keeps 79, 79, 74 or 66 rows of such a set, by its batch size of 1, 8, 64 or 256."""
    random = np.random.default_rng(0)
    vectors = unit_vectors(random.normal(size=(2000, 4)))
    order = random.permutation(2000).tolist()
    witness, _ = cover(vectors, 0.95, order, block=block)
    kept, expected = oracle(vectors, 0.95, order)
    assert kept_of(witness) == sorted(kept)
    assert witness.tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_cover_equals_its_oracle_and_certifies_itself(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand cases in all, of small sets and a few larger ones; how rows stand in the file changes nothing."""
    monkeypatch.setattr(covering, "TILE", 7)
    random = np.random.default_rng(seed)
    for number in range(50):
        check_cover(random, int(random.integers(1, 120 if number % 10 == 0 else 24)))


def check_cover(random: np.random.Generator, size: int) -> None:
    dimensions = int(random.integers(2, 40))
    base = random.normal(size=(max(size // 3, 1), dimensions))
    vectors = base[random.integers(len(base), size=size)] + random.choice([0, 1e-6, 0.1, 0.5]) * random.normal(size=(size, dimensions))
    vectors[random.random(size) < 0.05] = 0
    vectors = unit_vectors(vectors)
    threshold = float(random.choice([0.3, 0.8, 0.95, 1.0]))
    order = random.permutation(size).tolist()
    witness, cosine = cover(vectors, threshold, order, block=int(random.choice([1, 3, 16, 1024])))
    kept, expected = oracle(vectors, threshold, order)
    assert witness.tolist() == expected
    place, table = {row: number for number, row in enumerate(order)}, cosine_table(vectors)
    for row in range(size):
        if witness[row] >= 0:
            assert witness[witness[row]] == -1, "the witness stayed"
            assert place[witness[row]] < place[row], "the witness was visited before"
            assert cosine[row] >= threshold
            assert cosine[row] == table[row, kept].max(initial=-2, where=[place[other] < place[row] for other in kept])
    for first in kept:
        assert all(table[first, second] < threshold for second in kept if second != first)
    turn = random.permutation(size)
    turned, _ = cover(vectors[turn], threshold, np.argsort(turn)[order].tolist(), block=int(random.choice([1, 5, 1024])))
    assert sorted(turn[kept_of(turned)]) == sorted(kept)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 0.999999])
def test_shorter_vectors_bound_every_cosine_and_change_nothing(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors as embedders make them, their copies at all distances, zeros and repeats among them."""
    monkeypatch.setattr(covering, "BLOCK", 64)
    random = np.random.default_rng(4)
    scale = 1 / np.sqrt(1 + np.arange(128) / 4)
    base = random.normal(size=(900, 128)) * scale
    base[300:600] = base[:300] + random.choice([0, 1e-7, 0.05, 0.2, 0.4], size=(300, 1)) * random.normal(size=(300, 128)) * scale
    base[random.integers(900, size=10)] = 0
    vectors = unit_vectors(base)
    short = covering.bounding_vectors(vectors, threshold)
    assert (short is None) == (threshold == 0.5)
    if short is not None:
        assert short.shape[1] < 128
        assert (short @ short.T >= cosine_table(vectors) - 1e-6).all()
    order = random.permutation(900).tolist()
    witness, _ = cover(vectors, threshold, order)
    assert witness.tolist() == oracle(vectors, threshold, order)[1]
    for block in (1, 50, 2000):
        assert cover(vectors, threshold, order, block=block)[0].tolist() == witness.tolist()


def test_given_rows_stay_and_copies_among_them_do_not_pile_up() -> None:
    vectors = at_angles(0, 0, 5, 3, 90, 90)
    witness, cosine = cover(vectors, 0.99, [0, 1, 2, 3, 4, 5], given=3)
    assert witness.tolist() == [-1, -1, -1, 2, -1, 4]
    assert cosine[3] == pytest.approx(np.cos(np.radians(2)))


def test_turning_the_input_turns_the_outcome() -> None:
    random = np.random.default_rng(3)
    vectors = unit_vectors(random.normal(size=(300, 3)))
    quality = random.permutation(300)
    before, _ = cover(vectors, 0.9, np.argsort(quality).tolist())
    turn = random.permutation(300)
    after, _ = cover(vectors[turn], 0.9, np.argsort(quality[turn]).tolist())
    assert sorted(turn[kept_of(after)]) == kept_of(before)


def test_close_to_the_threshold_float64_decides() -> None:
    """Rows whose float32 product differs from block to block: the decision is the same for all of them."""
    random = np.random.default_rng(1)
    vectors = unit_vectors(random.normal(size=(400, 384)))
    table = cosine_table(vectors)
    threshold = float(np.sort(table[np.triu_indices(400, 1)])[-40])  # exactly the cosine of a pair
    outcomes = {tuple(cover(vectors, threshold, range(400), block=block)[0]) for block in (1, 2, 17, 100, 400)}
    assert outcomes == {tuple(oracle(vectors, threshold, range(400))[1])}


def test_nearest_is_exact_and_prefers_the_first() -> None:
    random = np.random.default_rng(2)
    vectors = unit_vectors(np.repeat(random.normal(size=(60, 8)), 2, axis=0))
    kept = random.permutation(120)[:50]
    rows = np.arange(120)
    witness, cosine = nearest(vectors, rows, kept)
    table = cosine_table(vectors)
    assert witness.tolist() == [kept[int(np.argmax(table[row, kept]))] for row in rows]
    assert cosine.tolist() == [table[row, kept].max() for row in rows]


def test_candidates_hold_the_maximum_of_earlier_tiles() -> None:
    vectors = at_angles(0, 5, 50, 7)
    found = Candidates(1, floor=0.5)
    for column in (1, 2, 3):
        found.add((vectors[:1] @ vectors[column : column + 1].T), column)
    places, cosines = found.verified(vectors, np.array([0]), np.arange(4))[0]
    assert places.tolist() == [1]
    assert cosines.tolist() == exact_cosines(vectors, np.array([0]), np.array([1])).tolist()


def test_broken_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="expected a table of finite numbers"):
        unit_vectors([[1.0, float("nan")]])


def test_normalisation() -> None:
    assert normalised("  Ｈｅｌｌｏ\tWORLD \n") == normalised("hello world")
    assert normalised("Straße") == normalised("STRASSE")
    assert normalised("ﬁn") == "fin"
    assert normalised("hello, world") != normalised("hello world")


def test_a_column_is_normalised_as_each_text_is() -> None:
    texts = ["", " ", "A  b\x1f\tC\n", "  Straße ﬁn\u2003ok", "ΑΣ\x85x", "x\x0b\x1c y", "İ", "plain text", "a\u00a0b ", "ｅ\u0301"]
    assert normalised_column(pl.Series("text", texts)).to_list() == [normalised(text) for text in texts]
    assert normalised_column(pl.Series("text", texts[:3])).to_list() == [normalised(text) for text in texts[:3]]


def test_exact_duplicates_name_the_first_that_was_visited() -> None:
    rows = pl.DataFrame({"prompt": ["A", "a ", "a x", "a", "ａ"], "response": ["x", "X", None, "y", "x"]})
    assert exact_witnesses(rows, "pair", np.arange(5)).tolist() == [-1, 0, -1, -1, 0]
    assert exact_witnesses(rows, "pair", np.arange(5)[::-1]).tolist() == [4, 4, -1, -1, -1]
    assert exact_witnesses(rows, "prompt", np.arange(5)).tolist() == [-1, 0, -1, 0, 0]
    twice = pl.concat([rows, rows, rows[::-1]])  # several texts, each several times
    assert exact_witnesses(twice, "pair", np.arange(15)).tolist() == [-1, 0, -1, -1, 0, 0, 0, 2, 3, 0, 0, 3, 2, 0, 0]
    assert exact_witnesses(rows, "prompt", np.arange(5), given=2).tolist() == [-1, -1, -1, 0, 0], "the given ones stay"


def test_dedup_exact_on_pairs_or_prompts_in_the_order_of_a_score(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        {"id": "a", "prompt": "What?", "response": "This."},
        {"id": "b", "prompt": "what? ", "response": "this."},
        {"id": "c", "prompt": "what?", "response": "That is it."},
        {"id": "d", "prompt": "Who?", "response": "This."},
    ]
    run = toy_run(rows)
    dedup(run, DedupConfig(semantic=None))
    assert rejections(run, "dedup_exact") == {"b": ("exact_duplicate", None, None, "a")}
    dedup(run, DedupConfig(semantic=None, on="prompt"))
    assert rejections(run, "dedup_exact") == dict.fromkeys("bc", ("exact_duplicate", None, None, "a"))
    dedup(run, DedupConfig(semantic=None, on="prompt", by=("num_chars",)))
    assert rejections(run, "dedup_exact") == dict.fromkeys("ab", ("exact_duplicate", None, None, "c"))
    assert row_ids(load_rows(run)) == ["c", "d"]


def test_tool_calls_and_pictures_tell_rows_apart(toy_run: Callable[..., Run]) -> None:
    def picture(data: str) -> list[dict]:
        parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": data}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]

    def call(city: str) -> list[dict]:
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
        return [{"role": "user", "content": "How is it there?"}, {"role": "assistant", "content": None, "tool_calls": calls}]

    rows = [picture("one"), picture("two"), picture("one"), call("Rome"), call("Oslo")]
    run = toy_run([{"id": str(number), "messages": messages, "response": "", "prompt": ""} for number, messages in enumerate(rows)])
    dedup(run, DedupConfig(semantic=None))
    assert row_ids(load_rows(run)) == ["0", "1", "3", "4"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semantic": 0.0}, "semantic: expected a cosine above 0"),
        ({"semantic": 90.0}, "semantic: expected a cosine above 0 and up to 1, found 90"),
        ({"exact": False, "semantic": None}, "neither exact nor semantic"),
        ({"embed": {"max_seq_length": 0}}, "embed: max_seq_length: expected a whole number above 0, found 0"),
        ({"embed": {"batch_tokens": -1}}, "embed: batch_tokens: expected a whole number above 0, found -1"),
        ({"embed": None}, "embed: expected settings like 'key: value', found None"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(DedupConfig, settings)


@pytest.mark.parametrize("command", ["build", "dedup"])
@pytest.mark.parametrize("embed", ["3", "null"])
def test_an_embedder_beside_a_section_of_another_type_is_one_line(
    command: str, embed: str, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "c.yaml").write_text(f"dedup: {{embed: {embed}}}" if command == "build" else f"embed: {embed}")
    code, _, err = cli("curate", command, tmp_path / "rows.jsonl", "-o", tmp_path / "run", "--config", tmp_path / "c.yaml", "--model", "x")
    assert code == 1
    assert "embed: expected settings like 'key: value', found " in err


@pytest.mark.parametrize("command", ["build", "dedup"])
def test_duplicates_by_meaning_are_left_out_of_it_by_an_option(
    command: str, tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No embedding model is needed then: this machine has none."""
    monkeypatch.setenv("SFTKIT_CACHE", str(tmp_path / "empty"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 2)
    code, out, err = cli("curate", command, tmp_path / "rows.jsonl", "-o", tmp_path / "run", "--no-semantic")
    assert code == 0, err
    assert "exact_duplicate 1" in out
    assert "dedup_semantic" not in out


def test_what_is_not_asked_for_any_more_is_taken_back_with_all_that_stood_on_it(toy_run: Callable[..., Run], caplog: Any) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    run = toy_run([{"prompt": words, "response": f"{words} {end}"} for end in ("a", "b")] + [{"prompt": f"q{n}"} for n in range(9)])
    dedup(run, DedupConfig(minhash=0.5, semantic=None))
    select(run, SelectConfig(budget=5, method="random", controls=True))
    assert run.ledger.stages()[1:] == ["dedup_exact", "dedup_minhash", "select"]
    with caplog.at_level("INFO"):
        dedup(run, DedupConfig(semantic=None))
    assert run.ledger.stages()[1:] == ["dedup_exact"]
    assert "dedup_minhash is not asked for now: the former decisions of dedup_minhash, select are taken back" in caplog.text
    assert len((run.path / "curate" / "dataset.jsonl").read_text().splitlines()) == 11
    assert not list((run.path / "curate" / "controls").iterdir())
    assert not (run.path / "curate" / "selection.parquet").exists()
    assert not any(check.faults for check in check_run(run))
    with pytest.raises(UserError, match="unknown score 'nope'"):
        dedup(run, DedupConfig(exact=False, minhash=0.5, semantic=None, by=("nope",)))
    assert run.ledger.stages()[1:] == ["dedup_exact"]  # what is refused takes nothing back


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"embed": EmbedConfig(model="nosuchmodel")}, "nosuchmodel"),
        ({"memory_gb": 1e-3}, "takes about 0.1 GB for 10 rows, memory_gb allows 0.001"),
        ({"memory_gb": 1e-3, "exact": False}, "takes about 0.1 GB for 11 rows, memory_gb allows 0.001"),
    ],
)
def test_what_duplicates_by_meaning_refuse_takes_nothing_back(settings: dict, told: str, toy_run: Callable[..., Run], minilm: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    run = toy_run(
        [{"id": f"{n}", "prompt": words, "response": f"{words} {n // 2}"} for n in range(3)] + [{"prompt": f"q{n}"} for n in range(8)]
    )
    dedup(run, DedupConfig(minhash=0.5, semantic=None))
    select(run, SelectConfig(budget=5, method="random", controls=True))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        dedup(run, DedupConfig(**{"embed": EmbedConfig(model=str(minilm)), **settings}))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_memory_is_reckoned_for_the_rows_that_stand(toy_run: Callable[..., Run], minilm: Path) -> None:
    """Of 3,000 rows 4 are selected: the 3,000 would take too much, the 4 do not."""
    run = toy_run([{"prompt": f"q{n}", "response": "x"} for n in range(3000)])
    dedup(run, DedupConfig(semantic=None))
    select(run, SelectConfig(budget=4, method="random"))
    dedup(run, DedupConfig(embed=EmbedConfig(model=str(minilm)), memory_gb=0.101))
    assert run.ledger.stages()[1:] == ["dedup_exact", "select", "dedup_semantic"]
    dedup(run, DedupConfig(exact=False, minhash=1.0, semantic=None))
    before = run.ledger.stages()
    with pytest.raises(UserError, match=r"takes about 0\.1 GB for 3,000 rows"):
        dedup(run, DedupConfig(embed=EmbedConfig(model=str(minilm)), memory_gb=0.101))
    assert run.ledger.stages() == before


def test_what_another_way_now_comes_before_is_taken_back(toy_run: Callable[..., Run], caplog: Any) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    run = toy_run([{"id": f"{n}", "prompt": words, "response": f"{words} {n // 2}"} for n in range(4)])
    dedup(run, DedupConfig(exact=False, minhash=0.99, semantic=None))
    with caplog.at_level("INFO"):
        exact, near = dedup(run, DedupConfig(minhash=0.5, semantic=None))
    assert "dedup_minhash follows dedup_exact now: the former decisions of dedup_minhash are taken back" in caplog.text
    assert run.ledger.stages()[1:] == ["dedup_exact", "dedup_minhash"]
    assert (exact.num_input, exact.removed, near.num_input, near.removed) == (4, {"exact_duplicate": 2}, 2, {"near_duplicate": 1})
    assert row_ids(load_rows(run)) == ["0"]
    select(run, SelectConfig(budget=1, method="random"))
    dedup(run, DedupConfig(minhash=0.5, semantic=None))
    assert run.ledger.stages()[1:] == ["dedup_exact", "dedup_minhash", "select"]  # each is at its place
