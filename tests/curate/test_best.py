"""Best of k: who is kept, who loses, and by which rule."""

import random
import statistics
from collections.abc import Callable

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.core.example import Decision
from sftkit.core.run import Run
from sftkit.curate.best import best
from sftkit.curate.certificate import check_run
from sftkit.curate.config import ScoreConfig
from sftkit.curate.decide_config import BestConfig, parse_gate
from sftkit.curate.decided import record
from sftkit.curate.rows import load_rows, row_ids
from sftkit.curate.score import read_score, score


def samples(prompt: str, *answers: str, **more: list) -> list[dict]:
    return [
        {"id": prompt, "prompt": prompt, "response": answer, "index": index, **{key: values[index] for key, values in more.items()}}
        for index, answer in enumerate(answers)
    ]


def kept(run: Run) -> list[str]:
    return row_ids(load_rows(run))


def numeric(run: Run) -> Run:
    score(run, ScoreConfig(scorers={"numeric": {}}))
    return run


def test_highest_first_then_the_next_score_then_shorter_then_lower_index(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        *samples("a", "1", "1 more", "2", reference=["1"] * 3, logprob=[-2.0, -1.0, -0.1]),  # right, and of these the likelier
        *samples("b", "long 1", "1", reference=["1"] * 2, logprob=[-1.0, -1.0]),  # equal: the shorter
        *samples("c", "x 1", "y 1", reference=["1"] * 2, logprob=[-1.0, -1.0]),  # all equal: the lower index
        *samples("d", "1", "1 1", reference=["1"] * 2, logprob=[None, -9.0]),  # no value ranks last
    ]
    run = numeric(toy_run(rows))
    best(run, BestConfig(by=("numeric", "logprob")))
    assert kept(run) == ["a/1", "b/1", "c/0", "d/1"]
    assert rejections(run, "best")["a/2"] == ("not_best", 0.0, 1.0, "a/1")
    assert rejections(run, "best")["a/0"] == ("not_best", 1.0, 1.0, "a/1")


def test_lowest_first_keeps_the_sign_in_the_ledger(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = toy_run(samples("a", "abc", "ab", "abcd"))
    best(run, BestConfig(by=("-num_chars",)))
    assert kept(run) == ["a/1"]
    assert rejections(run, "best") == {"a/0": ("not_best", 3, 2, "a/1"), "a/2": ("not_best", 4, 2, "a/1")}


def test_truncated_gate_and_unscored_are_named_and_reported(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        *samples("a", "1", "1", "2", reference=["1"] * 3, finish_reason=["length", "stop", "stop"], num_tokens=[9, 4, 5]),
        *samples("b", "7", reference=["8"]),
        *samples("c", "7", reference=[None]),
    ]
    run = numeric(toy_run(rows))
    outcome = best(run, BestConfig(by=("logprob",), gate=("numeric",)))
    assert kept(run) == ["a/1"]
    assert rejections(run, "best") == {
        "a/0": ("truncated", 9, None, None),
        "a/2": ("gate:numeric", 0, 1, None),
        "b/0": ("gate:numeric", 0, 1, None),
        "c/0": ("unscored", None, 1, None),
    }
    assert outcome.notes == ("2 of 3 prompts keep no sample",)


def test_the_duplicated_best_row_is_kept_once(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = toy_run(samples("a", "same", "same", "other text"))
    best(run, BestConfig(by=("-num_chars",)))
    assert kept(run) == ["a/0"]
    assert rejections(run, "best")["a/1"] == ("not_best", 4, 4, "a/0")


def test_rows_without_the_score_come_last_and_are_said(
    toy_run: Callable[..., Run], rejections: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        *samples("a", "1", "longer", logprob=[None, -2.0]),  # the shorter has none
        *samples("b", "1", "longer", logprob=[None, None]),  # none has one: the shorter
        *samples("c", "1", logprob=[None], finish_reason=["length"]),  # not eligible, and not counted
    ]
    run = toy_run(rows)
    outcome = best(run, BestConfig(by=("logprob",)))
    assert kept(run) == ["a/1", "b/0"]
    assert rejections(run, "best")["a/0"] == ("unscored:logprob", None, -2.0, "a/1")
    assert rejections(run, "best")["b/1"] == ("not_best", None, None, "b/0")
    (note,) = [each for each in outcome.notes if "logprob" in each]
    assert note.startswith("3 of 4 eligible rows have no score 'logprob' and come last by it: the teacher told none")
    assert all(not check.faults for check in check_run(run))
    assert best(run, BestConfig(by=("num_chars",))).notes == ("1 of 3 prompts keep no sample",)

    stored = toy_run(samples("a", "1", "2", "no", reference=["1", None, "1"]), "stored")
    numeric(stored)
    (note,) = best(stored, BestConfig(by=("numeric",))).notes
    assert note.startswith("1 of 3 eligible rows have no score 'numeric' and come last by it: ")


def test_keep_m(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = toy_run([*samples("a", "1", "22", "333", "4444"), *samples("b", "1")])
    best(run, BestConfig(by=("num_chars",), keep=3))
    assert kept(run) == ["a/1", "a/2", "a/3", "b/0"]
    assert rejections(run, "best") == {"a/0": ("not_best", 1, 4, "a/3")}


def test_majority(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        *samples("a", "#### 5", "#### 7.0", "it is 7", "none"),
        *samples("b", "longer 3", "4"),  # one vote each: the shorter row is better
        *samples("c", "no", "nor"),
    ]
    run = numeric(toy_run(rows))
    outcome = best(run, BestConfig(majority=True))
    assert kept(run) == ["a/2", "b/1"]
    found = rejections(run, "best")
    assert found["a/0"] == ("not_majority", pytest.approx(1 / 3), pytest.approx(2 / 3), "a/2")
    assert found["a/1"] == ("not_best", None, None, "a/2")
    assert found["a/3"][0] == found["c/0"][0] == "no_answer"
    assert found["b/0"] == ("not_majority", 0.5, 0.5, "b/1")
    assert outcome.notes == ("1 of 3 prompts keep no sample",)


def test_majority_needs_its_share_and_cut_answers_do_not_vote(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        *samples("a", "1", "2", "3"),
        *samples("b", "1", "2", "2", finish_reason=["stop", "length", "length"]),
    ]
    run = numeric(toy_run(rows))
    best(run, BestConfig(majority=True, min_share=0.5))
    assert kept(run) == ["b/0"]
    assert rejections(run, "best")["a/0"] == ("low_agreement", pytest.approx(1 / 3), 0.5, None)


def test_random_is_a_control_that_only_the_seed_moves(toy_run: Callable[..., Run]) -> None:
    rows = [row for name in "abcdefghijklmnop" for row in samples(name, *"1234")]
    run = toy_run(rows)
    chosen = []
    for seed in (0, 0, 1):
        best(run, BestConfig(by=("random",), seed=seed))
        chosen.append(kept(run))
    assert chosen[0] == chosen[1] != chosen[2]
    assert {name.split("/")[1] for name in chosen[0]} == set("0123")
    best(run, BestConfig(by=("-random",)))
    assert not set(kept(run)) & set(chosen[0])  # the other end of the same draw
    with pytest.raises(UserError, match="random is an order to choose by"):
        best(run, BestConfig(gate=("random",), keep_all=True))


def test_rows_that_are_no_samples_stand_alone(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b"}])
    outcome = best(run, BestConfig(by=("num_chars",)))
    assert len(outcome.kept) == 2
    assert outcome.notes == ("these rows are not samples of one prompt each: every row stood alone",)


def test_gates() -> None:
    assert [parse_gate(text).passes(0.5) for text in ("x", "x>=0.5", "x<=0.5", "x>0.5", "x < 1e0")] == [False, True, True, False, True]
    with pytest.raises(UserError, match=r"gate 'x=1': expected NAME, NAME>=x"):
        parse_gate("x=1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say how to choose: --by SCORE"),
        ({"by": ("num_chars",), "keep": 0}, "keep: expected 1 or more, found 0"),
        ({"majority": True, "min_share": 2.0}, "min_share: expected a share"),
        ({"by": ("num_chars",), "gate": ("a b",)}, "gate 'a b'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BestConfig(**settings)


def test_missing_score(toy_run: Callable[..., Run]) -> None:
    run = toy_run(samples("a", "1"))
    with pytest.raises(UserError, match="unknown score 'helpful': known are logprob"):
        best(run, BestConfig(by=("helpful",)))
    with pytest.raises(UserError, match=r"no score 'numeric'.*`sftkit curate score .* --with numeric` adds it"):
        best(run, BestConfig(majority=True))


def graded(toy_run: Callable[..., Run]) -> Run:
    """Make a run of three prompts of which 1, 2 and 4 of four samples are right."""
    rows = [
        *samples("a", "7", "1", "2", "3"),
        *samples("b", "7", "it is 7", "2", "3"),
        *samples("c", "7", "so 7", "and 7", "in all 7"),
    ]
    return numeric(toy_run([{**row, "reference": "7"} for row in rows]))


def test_all_that_pass_the_gate_are_kept(toy_run: Callable[..., Run]) -> None:
    run = graded(toy_run)
    best(run, BestConfig(gate=("numeric",), keep_all=True))
    assert kept(run) == ["a/0", "b/0", "b/1", "c/0", "c/1", "c/2", "c/3"]


def test_prompts_outside_the_band_of_pass_rates_are_left_out(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = graded(toy_run)
    best(run, BestConfig(gate=("numeric",), by=("num_chars",), min_pass_rate=0.3, max_pass_rate=0.9))
    assert kept(run) == ["b/1"]
    found = rejections(run, "best")
    assert found["a/0"] == ("min_pass_rate", 0.25, 0.3, None)
    assert found["a/1"][0] == "gate:numeric", "what did not pass keeps its own reason"
    assert {found[f"c/{index}"] for index in range(4)} == {("max_pass_rate", 1.0, 0.9, None)}


def test_answers_that_were_cut_count_among_those_of_a_prompt(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = graded(toy_run)
    names = [(name, index) for name in "abc" for index in range(4)]
    cut = [("c", 2), ("c", 3)]
    actions = [("rejected", "truncated") if name in cut else ("kept", "") for name in names]
    record(run, "distill", names, [Decision(*name, "distill", *each) for name, each in zip(names, actions, strict=True)])
    best(run, BestConfig(gate=("numeric",), keep_all=True, max_pass_rate=0.6))
    assert kept(run) == ["a/0", "b/0", "b/1", "c/0", "c/1"], "2 of 4 of c are right, not 2 of 2"
    best(run, BestConfig(gate=("numeric",), keep_all=True, min_pass_rate=0.3, max_pass_rate=0.4))
    assert rejections(run, "best")["c/0"] == ("max_pass_rate", 0.5, 0.4, None)


def test_the_best_must_be_above_the_median_by_the_margin(toy_run: Callable[..., Run], rejections: Callable) -> None:
    run = toy_run([*samples("a", "1", "22", "7777777"), *samples("b", "1", "22", "333"), *samples("c", "1")])
    best(run, BestConfig(by=("num_chars",), min_margin=3))
    assert kept(run) == ["a/2"]
    found = rejections(run, "best")
    assert found["b/2"] == ("low_margin", 1, 3, None)
    assert found["c/0"] == ("low_margin", 0, 3, None), "of one sample nothing says that it is good"


def test_controls_have_as_many_samples_of_each_prompt(toy_run: Callable[..., Run]) -> None:
    run = graded(toy_run)
    outcome = best(run, BestConfig(gate=("numeric",), keep_all=True, controls=True))
    lines = (run.path / "curate" / "controls" / "best_random.jsonl").read_text().splitlines()
    prompts = [line.split('"')[3].split("/")[0] for line in lines]
    assert [prompts.count(name) for name in "abc"] == [1, 2, 4]
    assert [note.split(":")[0] for note in outcome.notes] == ["control best_random", "control best_length_matched"]
    best(run, BestConfig(by=("num_chars",)))
    assert not (run.path / "curate" / "controls" / "best_random.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_all": True, "min_pass_rate": 0.2}, "min_pass_rate: say what passes, as --gate numeric"),
        ({"by": ("x",), "gate": ("y",), "max_pass_rate": 60}, "max_pass_rate: expected a share between 0 and 1, found 60"),
        ({"majority": True, "min_margin": 1.0}, "min_margin: say by which score"),
    ],
)
def test_settings_that_say_nothing(settings: dict, told: str) -> None:
    with pytest.raises(UserError) as error:
        BestConfig(**settings)
    assert told in str(error.value)


def by_the_rules(
    rows: list[dict], config: BestConfig, scores: dict[str, list[float | None]], answers: list[str | None]
) -> dict[str, tuple]:
    """Decide row by row as the docstring of `best` says: (rule, score, threshold, witness) by row id, rule "" for those kept."""
    found: dict[str, tuple] = {}
    names = [f"{row['id']}/{row['index']}" for row in rows]
    sign = [-1 if name.startswith("-") else 1 for name in config.by]
    columns = [scores[name.removeprefix("-")] for name in config.by]

    def order(row: int) -> tuple:
        values = [(column[row] is None, -turn * (column[row] or 0)) for column, turn in zip(columns, sign, strict=True)]
        return (*values, len(rows[row]["response"] or ""), rows[row]["index"], row)

    for prompt in dict.fromkeys(row["id"] for row in rows):
        members = [place for place, row in enumerate(rows) if row["id"] == prompt]
        eligible = []
        for row in members:
            gate = scores["numeric"][row]
            if rows[row]["finish_reason"] == "length":
                found[names[row]] = ("truncated", None, None, None)
            elif rows[row]["response"] is None:
                found[names[row]] = ("no_response", None, None, None)
            elif config.gate and gate is None:
                found[names[row]] = ("unscored", None, 1, None)
            elif config.gate and gate is not None and gate < 1:
                found[names[row]] = ("gate:numeric", gate, 1, None)
            else:
                eligible.append(row)
        rate = len(eligible) / len(members)
        for rule, bound, outside in (("min_pass_rate", config.min_pass_rate, -1), ("max_pass_rate", config.max_pass_rate, 1)):
            if bound is not None and (rate - bound) * outside > 0:
                found |= {names[row]: (rule, rate, bound, None) for row in eligible}
                eligible = []
        eligible.sort(key=order)
        if config.majority:
            found |= {names[row]: ("no_answer", None, None, None) for row in eligible if not answers[row]}
            voters = [row for row in eligible if answers[row]]
            counts = {answer: sum(answers[row] == answer for row in voters) for answer in dict.fromkeys(answers[row] for row in voters)}
            winner = max(counts, key=lambda answer: counts[answer], default=None)
            eligible = [row for row in voters if answers[row] == winner]
            for row in voters:
                share, most = counts[answers[row]] / len(voters), counts[winner] / len(voters)
                if most < config.min_share:
                    found[names[row]] = ("low_agreement", most, config.min_share, None)
                    eligible = []
                elif answers[row] != winner:
                    found[names[row]] = ("not_majority", share, most, names[eligible[0]])
        better = sorted(columns[0][row] * sign[0] for row in eligible if columns[0][row] is not None) if columns else []
        if config.min_margin is not None and eligible:
            margin = better[-1] - statistics.median(better) if better else None
            if (margin or 0) < config.min_margin:
                found |= {names[row]: ("low_margin", margin, config.min_margin, None) for row in eligible}
                eligible = []
        for rank, row in enumerate(eligible):
            first = eligible[0]
            own, best_own = (columns[0][row], columns[0][first]) if columns else (None, None)
            kept_too = config.keep_all or rank < config.keep
            rule = "not_best" if own is not None or best_own is None else f"unscored:{config.by[0].removeprefix('-')}"
            found[names[row]] = ("", None, None, None) if kept_too else (rule, own, best_own, names[first])
    return found


@pytest.mark.parametrize("seed", range(12))
def test_it_decides_as_the_rules_say_row_by_row(seed: int, toy_run: Callable[..., Run]) -> None:
    rng = random.Random(seed)
    rows = [
        {
            "id": f"p{prompt}",
            "index": index,
            "prompt": "q",
            "response": rng.choice([None, "no", *(f"{'so ' * rng.randrange(3)}it is {number}" for number in (7, 8, 7, 9))]),
            "reference": rng.choice(["7", "7", None]),
            "logprob": rng.choice([None, -1.0, -2.0, -0.5]),
            "num_tokens": rng.randrange(5),
            "finish_reason": rng.choice(["stop", "stop", "stop", "length", None]),
        }
        for prompt in range(40)
        for index in range(rng.randrange(1, 7))
    ]
    rng.shuffle(rows)
    run = numeric(toy_run(rows))
    loaded = load_rows(run, all=True)
    table = read_score(run, loaded, "numeric")
    scores = {
        "numeric": table["value"].to_list(),
        "logprob": loaded["logprob"].to_list(),
        "num_tokens": [float(n) for n in loaded["num_tokens"]],
    }
    for config in (
        BestConfig(by=("logprob", "-num_tokens"), keep=rng.randrange(1, 4)),
        BestConfig(by=("-num_tokens",), gate=("numeric",), min_pass_rate=0.3, max_pass_rate=0.8),
        BestConfig(majority=True, by=("logprob",), min_share=rng.choice([0.0, 0.5])),
        BestConfig(majority=True, keep=2),
        BestConfig(gate=("numeric",), keep_all=True),
        BestConfig(by=("logprob",), min_margin=0.5),
    ):
        best(run, config)
        ledger = run.ledger.read().filter(pl.col("stage") == "best")
        decided = {
            f"{row[0]}/{row[1]}": row[2:]
            for row in ledger.select("example_id", "sample_index", "rule", "score", "threshold", "witness_id").rows()
        }
        wanted = by_the_rules(rows, config, scores, table["detail"].to_list())
        assert decided.keys() == wanted.keys()
        for name, each in wanted.items():
            told = decided[name] if each[0] != "truncated" else ("truncated", None, None, None)
            assert told == pytest.approx(each), (name, config)
