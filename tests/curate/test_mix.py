"""Mixing: shares, temperatures and budgets, no hidden repetition, and every row of every source accounted for."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.build import build
from sftkit.curate.certificate import check_run
from sftkit.curate.config import BuildConfig, ImportConfig, ScoreConfig
from sftkit.curate.decide_config import FilterConfig, MixConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.intake import import_run
from sftkit.curate.mix import mix, quotas, shares_of
from sftkit.curate.rows import load_rows
from sftkit.curate.score import score


def file(path: Path, prefix: str, count: int) -> str:
    rows = [{"prompt": f"{prefix} {place}", "response": f"answer {place}", "num_tokens": 10 + place % 3} for place in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def taken(run: Path) -> Counter:
    return Counter(text.split()[0] for text in load_rows(Run.open(run), columns=["prompt"])["prompt"])


def holds(run: Path) -> None:
    faults = [fault for check in check_run(Run.open(run)) for fault in check.faults]
    assert faults == []


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"budget": 40, "shares": {"a": 3.0, "b": 1.0}}, {"a": 30, "b": 10}),
        ({"shares": {"a": 1.0, "b": 1.0}}, {"a": 20, "b": 20}),
        ({"shares": {"a": 1.0, "b": 0.0}}, {"a": 80}),
        ({"budget": 50}, {"a": 40, "b": 10}),
        ({"budget": 30, "temperature": 2.0}, {"a": 20, "b": 10}),
        ({"budget": 7, "shares": {"a": 1.0, "b": 1.0}}, {"a": 4, "b": 3}),
        ({}, {"a": 80, "b": 20}),
    ],
)
def test_how_much_of_each_source_is_taken(settings: dict, wanted: dict, tmp_path: Path) -> None:
    sources = [file(tmp_path / "a.jsonl", "a", 80), file(tmp_path / "b.jsonl", "b", 20)]
    outcome = mix(sources, tmp_path / "run", MixConfig(**settings))
    assert taken(tmp_path / "run") == wanted
    assert outcome.num_input == 100
    assert outcome.removed == ({"over_share": 100 - sum(wanted.values())} if sum(wanted.values()) < 100 else {})
    holds(tmp_path / "run")


def test_a_budget_in_tokens_is_kept_by_each_source(tmp_path: Path) -> None:
    sources = [file(tmp_path / "a.jsonl", "a", 80), file(tmp_path / "b.jsonl", "b", 20)]
    mix(sources, tmp_path / "run", MixConfig(budget_tokens=400, shares={"a": 1.0, "b": 1.0}))
    rows = load_rows(Run.open(tmp_path / "run"), columns=["prompt", "num_tokens"])
    spent = dict(rows.group_by(pl.col("prompt").str.head(1)).agg(pl.col("num_tokens").sum()).iter_rows())
    assert all(188 < each <= 200 for each in spent.values())


def test_repeats_are_asked_for_and_stand_in_the_ledger(tmp_path: Path) -> None:
    sources = [file(tmp_path / "a.jsonl", "a", 80), file(tmp_path / "b.jsonl", "b", 20)]
    settings = {"budget": 100, "shares": {"a": 1.0, "b": 1.0}}
    with pytest.raises(UserError) as error:
        mix(sources, tmp_path / "refused", MixConfig(**settings))
    told = "mix: b has 20 rows, its share of 100 is 50; give a budget of 40 or less, another share, or --repeat 3 to take its rows 3 times"
    assert str(error.value) == told
    outcome = mix(sources, tmp_path / "run", MixConfig(**settings, repeat=3))
    assert taken(tmp_path / "run") == {"a": 50, "b": 50}
    texts = load_rows(Run.open(tmp_path / "run"), columns=["prompt"])["prompt"].to_list()
    times = Counter(text for text in texts if text.startswith("b"))
    assert set(times.values()) == {2, 3}, "no row a third time before each was taken twice"
    assert "30 of the rows taken repeat another one, as --repeat 3 allows" in outcome.notes
    ledger = Run.open(tmp_path / "run").ledger.read().filter(pl.col("rule") == "repeat")
    assert len(ledger) == 40
    assert all(name.rpartition("~r")[0] == first for name, first in ledger.select("example_id", "witness_id").iter_rows())
    holds(tmp_path / "run")


def test_one_run_is_mixed_by_the_files_of_its_rows_and_may_be_mixed_anew(tmp_path: Path) -> None:
    mix([file(tmp_path / "a.jsonl", "a", 30), file(tmp_path / "b.jsonl", "b", 10)], tmp_path / "run", MixConfig())
    run = tmp_path / "run"
    with Run.create(tmp_path / "one") as one:
        from sftkit.curate.config import ImportConfig
        from sftkit.curate.intake import take_in

        take_in(run, one, ImportConfig())
    for share, wanted in ((1.0, {"a": 10, "b": 10}), (0.0, {"b": 10})):
        shares = {str(tmp_path / "a.jsonl"): share, str(tmp_path / "b.jsonl"): 1.0}
        mix([str(tmp_path / "one")], None, MixConfig(shares=shares))
        assert taken(tmp_path / "one") == wanted
        holds(tmp_path / "one")


def test_what_runs_keep_is_mixed_and_the_same_row_in_two_sources_keeps_two_ids(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": name, "response": answer, "index": index} for name in "xy" for index, answer in enumerate(("1", "22"))]
    one, two = toy_run(rows, "one"), toy_run(rows, "two")
    filter_rows(one, FilterConfig(min_chars=2))
    for run in (one, two):
        run.close()
    mix([str(one.path), str(two.path)], tmp_path / "run", MixConfig())
    kept = load_rows(Run.open(tmp_path / "run"), columns=["example_id", "sample_index"]).rows()
    assert kept == [("x", 1), ("y", 1), ("x~m2", 0), ("x~m2", 1), ("y~m2", 0), ("y~m2", 1)]
    build(None, tmp_path / "run", BuildConfig(filter=FilterConfig(min_chars=2), decontaminate=None, dedup=None))
    assert len(load_rows(Run.open(tmp_path / "run"))) == 4
    assert Run.open(tmp_path / "run").ledger.stages() == ["import", "mix", "filter"], "a build stands on the mixture"
    holds(tmp_path / "run")


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    path = Path(file(tmp_path / "a.jsonl", "a", 60))
    turned = tmp_path / "turned" / "a.jsonl"
    turned.parent.mkdir()
    turned.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    found = []
    for number, (source, seed) in enumerate([(path, 0), (turned, 0), (path, 1)]):
        mix([str(source)], tmp_path / f"run{number}", MixConfig(budget=20, seed=seed))
        found.append(set(load_rows(Run.open(tmp_path / f"run{number}"), columns=["prompt"])["prompt"]))
    assert found[0] == found[1] != found[2]


def test_quotas_add_up() -> None:
    for budget in range(1, 60):
        found = quotas({"a": 100, "b": 90, "c": 80}, MixConfig(budget=budget, shares={"a": 1.0, "b": 1.0, "c": 1.0}))
        assert sum(found.values()) == budget
        assert max(found.values()) - min(found.values()) <= 1
    assert shares_of({"a": 8, "b": 2}, MixConfig()) == {"a": 0.8, "b": 0.2}
    assert shares_of({"a": 90, "b": 10}, MixConfig(temperature=1e9))["b"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("{a} {b}", "mix: give -o RUN"),
        ("{a} {b} -o {out} --share a=1 --share c=1", "mix: unknown source 'c'"),
        ("{a} {b} -o {out} --share a=1", "mix: no share for b; give each source one, 0 leaves it out"),
        ("{a} {b} -o {out} --share a=x --share b=1", "--share a=x: expected NAME=VALUE with a number"),
        ("{a} {b} -o {out} --share a --share b=1", "--share a: expected NAME=VALUE with a number"),
        ("{a} {b} -o {out} --share 2", "--share 2: expected NAME=VALUE with a number"),
        ("{a} {b} -o {out} --share a=-1 --share b=1", "shares: expected numbers of 0 or more"),
        ("{a} {a} -o {out}", "is given twice; a source is repeated by --repeat"),
        ("{a} {b} -o {out} --budget 10 --budget-tokens 10", "give a budget in rows or in tokens, not both"),
        ("{a} {b} -o {out} --temperature 0", "temperature: expected more than 0"),
        ("{a} {b} -o {out} --budget 0", "budget: expected 1 or more, found 0"),
        ("{a} {c} -o {out} --budget-tokens 10", "have no token count, which budget_tokens needs"),
    ],
)
def test_one_line_for_what_cannot_be_mixed(arguments: str, told: str, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    places = {name: file(tmp_path / f"{name}.jsonl", name, 4) for name in "ab"} | {"c": str(tmp_path / "c.jsonl")}
    code, _, err = cli("curate", "mix", *arguments.format(**places, out=tmp_path / "out").split())
    assert code == 1
    assert told in err
    assert len(err.splitlines()) == 1


def test_what_was_refused_leaves_the_folder_free_and_a_run_of_other_rows_is_none(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    a, b, out = file(tmp_path / "a.jsonl", "a", 4), file(tmp_path / "b.jsonl", "b", 4), str(tmp_path / "out")
    assert cli("curate", "mix", a, str(tmp_path / "missing.jsonl"), "-o", out)[0] == 1
    assert cli("curate", "mix", a, b, "-o", out, "--budget", "100")[0] == 1
    assert cli("curate", "mix", a, b, "-o", out, "--budget", "4")[0] == 0
    assert "mix.sources was" in cli("curate", "mix", a, a, "-o", out, "--budget", "4")[2]
    assert cli("curate", "import", a, "-o", str(tmp_path / "other"))[0] == 0
    assert "holds other rows already" in cli("curate", "mix", a, b, "-o", str(tmp_path / "other"))[2]


def test_other_shares_and_budgets_take_anew_from_the_rows_that_are_there(tmp_path: Path) -> None:
    sources, out = [file(tmp_path / f"{name}.jsonl", name, 9) for name in "ab"], tmp_path / "out"
    kept = [mix(sources, out, MixConfig(budget=budget, shares={"a": 1, "b": b})).kept for budget, b in ((4, 1), (6, 2))]
    assert [len(each) for each in kept] == [4, 6]
    fresh = mix(sources, tmp_path / "fresh", MixConfig(budget=6, shares={"a": 1, "b": 2})).kept
    assert kept[1].equals(fresh)
    with pytest.raises(UserError, match="a has 9 rows, its share of 60 is 20"):
        mix(sources, out, MixConfig(budget=60, shares={"a": 1, "b": 2}))
    assert Run(out).config()["mix"]["budget"] == 6  # what stands there is what was decided
    with pytest.raises(UserError, match=r"mix\.repeat was 1, now 2"):
        mix(sources, out, MixConfig(budget=6, repeat=2))


def test_the_smallest_temperature_takes_the_largest_source() -> None:
    assert shares_of({"a": 10.0, "b": 60.0}, MixConfig(temperature=1e-9)) == {"a": 0.0, "b": 1.0}


def test_a_mixture_is_mixed_again_with_its_repeats_as_rows(tmp_path: Path) -> None:
    a, b = file(tmp_path / "a.jsonl", "a", 10), file(tmp_path / "b.jsonl", "b", 30)
    mix([a, b], tmp_path / "first", MixConfig(shares={"a": 1.0, "b": 1.0}, repeat=2, budget=40))
    assert mix([str(tmp_path / "first"), b], tmp_path / "all", MixConfig()).kept.height == 70
    assert mix([str(tmp_path / "first")], tmp_path / "alone", MixConfig()).kept.height == 40
    mix([str(tmp_path / "first"), b], tmp_path / "more", MixConfig(shares={"first": 4.0, "b": 1.0}, repeat=2, budget=100))
    assert taken(tmp_path / "more") == {"a": 40, "b": 60}
    mix([str(tmp_path / "all"), b], tmp_path / "last", MixConfig())  # a row that was called ID~m2 there, and another that would be here
    for name in ("all", "more", "last"):
        holds(tmp_path / name)


def test_sources_that_have_changed_since_are_told_of_and_those_that_are_gone_are_not_missed(tmp_path: Path) -> None:
    a, b, out = file(tmp_path / "a.jsonl", "a", 8), file(tmp_path / "b.jsonl", "b", 8), tmp_path / "m"
    mix([a, b], out, MixConfig())
    file(tmp_path / "a.jsonl", "changed", 8)
    with pytest.raises(UserError, match="holds the rows of its sources as they were then, and they have others now; give another folder"):
        mix([a, b], out, MixConfig(budget=4))
    Path(a).unlink()
    mix([a, b], out, MixConfig(budget=4))
    assert taken(out) == {"a": 2, "b": 2}


def test_mixtures_of_the_same_rows_are_mixed_with_the_same_ids_each_time(tmp_path: Path) -> None:
    """A row that is called q~m2 in one mixture is q in the other: which of them takes which further mark depends on their order."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"q{n}", "response": "r"}) + "\n" for n in range(300)))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    mix([a, b], tmp_path / "one", MixConfig())
    mix([b, a], tmp_path / "two", MixConfig())
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    mixed = [mix(both, tmp_path / name, MixConfig(budget=60)).kept for name in ("x", "y")]
    assert mixed[0].equals(mixed[1])
    ids = [pl.read_parquet(tmp_path / name / "curate" / "rows.parquet")["example_id"] for name in ("x", "y")]
    assert ids[0].equals(ids[1])
    mix(both, tmp_path / "x", MixConfig(budget=100))
    assert len(load_rows(Run.open(tmp_path / "x"))) == 100


def test_of_a_run_the_rows_that_it_keeps_are_those_that_may_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "many").mkdir()
    sources = [str(tmp_path / "one"), file(tmp_path / "a.jsonl", "a", 8), str(tmp_path / "many")]
    file(tmp_path / "many" / "b.jsonl", "b", 8)
    import_run(sources[1], tmp_path / "one", ImportConfig()).close()
    mix(sources, tmp_path / "m", MixConfig())
    with Run.create(tmp_path / "one") as one:
        score(one, ScoreConfig(scorers={"num_words": None}))
        filter_rows(one, FilterConfig(min_words=1))  # takes none
        with monkeypatch.context() as unread:
            unread.setattr("sftkit.curate.mix.read_examples", lambda *_: pytest.fail("the rows were read again"))
            mix(sources, tmp_path / "m", MixConfig(budget=9))
        assert taken(tmp_path / "m").total() == 9
        filter_rows(one, FilterConfig(min_chars=9))
    with pytest.raises(UserError, match="holds the rows of its sources as they were then"):
        mix(sources, tmp_path / "m", MixConfig(budget=6))
    with Run.create(tmp_path / "m") as mixture:  # begun when no content was told yet
        settings = mixture.config()["mix"]
        mixture.configure("mix", {name: value for name, value in settings.items() if name != "content"}, free=("*",))
    mix(sources, tmp_path / "m", MixConfig(budget=6))
    mix(sources[1:], tmp_path / "files", MixConfig())
    file(tmp_path / "many" / "b.jsonl", "b", 9)
    with pytest.raises(UserError, match="holds the rows of its sources as they were then"):
        mix(sources[1:], tmp_path / "files", MixConfig(budget=6))
