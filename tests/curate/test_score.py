"""Scores: a value or null with the reason, for every row, whatever a scorer does."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core import patterns
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate import score as scoring
from sftkit.curate.best import best
from sftkit.curate.config import ScoreConfig
from sftkit.curate.decide_config import BestConfig, FilterConfig
from sftkit.curate.filters import filter_rows
from sftkit.curate.model_scores import UNTOLD
from sftkit.curate.score import parse_scorers, read_score, score, summary
from sftkit.curate.score_cli import score as command
from sftkit.curate.scored import sort_columns
from sftkit.curate.scorers import count_words


def scored(run: Run, **scorers: dict) -> dict[str, list]:
    return {name: list(frame.select("value", "detail").iter_rows()) for name, frame in score(run, ScoreConfig(scorers=scorers)).items()}


def test_numeric_compares_with_the_reference_and_is_null_without_one(toy_run: Callable[..., Run]) -> None:
    run = toy_run(
        [
            {"prompt": "a", "response": "so #### 1,800.0", "reference": "#### 1800"},
            {"prompt": "b", "response": "the last is 7", "reference": "8"},
            {"prompt": "c", "response": "no number", "reference": "8"},
            {"prompt": "d", "response": "it is 9"},
            {"prompt": "e", "response": None, "reference": "8"},
            {"prompt": "f", "response": "18", "reference": "a word"},
        ]
    )
    assert scored(run, numeric={})["numeric"] == [(1, "1800"), (0, "7"), (0, ""), (None, "9"), (None, "no response"), (None, "18")]
    assert scored(run, numeric={"rule": "strict"})["numeric"][:2] == [(1, "1800"), (0, "")]


def test_without_any_reference_it_is_said_how_to_name_one(toy_run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    run = toy_run([{"prompt": "a", "response": "It is 5", "meta": {"answer": 5}}])
    assert scored(run, numeric={})["numeric"] == [(None, "5")]
    assert "numeric: no row has a reference; gold=COLUMN names the column" in caplog.text
    caplog.clear()
    scored(run, numeric={"gold": "answer"})
    assert "no row has a reference" not in caplog.text


def test_gold_may_stand_in_another_column(toy_run: Callable[..., Run]) -> None:
    run = toy_run(
        [{"prompt": "a", "response": "It is 5", "meta": {"answer": 5}}, {"prompt": "b", "response": "Yes ", "meta": {"answer": "yes"}}]
    )
    assert scored(run, numeric={"gold": "answer"})["numeric"] == [(1, "5"), (None, "")]
    assert scored(run, exact={"gold": "answer"})["exact"] == [(0, ""), (1, "")]
    assert scored(run, exact={"gold": "answer", "ignore_case": False})["exact"] == [(0, ""), (0, "")]
    assert scored(run, exact={})["exact"] == [(None, "no reference")] * 2


def test_lengths_patterns_and_log_probability(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"prompt": "a", "response": "Don't 你好 stop", "num_tokens": 6, "logprob": -0.5}, {"prompt": "b", "response": ""}])
    found = scored(run, **parse_scorers(["length", "logprob", r"regex:pattern=(\w+)$,name=last,ignore_case=true"]))
    assert found["num_chars"] == [(13, ""), (0, "")]
    assert found["num_words"] == [(4, ""), (0, "")]
    assert found["num_tokens"] == [(6, ""), (None, "unknown; give model=")]
    assert found["logprob"] == [(-0.5, ""), (None, UNTOLD)]
    assert found["last"] == [(1, "stop"), (0, "")]


def test_one_poison_row_leaves_the_others_scored(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand rows with a poisoned one Data-Juicer's batched operators keep none."""

    def fragile() -> scoring.Scorer:
        def judge(row: scoring.Candidate) -> scoring.Result:
            if row.response == "poison":
                raise RuntimeError("cannot read this")
            return (float("nan") if row.response == "nan" else 1.0), ""

        return judge

    monkeypatch.setitem(scoring.SCORERS, "fragile", fragile)
    run = toy_run([{"prompt": str(each), "response": {7: "poison", 8: "nan"}.get(each, "fine")} for each in range(1000)])
    found = scored(run, fragile={})["fragile"]
    assert sum(value == 1.0 for value, _ in found) == 998
    assert found[7] == (None, "RuntimeError: cannot read this")
    assert found[8] == (None, "not a finite number: nan")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["numerc"], r"unknown scorer 'numerc': did you mean 'numeric'\?"),
        (["numeric:rul=strict"], r"scorer numeric: unknown option 'rul': did you mean 'rule'\?"),
        (["numeric:rule=lax"], "scorer numeric: rule: unknown value 'lax'"),
        (["num_chars:model=x"], "scorer num_chars has no options"),
        (["regex"], "scorer regex needs pattern: --with 'regex:pattern=…'"),
        (["regex:pattern=("], "is not a regular expression"),
        (["numeric:strict"], "expected NAME:option=value"),
        (["numeric", "numeric:rule=strict"], "two scores would be called 'numeric'"),
        (["numeric:name=../x"], "a score is named by letters"),
        (["numeric:name=-x"], "a score is named by letters"),
        (["numeric:name=as-number"], "a score is named by letters, digits and '_', and begins with a letter, as grape_135m"),
        (["numeric:name=2nd"], "a score is named by letters"),
        (["numeric:name=random"], "a score of numeric cannot be called 'random', which means something else"),
        (["numeric:name=num_tokens"], "a score of numeric cannot be called 'num_tokens'"),
        (["numeric:rule=strict,rule=flexible"], "rule is given twice"),
        (["numeric:scorer=exact"], "scorer stands before the colon"),
        (["exact:ignore_case=nope"], "scorer exact: ignore_case: expected true or false, found 'nope'"),
        (["unit_test:seconds=inf"], "scorer unit_test: seconds: expected a number, found 'inf'"),
        (["unit_test:seconds=-4"], "scorer unit_test: seconds: expected a number above 0, found -4"),
        (["language:wanted=zh-TW"], "scorer language: wanted: unknown language 'zh-TW': did you mean 'zh"),
        (["numeric:gold=anwser"], r"score numeric: gold: unknown column 'anwser': did you mean 'answer'\? known are answer, topic"),
        (["unit_test:tests=checks"], "score unit_test: tests: unknown column 'checks'"),
        (["cluster:clusters=0"], "expected clusters above 0"),
        (["cluster:seed=x"], "scorer cluster: seed: expected a whole number, found 'x'"),
        (["neighbour:max_seq_length=0"], "max_seq_length: expected a whole number above 0, found 0"),
        ([], "give a scorer, as --with numeric; there are numeric, exact"),
    ],
)
def test_bad_scorers_are_one_clear_line(toy_run: Callable[..., Run], texts: list[str], message: str) -> None:
    run = toy_run([{"prompt": "a", "response": "b", "meta": {"topic": 1}}, {"prompt": "c", "response": "d", "meta": {"answer": "b"}}])
    with pytest.raises(UserError, match=message) as caught:
        score(run, ScoreConfig(scorers=parse_scorers(texts)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("scorers: numeric", "scorers: expected a mapping, found 'numeric'"),
        ("scorers: [numeric]", "scorers: expected a mapping, found ['numeric']"),
        ("scorers: {numeric: 3}", "scorers.numeric: expected a mapping, found 3"),
        ("scorers: {length: {}}", "length is several scores: name each, num_chars, num_words, num_tokens"),
    ],
)
def test_settings_of_another_type_are_one_clear_line(
    settings: str, message: str, tmp_path: Path, toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]]
) -> None:
    run = toy_run([{"prompt": "a", "response": "b"}])
    run.close()
    (tmp_path / "score.yaml").write_text(settings)
    code, _, err = cli("curate", "score", run.path, "--config", tmp_path / "score.yaml")
    assert code == 1
    assert message in err


ENDLESS = r"(x+x+)+y"  # which tries all ways to part a run of x


def test_a_pattern_that_would_backtrack_for_years_ends(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    run = toy_run([{"response": "x" * 4000}, {"response": "xxy"}])
    found = score(run, ScoreConfig(scorers={"regex": {"pattern": ENDLESS}}))["regex"]
    assert found["value"].to_list() == [None, 1.0]
    assert "took longer than 0.2 s to search for in a text of 4,000 characters" in found["detail"][0]


def test_commas_in_a_pattern_stay_in_it() -> None:
    assert parse_scorers(["regex:pattern=a{1,2},b,name=x"]) == {"x": {"scorer": "regex", "pattern": "a{1,2},b"}}


def test_options_are_read_as_the_scorer_takes_them() -> None:
    """`unsafe=no` was a text, and so true: a program would have run without its sandbox."""
    taken: dict[str, object] = {}

    def fake(*, pattern: str, unsafe: bool = False, seconds: float = 1.0, clusters: int | None = None) -> scoring.Scorer:
        taken.update(pattern=pattern, unsafe=unsafe, seconds=seconds, clusters=clusters)
        return lambda row: (0.0, "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scoring.SCORERS, "fake", fake)
        for written in ("no", "False"):
            (options,) = parse_scorers([f"fake:pattern=true,unsafe={written},seconds=2,clusters=7"]).values()
            scoring.open_scorer("fake", options)
            assert taken == {"pattern": "true", "unsafe": False, "seconds": 2.0, "clusters": 7}
        scoring.open_scorer("fake", {"pattern": "x", "unsafe": True, "clusters": None})
        assert taken == {"pattern": "x", "unsafe": True, "seconds": 1.0, "clusters": None}


def test_every_score_of_a_group_has_a_name_of_its_own() -> None:
    assert list(parse_scorers(["length:name=l"])) == ["l_num_chars", "l_num_words", "l_num_tokens"]
    assert list(parse_scorers(["repetition:name=r"])) == ["r", "r_top_ngram"]


def test_an_unknown_score_lists_those_there_are(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"prompt": "a", "response": "b"}])
    score(run, ScoreConfig(scorers={"exact": {}}))
    with pytest.raises(
        UserError, match=r"no score 'numeric': there are exact, logprob, num_chars, num_tokens, num_words; .*--with numeric"
    ):
        read_score(run, scoring.load_rows(run), "numeric")


def test_rows_newer_than_a_score_count_as_unscored(toy_run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    run = toy_run([{"prompt": "a", "response": "1", "reference": "1"}])
    score(run, ScoreConfig(scorers={"numeric": {}}))
    grown = toy_run([{"prompt": "a", "response": "1", "reference": "1"}, {"prompt": "b", "response": "1", "reference": "1"}], name="grown")
    (run.path / "curate" / "scores").rename(grown.path / "curate" / "scores")
    assert read_score(grown, scoring.load_rows(grown), "numeric")["value"].to_list() == [1, None]
    assert "1 of 2 rows are newer than the score numeric" in caplog.text


def test_a_sample_that_was_asked_again_after_it_was_scored_counts_as_unscored(toy_run: Callable[..., Run]) -> None:
    """distill --retry-truncated puts the whole answer in the place of the cut one: what was said of the cut one is not said of it."""
    cut = {"id": "q", "index": 0, "prompt": "a", "response": "so #### 1", "reference": "1", "finish_reason": "length", "num_tokens": 4}
    other = {**cut, "index": 1, "response": "#### 2", "finish_reason": "stop"}
    whole = {**cut, "response": "so #### 1, no, #### 2", "finish_reason": "stop", "num_tokens": 9}
    run, later = toy_run([cut, other]), toy_run([whole, other], name="later")
    score(run, ScoreConfig(scorers={"numeric": {}}))
    (run.path / "curate" / "scores").rename(later.path / "curate" / "scores")
    assert read_score(later, scoring.load_rows(later), "numeric")["value"].to_list() == [None, 0]
    outcome = best(later, BestConfig(by=("numeric",), gate=("numeric>=0",)))
    assert outcome.kept["sample_index"].to_list() == [1]
    assert outcome.removed == {"unscored": 1}
    assert filter_rows(later, FilterConfig(where=("numeric.detail == '1'",))).kept.is_empty()


def test_random_depends_on_seed_and_row_alone(toy_run: Callable[..., Run]) -> None:
    rows = [{"prompt": "p", "response": str(index), "index": index} for index in range(50)]
    run, turned = toy_run(rows), toy_run(rows[::-1], name="turned")
    one, two = (sort_columns(each, scoring.load_rows(each), ["random"], 1)["0"].to_list() for each in (run, turned))
    assert one == two[::-1]
    assert one != sort_columns(run, scoring.load_rows(run), ["random"], 2)["0"].to_list()
    assert all(0 <= value < 1 for value in one if value is not None)


def test_summary_tells_each_sample_and_any(toy_run: Callable[..., Run]) -> None:
    answers = {"p": ["1", "2"], "q": ["2", "2"]}
    rows = [{"prompt": p, "response": a, "index": i, "reference": "1"} for p, each in answers.items() for i, a in enumerate(each)]
    frame = score(toy_run(rows), ScoreConfig(scorers={"numeric": {}}))["numeric"]
    assert summary("numeric", frame).splitlines() == [
        "numeric: 4 of 4 rows have a value, mean 25.0%",
        "  by sample: 0: 50.0%, 1: 0.0%",
        "  any of a prompt's samples: 50.0%",
    ]


@pytest.mark.parametrize("name", [*scoring.SCORERS, *scoring.GROUPS])
def test_the_help_has_a_phrase_for_every_scorer(name: str) -> None:
    assert re.search(rf"\b{name}\b", command.help or "")


def test_words() -> None:
    assert count_words("It's a state-of-the-art 3.5 model") == 6
    assert count_words("我喜欢 Python 编程") == 6
    assert count_words("") == 0
