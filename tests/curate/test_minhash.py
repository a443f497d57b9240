"""Near duplicates by shingles: every pair at the threshold is found, each decision equals brute force on sets of words."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.errors import UserError
from sftkit.core.ngrams import WORD, Lookup, hash_words, ngrams, whole_texts, words
from sftkit.core.run import Run
from sftkit.curate.build import planned_stages
from sftkit.curate.config import BuildConfig
from sftkit.curate.decide_config import DedupConfig
from sftkit.curate.dedup import dedup, normalised
from sftkit.curate.minhash import band_keys, jaccard, near_duplicates, prefix_keys, shingle_sets
from sftkit.curate.rows import load_rows, row_ids


def oracle_set(text: str) -> frozenset[tuple[str, ...]]:
    found = WORD.findall(normalised(text))
    return frozenset(tuple(found[place : place + 5]) for place in range(max(len(found) - 4, min(len(found), 1))))


def oracle_jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def oracle(texts: Sequence[str], threshold: float, order: Sequence[int], given: int = 0) -> tuple[list[int], list[float]]:
    """Cover by the definition, every pair compared as sets of words."""
    sets = [oracle_set(text) for text in texts]
    kept: list[int] = []
    witness, near = [-1] * len(texts), [0.0] * len(texts)
    for place, row in enumerate(order):
        best = max(kept, key=lambda other: oracle_jaccard(sets[row], sets[other]), default=None)
        if best is not None and oracle_jaccard(sets[row], sets[best]) >= threshold and place >= given:
            witness[row], near[row] = best, oracle_jaccard(sets[row], sets[best])
        else:
            kept.append(row)
    return witness, near


def random_texts(random: np.random.Generator, size: int) -> list[str]:
    """Texts of a few words to some hundred, many of them edits of others, in a vocabulary of any size."""
    vocabulary = [f"w{number}" for number in range(int(random.choice([2, 6, 40, 5000])))] + ["猫", "犬", "Ｗ1", "don't", "é"]
    texts: list[list[str]] = []
    for _ in range(size):
        if texts and random.random() < 0.6:
            text = list(texts[random.integers(len(texts))])
            for _ in range(int(random.integers(0, 4))):
                if text:
                    text[random.integers(len(text))] = str(random.choice(vocabulary))
        else:
            text = [str(each) for each in random.choice(vocabulary, size=int(random.choice([0, 1, 3, 4, 5, 6, 20, 120])))]
        texts.append(text)
    return [" ".join(text) for text in texts]


@pytest.mark.parametrize("seed", range(40))
def test_cover_equals_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = random_texts(random, int(random.integers(1, 90)))
    threshold = float(random.choice([0.1, 0.5, 0.6, 0.75, 0.8, 1.0]))
    order = random.permutation(len(texts)).tolist()
    given = int(random.integers(0, len(texts) + 1)) if random.random() < 0.5 else 0
    witness, near = near_duplicates(shingle_sets(texts), threshold, order, given=given)
    assert (witness.tolist(), near.tolist()) == oracle(texts, threshold, order, given)


def test_turning_the_input_turns_the_outcome() -> None:
    random = np.random.default_rng(5)
    texts = random_texts(random, 200)
    quality, turn = random.permutation(200), random.permutation(200)
    for keys in (lambda sets: None, lambda sets: band_keys(sets)):
        sets = shingle_sets(texts)
        before, _ = near_duplicates(sets, 0.5, np.argsort(quality).tolist(), keys=keys(sets))
        sets = shingle_sets([texts[row] for row in turn])
        after, _ = near_duplicates(sets, 0.5, np.argsort(quality[turn]).tolist(), keys=keys(sets))
        assert sorted(turn[after < 0]) == np.flatnonzero(before < 0).tolist()


def test_of_a_chain_both_ends_stay() -> None:
    """A is like B and B like C, A not like C: A and C stay. semhash, SemDeDup and NeMo keep one of such a chain, distilabel none;
    tools that join MinHash pairs by union-find merge it too."""
    base = [f"w{number}" for number in range(60)]
    texts = [" ".join(base[begin : begin + 50]) for begin in (0, 5, 10)]
    sets = shingle_sets(texts)
    assert jaccard(sets, 0, np.array([1, 2])).tolist() == [41 / 51, 36 / 56]
    witness, _ = near_duplicates(sets, 0.8, [0, 1, 2])
    assert witness.tolist() == [-1, 0, -1]


def test_of_a_pair_and_of_many_copies_exactly_one_stays() -> None:
    """distilabel's EmbeddingDedup keeps none of a pair. Nothing here grows with pairs: 20,000 copies are 19,999 stars."""
    text = "one two three four five six seven"
    witness, near = near_duplicates(shingle_sets([text] * 20_000), 0.8, range(20_000))
    assert witness[0] == -1
    assert set(witness[1:].tolist()) == {0}
    assert set(near[1:].tolist()) == {1.0}
    witness, _ = near_duplicates(shingle_sets([text] * 20_000), 0.8, range(20_000), given=19_999)
    assert witness[-1] == 0, "copies within the second set do not pile up, and the first of them is the witness"


def test_lsh_finds_pairs_as_often_as_its_formula_says() -> None:
    """1 - (1 - Jʳ)ᵇ, within four standard errors, for similarities on both sides of the bend."""

    def probability(similarity: float) -> float:  # that bands find a pair: 25 bands of 10 rows
        return 1 - (1 - similarity**10) ** 25

    random = np.random.default_rng(0)
    trials = 1500
    for overlap, size in ((160, 200), (150, 200), (130, 200), (180, 200)):
        values, starts = [], [0]
        for _ in range(trials):
            drawn = random.integers(0, 2**64, size=2 * size - overlap, dtype=np.uint64)
            for chosen in (drawn[:size], drawn[size - overlap :]):
                values.append(np.sort(chosen))
                starts.append(starts[-1] + size)
        keys = band_keys(type(shingle_sets([]))(np.concatenate(values), np.array(starts)))
        table = keys.values.reshape(trials, 2, 25)
        found = (table[:, 0] == table[:, 1]).any(axis=1).mean()
        similarity = overlap / (2 * size - overlap)
        expected = probability(similarity)
        assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / trials) + 1e-3, (similarity, found, expected)
    assert probability(0.8) == pytest.approx(0.942, abs=5e-4)
    assert probability(0.5) == pytest.approx(0.024, abs=5e-4)


def test_lsh_removes_only_true_duplicates() -> None:
    random = np.random.default_rng(3)
    texts = random_texts(random, 300)
    sets = shingle_sets(texts)
    witness, near = near_duplicates(sets, 0.7, range(300), keys=band_keys(sets, bands=50, rows=1))
    removed = np.flatnonzero(witness >= 0)
    assert len(removed) > 40
    for row in removed:
        assert near[row] == oracle_jaccard(oracle_set(texts[row]), oracle_set(texts[witness[row]])) >= 0.7
        assert witness[witness[row]] == -1


def test_every_like_pair_shares_a_prefix_key() -> None:
    random = np.random.default_rng(8)
    texts = random_texts(random, 150)
    sets, plain = shingle_sets(texts), [oracle_set(text) for text in texts]
    for threshold in (0.3, 0.6, 0.8, 1.0):
        keys = prefix_keys(sets, threshold)
        for a in range(150):
            for b in range(a):
                if plain[a] and oracle_jaccard(plain[a], plain[b]) >= threshold:
                    assert np.intersect1d(keys.of(a), keys.of(b)).size, (texts[a], texts[b])


def test_short_texts_are_one_shingle_and_texts_without_words_stay() -> None:
    texts = ["Yes.", "yes", "Yes, yes", "!!!", "???", "", "  ", "你好", "你好。"]
    witness, _ = near_duplicates(shingle_sets(texts), 0.8, range(len(texts)))
    assert witness.tolist() == [-1, 0, -1, -1, -1, -1, -1, -1, 7]


def test_words_take_the_short_way_of_ascii_and_arrive_at_the_same() -> None:
    every = "".join(chr(code) for code in range(128)) + " A_b-c'd 1.5 don't\x00x"
    assert words(every) == [word.encode() for word in WORD.findall(every.casefold())]
    assert words(every + "é") == [word.encode() for word in WORD.findall((every + "é").casefold())]
    assert words("Ｈｅｌｌｏ 你好 ﬁne") == [b"hello", "你".encode(), "好".encode(), b"fine"]
    assert words("half \ud800 pair")[-1] == b"pair"


def test_ngrams_stay_within_their_text() -> None:
    texts = ["a b c", "", "d", "e f g h", "b c"]
    hashed = hash_words(texts)
    for n in (1, 2, 3, 4):
        grams = ngrams(hashed, n)
        for number, text in enumerate(texts):
            parts = text.split()
            expected = [whole_texts(hash_words([" ".join(parts[p : p + n])]))[0] for p in range(len(parts) - n + 1)]
            assert grams.of(number).tolist() == expected
    assert len(set(ngrams(hashed, 2).values.tolist())) == 5, "b c is one hash in both texts"


def test_lookup_finds_what_is_there() -> None:
    random = np.random.default_rng(1)
    table = np.unique(random.integers(0, 2**64, size=500, dtype=np.uint64))
    values = np.concatenate([random.choice(table, 50), random.integers(0, 2**64, size=5000, dtype=np.uint64), [np.uint64(2**64 - 1)]])
    where, places = Lookup(table).find(values)
    assert where.tolist() == np.flatnonzero(np.isin(values, table)).tolist()
    assert (table[places] == values[where]).all()
    assert Lookup(table[:0]).find(values)[0].size == 0


SEA = "The sea is wide and deep and blue and full of fish that swim in it all day and all night long until the morning comes"


def test_dedup_names_the_rule_the_similarity_and_the_witness(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        {"id": "a", "prompt": "Write.", "response": SEA},
        {"id": "b", "prompt": "Write!", "response": SEA.upper() + " again"},
        {"id": "c", "prompt": "Write.", "response": "Something else that has nothing of the sea in it at all."},
    ]
    run = toy_run(rows)
    dedup(run, DedupConfig(semantic=None, minhash=0.8))
    expected = oracle_jaccard(*(oracle_set(f"{row['prompt']} {row['response']}") for row in rows[:2]))
    assert rejections(run, "dedup_minhash") == {"b": ("near_duplicate", expected, 0.8, "a")}
    dedup(run, DedupConfig(semantic=None, minhash=0.8, by=("num_chars",)))
    assert rejections(run, "dedup_minhash") == {"a": ("near_duplicate", expected, 0.8, "b")}
    dedup(run, DedupConfig(semantic=None, minhash=0.8, candidates="lsh"))
    assert rejections(run, "dedup_minhash") == {"b": ("near_duplicate", expected, 0.8, "a")}


def test_a_second_set_removes_and_never_changes(toy_run: Callable[..., Run], rejections: Callable, tmp_path: Path) -> None:
    second = tmp_path / "old.jsonl"
    second.write_text(f'{{"prompt": "Write.", "completion": "{SEA} again"}}\n' * 2 + '{"prompt": "What?", "completion": "THIS"}\n')
    before = second.read_bytes()
    run = toy_run(
        [
            {"id": "a", "prompt": "Write.", "response": SEA},
            {"id": "b", "prompt": "what?", "response": "this"},
            {"id": "c", "prompt": "Who?", "response": "Nobody whom anyone here has ever met or will meet."},
        ]
    )
    dedup(run, DedupConfig(semantic=None, minhash=0.8, against=str(second)))
    (exact,), (near,) = rejections(run, "dedup_exact").items(), rejections(run, "dedup_minhash").items()
    assert exact[0] == "b"
    assert exact[1][0] == "exact_duplicate"
    assert exact[1][3].startswith("old.jsonl:")
    assert near[0] == "a"
    assert near[1][3].startswith("old.jsonl:")
    assert "~2" not in near[1][3], "of equal rows the first is the witness"
    assert row_ids(load_rows(run)) == ["c"]
    assert second.read_bytes() == before


def test_the_second_set_is_compared_by_meaning_too(
    toy_run: Callable[..., Run], rejections: Callable, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftkit.curate import dedup as deduplicate
    from sftkit.curate.similarity import unit_vectors

    angles = {"a": 0, "b": 20, "c": 40, "z": 10}

    def embed(run: Run, rows: object, on: str, config: object) -> np.ndarray:
        turns = np.radians([angles[prompt] for prompt in rows["prompt"]])  # type: ignore[index]
        return unit_vectors(np.stack([np.cos(turns), np.sin(turns)], axis=1))

    monkeypatch.setattr(deduplicate, "embed_rows", embed)
    second = tmp_path / "old.jsonl"
    second.write_text('{"prompt": "z", "completion": "."}\n' * 2)
    run = toy_run([{"id": name, "prompt": name, "response": "."} for name in "abc"])
    dedup(run, DedupConfig(exact=False, semantic=0.95, against=str(second)))
    rejected = rejections(run, "dedup_semantic")
    assert set(rejected) == {"a", "b"}
    assert all(each[3].startswith("old.jsonl:") for each in rejected.values())
    assert row_ids(load_rows(run)) == ["c"]


def test_a_second_set_without_answers_is_told(toy_run: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    second = tmp_path / "prompts.jsonl"
    second.write_text('{"prompt": "What?"}\n')
    run = toy_run([{"id": "a", "prompt": "What?", "response": "This."}])
    dedup(run, DedupConfig(semantic=None, against=str(second)))
    assert "compare prompts alone" in caplog.text
    assert row_ids(load_rows(run)) == ["a"]


def test_an_empty_second_set_is_refused(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    run = toy_run([{"id": "a", "prompt": "What?", "response": "This."}])
    with pytest.raises(UserError, match=r"none\.jsonl: is empty; expected at least one row"):
        dedup(run, DedupConfig(semantic=None, against=str(tmp_path / "none.jsonl")))


def test_a_text_of_10_mb_is_a_row_like_any_other(toy_run: Callable[..., Run], rejections: Callable) -> None:
    long = " ".join(f"word{number % 100_000}" for number in range(1_000_000))
    rows = [{"id": "a", "prompt": "x", "response": long}, {"id": "b", "prompt": "x", "response": long[:-8]}]
    run = toy_run([*rows, {"id": "c", "prompt": "x", "response": "no"}])
    dedup(run, DedupConfig(semantic=None, minhash=0.8))
    assert set(rejections(run, "dedup_minhash")) == {"b"}


def test_a_build_and_the_command_find_near_duplicates_between_the_exact_and_those_by_meaning(tmp_path: Path) -> None:
    assert planned_stages(BuildConfig(dedup=DedupConfig(minhash=0.8)))[-3:] == ["dedup_exact", "dedup_minhash", "dedup_semantic"]
    data, second = tmp_path / "data.jsonl", tmp_path / "second.jsonl"
    rows = [{"prompt": "Write.", "completion": text} for text in (SEA, SEA + " again", "Nothing of that kind stands here at all.")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second.write_text(json.dumps({"prompt": "Write!", "completion": rows[2]["completion"] + " Ah"}) + "\n")
    arguments = ["curate", "dedup", str(data), "-o", str(tmp_path / "run"), "--no-semantic", "--minhash", "0.6", "--against", str(second)]
    result = CliRunner().invoke(sftkit, arguments)
    assert result.exit_code == 0, result.output
    assert "near_duplicate 2" in result.output
    refused = CliRunner().invoke(sftkit, [*arguments[:-3], "-0.6"])
    assert "expected a Jaccard similarity above 0" in str(refused.exception)


@pytest.mark.parametrize("value", [-0.8, 0.0, 80.0])
def test_a_distance_is_told_from_a_similarity(value: float) -> None:
    with pytest.raises(UserError, match=rf"minhash: expected a Jaccard similarity above 0 and up to 1, found {value}; a distance"):
        DedupConfig(minhash=value)
