"""Selection as a step: what a budget takes, what becomes of the others, what a score does, and the controls."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import selection
from sftkit.curate.controls import length_bucket, rank_correlation
from sftkit.curate.decide_config import SELECTORS, FilterConfig, MixConfig, SelectConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.mix import mix
from sftkit.curate.quotas import balanced_order, cluster, num_clusters, quota_order
from sftkit.curate.rows import load_rows, row_ids
from sftkit.curate.selection import row_lengths, select, share_of_rows
from sftkit.curate.similarity import Vectors, unit_vectors


@pytest.fixture
def placed(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run whose rows lie on a circle, at the angle that is their prompt."""

    def at_angles(run: Run, rows: pl.DataFrame, on: str, config: object) -> Vectors:
        turns = np.radians([float(prompt) for prompt in rows["prompt"]])
        return unit_vectors(np.stack([np.cos(turns), np.sin(turns)], axis=1))

    monkeypatch.setattr(selection, "embed_rows", at_angles)
    return lambda *angles, **more: toy_run([{"id": f"{angle}", "prompt": f"{angle}", "response": "r", **more} for angle in angles])


def test_select_ranks_and_gives_each_rejected_row_its_witness(placed: Callable[..., Run], rejections: Callable) -> None:
    run = placed(0, 10, 50, 90, 170)
    select(run, SelectConfig(budget=3))
    ranking = pl.read_parquet(run.path / "curate" / "selection.parquet")
    assert ranking["example_id"].to_list() == ["50", "170", "0"]
    assert ranking["gain"].to_list() == [None, pytest.approx(1.5), pytest.approx(1 - np.cos(np.radians(50)))]
    assert ranking["witness_id"].to_list() == [None, "50", "50"]
    assert row_ids(load_rows(run)) == ["0", "50", "170"]
    assert rejections(run, "select") == {
        "10": ("not_selected", pytest.approx(np.cos(np.radians(10))), None, "0"),
        "90": ("not_selected", pytest.approx(np.cos(np.radians(40))), None, "50"),
    }


def test_a_smaller_budget_is_a_prefix(placed: Callable[..., Run]) -> None:
    run = placed(*range(0, 300, 7))
    rankings = []
    for budget in (30, 10):
        select(run, SelectConfig(budget=budget))
        rankings.append(pl.read_parquet(run.path / "curate" / "selection.parquet")["example_id"].to_list())
    assert rankings[0][:10] == rankings[1]


def test_the_best_by_a_score_comes_first(placed: Callable[..., Run]) -> None:
    run = placed(0, 100, 20)
    select(run, SelectConfig(budget=1, by=("num_chars",)))
    assert row_ids(load_rows(run)) == ["0"]
    select(run, SelectConfig(budget=2, method="random"))
    assert len(load_rows(run)) == 2


def test_a_budget_above_the_rows_keeps_all_and_says_so(placed: Callable[..., Run]) -> None:
    outcome = select(placed(0, 100), SelectConfig(budget=3))
    assert outcome.notes == ("the budget holds all 2 rows: every one is kept",)
    assert outcome.removed == {}


def test_a_token_budget_is_a_prefix_too(placed: Callable[..., Run]) -> None:
    run = placed(0, 100, 200, 300, num_tokens=10)
    select(run, SelectConfig(budget_tokens=29))
    assert len(load_rows(run)) == 2
    with pytest.raises(UserError, match="the first row of the ranking alone has 10 tokens, more than budget_tokens 9"):
        select(run, SelectConfig(budget_tokens=9))


def test_a_token_budget_needs_counts(placed: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows have no token count.*num_tokens:model=MODEL"):
        select(placed(0, 100), SelectConfig(budget_tokens=9))


def test_random_is_drawn_by_row_and_seed(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [{"prompt": str(each), "response": "r"} for each in range(40)]
    run, turned = toy_run(rows), toy_run(rows[::-1], name="turned")
    for each in (run, turned):
        select(each, SelectConfig(method="random", budget=10, seed=5))
    first = row_ids(load_rows(run))
    assert first == row_ids(load_rows(turned))[::-1]
    assert set(rejections(run, "select").values()) == {("not_selected", None, None, None)}
    select(run, SelectConfig(method="random", budget=10, seed=6))
    assert row_ids(load_rows(run)) != first


def test_a_budget_is_needed() -> None:
    with pytest.raises(UserError, match="give --budget ROWS or --budget-tokens TOKENS"):
        SelectConfig()
    with pytest.raises(UserError, match="budget: expected 1 or more, found 0"):
        SelectConfig(budget=0)


def test_a_config_says_what_is_missing_or_wrong() -> None:
    with pytest.raises(UserError, match="mmr needs a score to choose by: give --by SCORE"):
        SelectConfig(budget=1, method="mmr")
    with pytest.raises(UserError, match="quality_weight: expected a share between 0 and 1, found 2"):
        SelectConfig(budget=1, quality_weight=2)
    with pytest.raises(UserError, match="max_cosine: expected a cosine above 0"):
        SelectConfig(budget=1, max_cosine=-0.9)
    with pytest.raises(UserError, match="strata: expected some of source, length, cluster"):
        SelectConfig(budget=1, strata=())
    with pytest.raises(UserError, match="clusters: expected 1 or more, found 0"):
        SelectConfig(budget=1, clusters=0)
    with pytest.raises(UserError, match="epsilon and fast are two ways to be faster"):
        SelectConfig(budget=1, epsilon=0.1, fast=True)


def ranked(run: Run) -> list[str]:
    return pl.read_parquet(run.path / "curate" / "selection.parquet")["example_id"].to_list()


METHODS = [(method, by) for method in SELECTORS for by in ((), ("num_tokens",)) if by or "by" not in SELECTORS[method]]


@pytest.mark.parametrize(("method", "by"), METHODS)
def test_every_method_is_a_ranking_that_neither_the_order_of_rows_nor_the_budget_changes(
    placed: Callable[..., Run], toy_run: Callable[..., Run], method: str, by: tuple[str, ...]
) -> None:
    random = np.random.default_rng(1)
    angles = [*random.integers(0, 360, size=40).tolist(), *[7.5] * 3]  # some rows are copies of others: ties
    rows = [
        {"id": f"{number:02}", "prompt": f"{angle}", "response": "r" * int(1 + angle % 50), "num_tokens": int(angle) % 10}
        for number, angle in enumerate(angles)
    ]
    run, turned = toy_run(rows), toy_run([rows[place] for place in random.permutation(len(rows))], name="turned")
    rankings = []
    for each, budget in ((run, 40), (turned, 40), (run, 9)):
        select(each, SelectConfig(budget=budget, method=method, by=by, seed=3))
        rankings.append(ranked(each))
    assert rankings[0] == rankings[1]
    assert rankings[2] == rankings[0][:9]
    assert len(rankings[2]) == 9
    decided = run.ledger.read().filter(pl.col("stage") == "select")
    assert Counter(decided["action"]) == {"kept": 9, "rejected": len(rows) - 9}
    if SelectConfig(budget=1, method=method, by=by).needs_vectors:
        left = decided.filter(pl.col("action") == "rejected")
        assert left["witness_id"].is_in(rankings[2]).all()  # the certificate: a taken row and the cosine with it


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["top", "longest", "random", "stratified", "cluster-balanced"])
def test_rankings_that_sort_equal_their_oracle(method: str, seed: int) -> None:
    """A thousand cases of each, as `select` asks for them: rows in the order of their ids, some without a score."""
    draw = np.random.default_rng([seed, len(method)])
    config = SelectConfig(method=method, by=("x",) if method == "top" else (), budget=1, seed=seed, strata=("source", "length"))
    for _ in range(50):
        size = int(draw.integers(1, 16))
        values = [None if draw.random() < 0.2 else float(value) for value in draw.integers(0, 5, size=size)]
        values[0] = 1.0
        lengths = draw.integers(1, 9, size=size).astype(float).tolist()
        files = draw.choice(["a.jsonl", "b.jsonl"], size=size).tolist()
        rows = pl.DataFrame(
            {
                "example_id": sorted(f"{name:04}" for name in draw.choice(10_000, size, replace=False)),
                "sample_index": pl.Series([None] * size, dtype=pl.Int32),
                "source": [f"{file}:{line}" for line, file in enumerate(files)],
            }
        )
        columns = pl.DataFrame({"0": values}) if method == "top" else pl.DataFrame()
        eligible = np.flatnonzero([value is not None for value in values]) if method == "top" else np.arange(size)
        vectors = unit_vectors(draw.normal(size=(size, 3)))
        found = [row for row, _, _ in selection._ranking(rows, eligible, vectors, columns, lengths, size, config)]
        drawn = sorted(range(size), key=lambda row: hashlib.sha256(f"{seed}/{rows['example_id'][row]}".encode()).digest())
        if method == "top":
            expected = sorted(eligible.tolist(), key=lambda row: (-(values[row] or 0.0), row))
        elif method == "longest":
            expected = sorted(range(size), key=lambda row: (-lengths[row], row))
        elif method == "random":
            expected = drawn
        else:
            labels = cluster(vectors, num_clusters(size, None), seed).tolist()
            strata = labels if method == "cluster-balanced" else [(files[row], int(np.log2(lengths[row] + 1))) for row in range(size)]
            order = balanced_order if method == "cluster-balanced" else quota_order
            expected = [row for row, _, _ in order(strata, drawn)]
        assert found == expected


def test_top_and_longest_rank_by_what_they_say(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"id": name, "response": "r" * size, "logprob": -size} for name, size in (("a", 3), ("b", 9), ("c", 3), ("d", 1))])
    select(run, SelectConfig(budget=3, method="top", by=("logprob",)))
    assert pl.read_parquet(run.path / "curate" / "selection.parquet").select("example_id", "gain").rows() == [
        ("d", -1),
        ("a", -3),
        ("c", -3),
    ]
    select(run, SelectConfig(budget=4, method="longest"))
    assert pl.read_parquet(run.path / "curate" / "selection.parquet").select("example_id", "gain").rows() == [
        ("b", 9), ("a", 3), ("c", 3), ("d", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["top", "deita", "qdit", "mmr", "dpp"])
def test_a_row_without_the_score_is_never_taken(
    placed: Callable[..., Run], toy_run: Callable[..., Run], rejections: Callable, method: str
) -> None:
    run = toy_run(
        [
            {"id": f"{angle}", "prompt": f"{angle}", "response": "r", "logprob": score}
            for angle, score in ((0, -1.0), (90, None), (180, -2.0))
        ]
    )
    outcome = select(run, SelectConfig(budget=3, method=method, by=("logprob",)))
    assert set(ranked(run)) == {"0", "180"}
    assert rejections(run, "select") == {"90": ("unscored", None, None, None)}
    assert "1 of 3 rows have no score 'logprob' and are not taken" in outcome.notes


def test_rows_without_the_score_come_last_within_a_cluster(placed: Callable[..., Run], toy_run: Callable[..., Run]) -> None:
    run = toy_run(
        [{"id": f"{angle}", "prompt": f"{angle}", "response": "r", "logprob": score} for angle, score in ((0, None), (1, -1.0), (2, -2.0))]
    )
    select(run, SelectConfig(budget=3, method="cluster-balanced", clusters=1, by=("logprob",)))
    assert ranked(run) == ["1", "2", "0"]


def test_a_score_that_no_row_has_is_an_error(toy_run: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="none of 2 rows has a score 'logprob', which top chooses by"):
        select(toy_run([{"response": "a"}, {"response": "b"}]), SelectConfig(budget=1, method="top", by=("logprob",)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_embedding_that_is_no_number_is_an_error(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    monkeypatch.setattr(selection, "embed_rows", lambda *_: unit_vectors([[1.0, bad], [1.0, 0.0]]))
    with pytest.raises(UserError, match="expected a table of finite numbers"):
        select(toy_run([{"response": "a"}, {"response": "b"}]), SelectConfig(budget=1))


@pytest.mark.parametrize(("method", "by"), METHODS)
def test_rows_of_zeros_do_no_harm(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, method: str, by: tuple[str, ...]) -> None:
    vectors = unit_vectors([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    monkeypatch.setattr(selection, "embed_rows", lambda *_: vectors)
    run = toy_run([{"id": name, "response": "r", "num_tokens": 1} for name in "abcde"])
    select(run, SelectConfig(budget=5, method=method, by=by, max_cosine=0.9))
    assert sorted(ranked(run)) == list("abcde")


def test_deita_names_what_a_row_is_too_similar_to(placed: Callable[..., Run], toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [{"id": f"{angle}", "prompt": f"{angle}", "response": "r", "num_tokens": 100 - angle} for angle in (0, 20, 40, 95)]
    run = toy_run(rows)
    outcome = select(run, SelectConfig(budget=4, method="deita", by=("num_tokens",)))
    assert ranked(run) == ["0", "40", "95"]
    assert rejections(run, "select") == {"20": ("too_similar", pytest.approx(np.cos(np.radians(20))), 0.9, "0")}
    assert "only 3 rows are less similar than 0.9 to each other: the budget is not used up" in outcome.notes
    select(run, SelectConfig(budget=2, method="deita", by=("num_tokens",)))
    assert rejections(run, "select")["95"] == ("not_selected", pytest.approx(np.cos(np.radians(55))), None, "40")


def test_controls_are_as_many_and_as_long(toy_run: Callable[..., Run]) -> None:
    random = np.random.default_rng(0)
    run = toy_run([{"id": f"{number:03}", "response": "r" * int(size)} for number, size in enumerate(random.integers(1, 500, size=200))])
    outcome = select(run, SelectConfig(budget=30, method="longest", controls=True, seed=2))
    taken, controls = load_rows(run), {}
    for name in ("random", "length_matched"):
        lines = (run.path / "curate" / "controls" / f"{name}.jsonl").read_text().splitlines()
        controls[name] = [len(json.loads(line)["messages"][-1]["content"]) for line in lines]
        assert any(
            re.match(rf"control {name}: 30 rows, .*mean length [\d.]+ (tokens|characters), .*controls/{name}.jsonl", note)
            for note in outcome.notes
        )
    buckets = {name: Counter(length_bucket(length, 4) for length in lengths) for name, lengths in controls.items()}
    wanted = Counter(length_bucket(length, 4) for length in row_lengths(taken))
    assert buckets["length_matched"] == wanted
    assert buckets["random"] != wanted
    assert set(json.loads(lines[0])) == {"id", "messages", "source", "meta"}  # what a run's dataset.jsonl has


def test_a_control_of_a_random_selection_is_another_draw(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"id": f"{number:03}"} for number in range(200)])
    select(run, SelectConfig(budget=50, method="random", controls=True))
    lines = (run.path / "curate" / "controls" / "random.jsonl").read_text().splitlines()
    assert 0 < len({json.loads(line)["id"] for line in lines} & set(load_rows(run)["example_id"])) < 30  # 12.5 are expected


def test_a_control_of_a_token_budget_spends_it_too(placed: Callable[..., Run]) -> None:
    run = placed(*range(0, 300, 7), num_tokens=10)
    select(run, SelectConfig(budget_tokens=105, controls=True))
    assert len((run.path / "curate" / "controls" / "random.jsonl").read_text().splitlines()) == 10


def test_the_correlation_of_score_and_length_is_told(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"response": "r" * size, "logprob": -float(size**3)} for size in (1, 2, 5, 9)])
    outcome = select(run, SelectConfig(budget=1, method="top", by=("logprob",)))
    assert outcome.notes == ("rank correlation (Spearman) of logprob and length: -1.00 over 4 rows",)
    outcome = select(run, SelectConfig(budget=1, method="top", by=("-logprob",)))
    assert outcome.notes == ("rank correlation (Spearman) of logprob and length: -1.00 over 4 rows",)
    assert rank_correlation([1.0, None, 1.0], [1, 2, 3]) == (None, 2)
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    scores, lengths = random.integers(0, 5, size=50).astype(float), random.integers(0, 30, size=50).astype(float)
    assert rank_correlation(scores.tolist(), lengths.tolist())[0] == pytest.approx(spearmanr(scores, lengths).statistic)


def test_quality_is_the_share_of_worse_rows() -> None:
    def shares(*columns: list[float | None]) -> list[float]:
        return share_of_rows(pl.DataFrame({str(place): column for place, column in enumerate(columns)})).tolist()

    assert shares([3.0, 1.0, 2.0]) == [1, 0, 0.5]
    assert shares([1.0, 1.0, 5.0]) == [0.25, 0.25, 1]
    assert shares([1.0, 1.0], [0.0, 2.0]) == [0, 1]
    assert shares([None, -9.0, None]) == [0.25, 1, 0.25], "without a value is worse than any"
    assert shares([4.0]) == [0]


COMMANDS = [  # what is asked, what is said
    ("--method top --budget 2", "error: select: top needs a score to choose by: give --by SCORE"),
    (
        "--method top --by num_char --budget 2",
        "unknown score 'num_char': did you mean 'num_chars'? known are logprob, num_chars, num_tokens, num_words",
    ),
    ("--method top --by=-logprob --budget 2", "none of 6 rows has a score 'logprob', which top chooses by"),
    ("--method longest --budget 0", "error: budget: expected 1 or more, found 0"),
    ("--method longest", "error: select: give --budget ROWS or --budget-tokens TOKENS"),
    ("--method qdit --by num_chars --budget 2 --quality-weight 7", "error: quality_weight: expected a share between 0 and 1, found 7"),
    ("--method stratifed --budget 2", "'stratifed' is not one of 'k-center', 'facility-location'"),
]


@pytest.mark.parametrize(("arguments", "said"), COMMANDS)
def test_the_command_says_what_is_wrong(
    toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]], arguments: str, said: str
) -> None:
    run = toy_run([{"response": "r" * size} for size in range(1, 7)])
    run.close()
    code, _, talk = cli("curate", "select", str(run.path), *arguments.split())
    assert code in (1, 2)
    assert said in talk


def test_the_command_tells_controls_and_correlation_and_clears_old_controls(
    toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]]
) -> None:
    run = toy_run([{"id": f"{size}", "response": "r" * size} for size in range(1, 40)])
    run.close()
    controls = run.path / "curate" / "controls"
    code, out, _ = cli("curate", "select", str(run.path), *["--method", "top", "--by=-num_chars", "--budget", "3", "--controls"])
    assert code == 0
    assert ranked(run) == ["1", "2", "3"]
    assert "select: control random: 3 rows" in out
    assert "select: control length_matched: 3 rows" in out
    assert "select: rank correlation (Spearman) of num_chars and length: +1.00 over 39 rows" in out
    assert {path.name for path in controls.iterdir()} == {"random.jsonl", "length_matched.jsonl"}
    assert cli("curate", "select", str(run.path), "--method", "longest", "--budget", "3")[0] == 0
    assert not list(controls.iterdir())  # they were controls of another selection


def test_controls_of_a_selection_that_became_void_are_gone(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"prompt": f"p{n}", "response": "word " * n} for n in range(1, 9)])
    filter_rows(run, FilterConfig(min_words=2, controls=True))
    select(run, SelectConfig(method="longest", budget=3, controls=True))
    folder = run.path / "curate" / "controls"
    assert {each.stem for each in folder.iterdir()} == {"random", "length_matched", "filter_random", "filter_length_matched"}
    filter_rows(run, FilterConfig(min_words=3, controls=True))
    assert {each.stem for each in folder.iterdir()} == {"filter_random", "filter_length_matched"}


def test_token_counts_below_zero_are_no_budget(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"id": str(row), "prompt": str(row), "response": "r", "num_tokens": tokens} for row, tokens in enumerate((5, -3, 5))])
    with pytest.raises(UserError, match="1 of 3 rows have a token count below 0"):
        select(run, SelectConfig(method="longest", budget_tokens=5))
    run.close()
    with pytest.raises(UserError, match="1 of 3 rows have a token count below 0"):
        mix([str(run.path)], None, MixConfig(budget_tokens=5))
