"""The checker: it holds for what the steps made, and each way of tampering is caught and named."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import certificate
from sftkit.curate.build import build
from sftkit.curate.certificate import Check, check_run, jaccard, like_pairs, report
from sftkit.curate.config import BuildConfig
from sftkit.curate.decide_config import DedupConfig, EmbedConfig, FilterConfig, SelectConfig
from sftkit.curate.dedup import dedup
from sftkit.curate.rows import load_rows
from sftkit.curate.selection import select

SEA = "The sea is wide and deep and blue and full of fish that swim in it all day and all night long until the morning comes"
ROWS = [
    {"id": "a", "prompt": "Write.", "response": SEA},
    {"id": "b", "prompt": "write. ", "response": SEA.upper()},
    {"id": "c", "prompt": "Write.", "response": SEA + " again"},
    {"id": "d", "prompt": "Count.", "response": "One, two, three, four, five, six, seven, eight, nine, ten."},
    {"id": "e", "prompt": "Count.", "response": "!?"},
]


@pytest.fixture
def made(toy_run: Callable[..., Run]) -> Run:
    """A run whose exact and near duplicates are gone: b is a, and c is nearly a."""
    run = toy_run(ROWS)
    dedup(run, DedupConfig(semantic=None, minhash=0.8))
    return run


def faults(run: Run) -> dict[str, list[str]]:
    return {f"{check.stage}: {check.statement}": list(check.faults) for check in check_run(run) if check.faults}


def tamper(run: Run, stage: str, example_id: str, **values: Any) -> None:
    """Change fields of one decision in the ledger."""
    ledger = run.ledger.read()
    here = (pl.col("stage") == stage) & (pl.col("example_id") == example_id)
    kinds = ledger.schema
    ledger = ledger.with_columns(
        pl.when(here).then(pl.lit(value, kinds[name])).otherwise(pl.col(name)).alias(name) for name, value in values.items()
    )
    ledger.write_parquet(run.ledger.path)


KEPT = {"action": "kept", "rule": "", "witness_id": None, "score": None, "threshold": None}


def test_a_folder_may_be_named_like_a_pattern(toy_run: Callable[..., Run]) -> None:
    """polars takes `[1]` or `*` in a name for a pattern, and then finds no file or another one."""
    run = toy_run(ROWS, name="lr*[1]?")
    dedup(run, DedupConfig(semantic=None, minhash=0.8))
    assert list(load_rows(run)["example_id"]) == ["a", "d", "e"]
    assert not faults(run)


def test_it_holds_for_what_dedup_made_and_says_what_was_checked(made: Run) -> None:
    checks = check_run(made)
    assert faults(made) == {}
    told = report(checks)
    assert "holds  dedup_exact: 5 rows in = 4 kept + 1 rejected + 0 failed" in told
    assert "holds  dedup_exact: 1 removed row, each with a kept witness of the same text" in told
    assert "holds  dedup_minhash: 1 removed row, each with a kept witness of Jaccard 0.8 or more" in told
    assert "holds  dedup_minhash: no two of 3 kept rows have a Jaccard of 0.8 or more" in told
    assert "holds  data set: dataset.jsonl holds exactly the 3 rows that dedup_minhash kept" in told


def test_a_copy_that_was_kept_is_found(made: Run) -> None:
    tamper(made, "dedup_exact", "b", **KEPT)
    found = faults(made)
    assert found["dedup_exact: no two of 5 kept rows have the same text"] == ["b: kept, as was a, whose text is the same"]
    tamper(made, "dedup_minhash", "c", **KEPT)
    assert faults(made)["dedup_minhash: no two of 4 kept rows have a Jaccard of 0.8 or more"] == ["c: kept, Jaccard 0.958333 with a"]


@pytest.mark.parametrize(
    ("stage", "row", "values", "fault"),
    [
        ("dedup_exact", "b", {"witness_id": "d"}, "b: its text is not that of d"),
        ("dedup_exact", "b", {"witness_id": "b"}, "b: its witness b was not kept"),
        ("dedup_exact", "b", {"witness_id": None}, "b: its witness None was not kept"),
        ("dedup_exact", "b", {"rule": "bad_hair"}, "b: removed by the rule 'bad_hair'"),
        ("dedup_minhash", "c", {"witness_id": "d"}, "c: Jaccard 0.000000 with d, recorded 0.958"),
        ("dedup_minhash", "c", {"score": 0.99}, "c: Jaccard 0.958333 with a, recorded 0.99"),
        ("dedup_minhash", "c", {"witness_id": "b"}, "c: its witness b was not kept"),
        ("dedup_minhash", "c", {"threshold": 0.5}, "c: removed at 0.5, the settings say 0.8"),
    ],
)
def test_a_false_removal_is_found(made: Run, stage: str, row: str, values: dict, fault: str) -> None:
    tamper(made, stage, row, **values)
    (only,) = faults(made).values()
    assert only[0].startswith(fault)
    assert len(only) == 1


def test_a_lost_an_invented_and_a_repeated_row_are_found(made: Run) -> None:
    whole = made.ledger.read()
    last = pl.col("stage") == "dedup_minhash"
    whole.filter(~(last & (pl.col("example_id") == "d"))).write_parquet(made.ledger.path)
    (conservation, data_set) = faults(made).values()
    assert conservation == ["d: kept by dedup_exact, gone without a decision"]
    assert data_set == ["d: in the data set, but not kept by dedup_minhash"]
    extra = whole.filter(last & (pl.col("example_id") == "d"))
    pl.concat([whole, extra.with_columns(pl.lit("ghost").alias("example_id"))]).write_parquet(made.ledger.path)
    found = [fault for each in faults(made).values() for fault in each]
    assert "ghost: decided on, but dedup_exact did not keep it" in found
    assert "ghost: kept by dedup_minhash, but no row of this run" in found
    pl.concat([whole, extra]).write_parquet(made.ledger.path)
    assert "d: 2 decisions" in [fault for each in faults(made).values() for fault in each]


def test_a_rejection_without_a_rule_and_a_changed_data_set_are_found(made: Run) -> None:
    tamper(made, "dedup_minhash", "d", action="rejected", rule="")
    found = [fault for each in faults(made).values() for fault in each]
    assert "d: rejected by the rule ''" in found
    assert "d: in the data set, but not kept by dedup_minhash" in found


def test_a_changed_text_and_a_table_that_lost_a_row_are_found(made: Run) -> None:
    lines, table = made.path / "curate" / "dataset.jsonl", made.path / "curate" / "dataset.parquet"
    whole = lines.read_text()
    lines.write_text(whole.replace("One, two", "One, too"))
    found = [fault for each in faults(made).values() for fault in each]
    assert found == ["d: is not as it came", "d: differs from the row d in its place"]
    lines.write_text(whole)
    pl.read_parquet(table).head(-1).write_parquet(table)
    assert faults(made) == {"data set: dataset.parquet holds the same rows in the same order": ["it has 2 rows, dataset.jsonl 3"]}
    table.unlink()
    assert list(faults(made).values()) == [["it is not there; run the last step again"]]
    lines.unlink()
    assert list(faults(made).values()) == [["it is not: dedup_minhash was cut off before it was written; run that again"]]


def test_files_that_were_cut_short_are_found(made: Run) -> None:
    lines, table = made.path / "curate" / "dataset.jsonl", made.path / "curate" / "dataset.parquet"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-30] + b"\xe4")
    found = faults(made)
    assert found["data set: each of its rows has the conversation, source and meta that it came with"] == [
        "line 3: is no row as this run writes it"
    ]
    assert any("kept by dedup_minhash, but not in the data set" in each for told in found.values() for each in told)
    lines.write_bytes(whole)
    table.write_bytes(table.read_bytes()[:-9])
    (told,) = faults(made)["data set: dataset.parquet holds the same rows in the same order"]
    assert "it cannot be read" in told
    ledger = made.ledger.path
    ledger.write_bytes(ledger.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"ledger\.parquet: damaged or cut short"):
        check_run(made)


def test_a_swapped_witness_of_a_selection_is_found(made: Run) -> None:
    select(made, SelectConfig(method="longest", budget=1))
    assert faults(made) == {}
    tamper(made, "select", "d", witness_id="e")
    assert faults(made) == {"select: 1 row removed as not_selected, each for a kept witness": ["d: its witness e was not kept"]}


def test_a_second_set_is_read_again(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    second = tmp_path / "old.jsonl"
    second.write_text(json.dumps({"prompt": "Write.", "completion": SEA + " again and again"}) + "\n")
    run = toy_run(ROWS)
    dedup(run, DedupConfig(semantic=None, minhash=0.8, against=str(second)))
    assert run.ledger.read().filter(pl.col("witness_id").str.starts_with("old.jsonl:")).height == 2
    assert faults(run) == {}
    second.write_text(json.dumps({"prompt": "Write.", "completion": "Something else."}) + "\n")
    found = [fault for each in faults(run).values() for fault in each]
    assert len(found) == 2
    assert all("its witness old.jsonl:" in fault for fault in found)


def test_what_lsh_missed_is_found(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    from sftkit.curate import minhash

    run = toy_run(ROWS)
    keys = minhash.band_keys
    monkeypatch.setattr(minhash, "band_keys", lambda shingles: keys(shingles, bands=1, rows=400))
    dedup(run, DedupConfig(semantic=None, minhash=0.8, candidates="lsh"))
    (check,) = [check for check in check_run(run) if check.faults]
    assert check.faults == ("c: kept, Jaccard 0.958333 with a",)
    assert "those of lsh, which misses some" in check.statement


def test_settings_that_were_replaced_certify_nothing(made: Run) -> None:
    made.configure("dedup", {**made.config()["dedup"], "exact": False}, free=("*",))
    (only,) = faults(made).values()
    assert "the settings it was run with were replaced" in only[0]


@pytest.mark.parametrize("seed", range(8))
def test_like_pairs_are_all_pairs_by_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr(certificate, "FREQUENT", int(random.choice([2, 5, 500])))
    monkeypatch.setattr(certificate, "BLOCK", 7)
    boilerplate = [f"b{number}" for number in range(30)]
    texts = []
    for _ in range(60):
        own = [f"w{number}" for number in random.integers(0, 4, size=int(random.integers(0, 12)))]
        texts.append((" ".join((boilerplate[: int(random.integers(20, 31))] if random.random() < 0.5 else []) + own),))
    sets = [certificate._shingles(text) for text in texts]
    for threshold in (0.3, 0.7, 0.9, 1.0):
        expected = [(a, b, jaccard(sets[a], sets[b])) for a, b in combinations(range(60), 2) if b >= 10]
        assert like_pairs(texts, threshold, 10) == [pair for pair in expected if pair[2] >= threshold]
        assert [pair for pair in expected if pair[2] >= threshold], "there is something to find"


def test_cosines_are_computed_again_from_the_stored_vectors(made: Run, minilm: Path) -> None:
    prompts = ["How do I cook rice?", "How can I cook rice?", "What is a black hole?", "Name the planets."]
    made = _replaced(made, [{"id": str(number), "prompt": text, "response": "."} for number, text in enumerate(prompts)])
    dedup(made, DedupConfig(semantic=0.9, on="prompt", embed=EmbedConfig(model=str(minilm))))
    assert made.ledger.read().filter(pl.col("rule") == "semantic_duplicate")["example_id"].to_list() == ["1"]
    assert faults(made) == {}
    whole = made.ledger.read()
    tamper(made, "dedup_semantic", "1", witness_id="2")
    (only,) = faults(made).values()
    assert only[0].startswith("1: cosine 0.")
    assert "with 2, recorded 0.9" in only[0]
    whole.write_parquet(made.ledger.path)
    tamper(made, "dedup_semantic", "1", **KEPT)
    assert faults(made)["dedup_semantic: no two of 4 kept rows have a cosine of 0.9 or more"][0].startswith("1: kept, cosine 0.9")
    whole.write_parquet(made.ledger.path)
    (made.path / "curate" / "embeddings.npy").unlink()
    with pytest.raises(UserError, match="the embeddings that dedup decided by are gone"):
        check_run(made)


def _replaced(run: Run, rows: list[dict]) -> Run:
    from sftkit.core.example import Decision
    from sftkit.curate.decided import record
    from sftkit.curate.rows import STORED

    stored = [
        {
            "example_id": row["id"],
            "messages": json.dumps([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]),
            "source": "",
            "meta": "{}",
        }
        for row in rows
    ]
    pl.DataFrame(stored, schema_overrides=STORED).write_parquet(run.path / "curate" / "rows.parquet")
    record(run, "import", [(row["id"], None) for row in rows], [Decision(row["id"], None, "import", "kept") for row in rows])
    return run


def test_a_whole_build_is_certified_by_the_command(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in ROWS]
    rows += [{"prompt": f"Tell me about number {number}", "completion": f"It is {number}, after {number - 1}."} for number in range(40)]
    rows += [{"prompt": "How do you like dancing? Can you teach me?", "completion": "Yes."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = BuildConfig(
        filter=FilterConfig(min_words=1), dedup=DedupConfig(semantic=None, minhash=0.8), select=SelectConfig(method="random", budget=20)
    )
    build(data, tmp_path / "run", steps)
    result = CliRunner().invoke(sftkit, ["curate", "verify", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "holds  decontaminate" in result.output
    assert "FAILS" not in result.output
    with Run.create(tmp_path / "run") as run:
        ledger = run.ledger.read()
        ledger.filter(~((pl.col("stage") == "filter") & (pl.col("action") == "rejected"))).write_parquet(run.ledger.path)
    failed = CliRunner().invoke(sftkit, ["curate", "verify", str(tmp_path / "run")])
    assert failed.exit_code == 1
    assert "FAILS  filter" in failed.output
    assert "kept by import, gone without a decision" in failed.output
    assert "1 of 13 statements fail, of filter" in str(failed.exception)


def test_a_folder_that_is_no_run_and_a_run_without_decisions(tmp_path: Path) -> None:
    Run.create(tmp_path / "run").close()
    with pytest.raises(UserError, match="nothing to verify"):
        check_run(Run.open(tmp_path / "run"))
    failed = CliRunner().invoke(sftkit, ["curate", "verify", str(tmp_path)])
    assert "is not a run of sftkit" in str(failed.exception)


def test_long_lists_of_faults_are_cut() -> None:
    told = report([Check("x", "something", tuple(f"row {number}" for number in range(1234)))])
    assert told.count("\n") == 11
    assert told.endswith("and 1,224 more")


def test_a_text_in_pieces_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    signs = [
        " ",
        "\n",
        "\t",
        "a",
        "Z",
        "7",
        "e\u0301",
        "\u0301",
        "\u00b4",
        "\u3000",
        "\u4f60",
        "\ufb01",
        "\u00df",
        "\u0344",
        "\u202e",
        "'",
        "-",
    ]
    for _ in range(300):
        text = "".join(random.choice(signs, size=int(random.integers(0, 60))))
        whole, found = certificate._plain(text), certificate._shingles([text])
        digest = certificate._digest([text])
        with monkeypatch.context() as patched:
            patched.setattr(certificate, "PIECE", int(random.integers(1, 20)))
            assert " ".join(certificate._pieces(text)) == whole
            assert certificate._digest([text]) == digest
            assert certificate._shingles([text]).tolist() == found.tolist()
