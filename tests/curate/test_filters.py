"""Filters: which rule removes which row, conditions over columns, missing values, and that no shortcut changes what a rule says."""

import random
from collections.abc import Callable

import polars as pl
import pytest
from sftkit.core import patterns
from sftkit.core.errors import UserError
from sftkit.core.ngrams import WORD
from sftkit.core.run import Run
from sftkit.curate.build import build
from sftkit.curate.config import BuildConfig, ScoreConfig
from sftkit.curate.decide_config import FilterConfig
from sftkit.curate.filters import filter_rows, text_rules
from sftkit.curate.repeats import duplicate_ngrams, top_ngram
from sftkit.curate.rows import load_rows, row_ids
from sftkit.curate.score import score
from sftkit.curate.scorers import count_words

LONG = "The tide comes in twice a day because the moon pulls at the sea, and the earth turns below that bulge of water. "
TEXTS = [
    *("", " \x1c\n", "\u2028\u3000", "word", "İstanbul'da DON’T", "हिन्दी में उत्तर", "你好，世界" * 30, "مرحبا بالعالم"),
    *("the cat sat " * 40, "one two three four five six seven eight nine ten " * 6, "ΑΣ ας Σ " * 30, LONG * 2, LONG),
    *(
        "I cannot help with that.",
        "Sorry, but I can’t do that.",
        "As an AI, I am unable to answer",
        "抱歉，我无法回答。",
        "İ CANNOT answer",
    ),
    *("I WON'T comply", "ı don't provide that", "no\u0301 na\u0308ive 1\u00bd x² e-mail it's", "a\u200db \u0900 \ufe0f 😀 ok"),
]


def toy(rng: random.Random) -> str:
    """Return a text made of pieces that the rules look at, repeated or not."""
    pieces = [*LONG.split(), "I", "cannot", "help", "你", "好", "ß", "İ", "e\u0301", "don’t", "\n", ".", "über", "ﬁ", "ไทย"]
    part = [rng.choice(pieces) for _ in range(rng.randrange(1, 40))]
    return (" " if rng.random() < 0.8 else "").join(part * rng.randrange(1, 4) + rng.choices(pieces, k=rng.randrange(0, 40)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"min_words": 12, "max_words": 60, "min_chars": 20, "max_chars": 400}, {"max_duplicate_ngrams": 0.1, "max_top_ngram": 0.2}],
)
def test_no_shortcut_leaves_out_a_text_that_its_rule_finds_at_fault(settings: dict) -> None:
    rng = random.Random(0)
    texts = [*TEXTS, *(toy(rng) for _ in range(400))]
    table = pl.DataFrame({"text": texts})
    found = 0
    for rule in text_rules(FilterConfig(**settings)):
        suspects = [True] * len(texts) if rule.suspect is None else table.select(rule.suspect).to_series().to_list()
        for text, suspect in zip(texts, suspects, strict=True):
            if rule.judge(text):
                found += 1
                assert suspect, (rule.judge(text), text)
    assert found > 10


def test_most_texts_are_not_asked_whether_they_refuse() -> None:
    table = pl.DataFrame(
        {"text": [LONG, "Kind words kept the king awake.", "I cannot help with that.", "\u212aan’t is none, but i will not help"]}
    )
    rule = text_rules(FilterConfig(empty=False, repetition=False))[0]
    assert rule.suspect is not None
    assert table.select(rule.suspect).to_series().to_list() == [False, False, True, True]


@pytest.mark.parametrize("limits", [(0.5, 0.5), (0.1, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_repetition_is_what_its_shares_say(limits: tuple[float, float]) -> None:
    rng = random.Random(1)
    rule = text_rules(FilterConfig(empty=False, refusal=False, max_duplicate_ngrams=limits[0], max_top_ngram=limits[1]))[0]
    for text in [*TEXTS, *(toy(rng) for _ in range(400))]:
        words = WORD.findall(text.lower())
        duplicate, top = duplicate_ngrams(words, 10), max(top_ngram(words, n) for n in (2, 3, 4))
        wanted = ("repetition:top_ngram", top, limits[1]) if len(words) >= 50 and top > limits[1] else None
        wanted = ("repetition:duplicate_ngrams", duplicate, limits[0]) if duplicate > limits[0] else wanted
        assert rule.judge(text) == wanted, text


def test_words_are_counted_as_scores_count_them(toy_run: Callable[..., Run]) -> None:
    rows = [{"prompt": f"{place}", "response": text} for place, text in enumerate(TEXTS)]
    for most in (1, 3, 12):
        run = toy_run(rows, f"run{most}")
        filter_rows(run, FilterConfig(empty=False, refusal=False, repetition=False, max_words=most))
        kept = {text for text in TEXTS if count_words(text) <= most}
        assert load_rows(run)["response"].to_list() == [text for text in TEXTS if text in kept]


def test_each_rule_names_what_it_removed_and_the_first_counts(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        {"id": "fine", "response": LONG},
        {"id": "cut", "response": "I cannot help with that.", "finish_reason": "length"},
        {"id": "empty", "response": " \n"},
        {"id": "short", "response": "ab"},
        {"id": "refuses", "response": "I'm sorry, but I can't assist with that."},
        {"id": "repeats", "response": "one two three four five six seven eight nine ten " * 6},
        {
            "id": "other",
            "response": "El perro y el gato que viven en la casa son los mejores amigos de una niña y de su hermano mayor para siempre.",
        },
        {"id": "banned", "response": LONG + "BANNED"},
        {"id": "no answer", "prompt": "xy"},
    ]
    run = toy_run(rows)
    outcome = filter_rows(run, FilterConfig(min_chars=5, languages=("en",), exclude=("BANNED",)))
    assert row_ids(load_rows(run)) == ["fine"]
    assert {name: found[0] for name, found in rejections(run, "filter").items()} == {
        "cut": "truncated",
        "empty": "empty",
        "short": "min_chars",
        "refuses": "refusal",
        "repeats": "repetition:duplicate_ngrams",
        "other": "language",
        "banned": "exclude",
        "no answer": "min_chars",
    }
    assert rejections(run, "filter")["short"] == ("min_chars", 2, 5, None)
    assert outcome.removed["min_chars"] == 2
    assert next(iter(outcome.removed)) == "min_chars", "most first"


def test_conditions_over_scores_columns_and_meta(toy_run: Callable[..., Run], rejections: Callable) -> None:
    rows = [
        {"id": "a", "response": "7", "reference": "7", "num_tokens": 5, "meta": {"level": 3}},
        {"id": "b", "response": "8", "reference": "7", "num_tokens": 5, "meta": {"level": 3}},
        {"id": "c", "response": "7", "reference": "7", "num_tokens": 900, "meta": {"level": 3}},
        {"id": "d", "response": "7", "reference": "7", "num_tokens": 5, "meta": {"level": 9}},
        {"id": "e", "response": "7", "num_tokens": 5, "meta": {"level": 3}},
    ]
    run = toy_run(rows)
    score(run, ScoreConfig(scorers={"numeric": {}}))
    settings = {"presets": ("correct",), "where": ("num_tokens < 800", "easy: meta.level <= 3 or len(response) > 5")}
    outcome = filter_rows(run, FilterConfig(**settings))
    assert row_ids(load_rows(run)) == ["a"]
    assert rejections(run, "filter") == {
        "b": ("correct", 0, 1, None),
        "c": ("num_tokens < 800", 900, 800, None),
        "d": ("easy", None, None, None),
        "e": ("unscored:correct", None, None, None),
    }
    assert outcome.notes == ("of 1 rows 'correct' says nothing, as a value is missing: rejected as unscored; --keep-unscored keeps them",)
    kept = filter_rows(run, FilterConfig(**settings, keep_unscored=True))
    assert row_ids(load_rows(run)) == ["a", "e"]
    assert kept.notes == ("of 1 rows 'correct' says nothing, as a value is missing: kept (keep_unscored)",)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"where": ("numeri > 1",)}, "unknown column 'numeri': did you mean 'numeric'?"),
        ({"where": ("meta.levle > 1",)}, "unknown column 'meta.levle': did you mean 'meta.level'?"),
        ({"presets": ("corect",)}, "unknown preset 'corect': did you mean 'correct'?"),
        ({"presets": ("alpagasus",)}, "the rows have no score 'judge' yet; `sftkit curate score RUN --with judge` adds it"),
        ({"min_score": {"nothing": 1.0}}, "unknown score 'nothing'"),
        ({"min_score": {"": 1.0}}, "unknown score ''"),
        ({"min_score": {"rando": 0.5}}, "unknown score 'rando': known are logprob, num_chars, num_tokens, num_words, numeric"),
        ({"min_score": {"random": 0.5}}, "random is an order to choose by, as --by random, and no score"),
        ({"exclude": ("(",)}, "is not a regular expression"),
        ({"languages": ("eng",)}, "unknown language 'eng'"),
    ],
)
def test_what_cannot_be_asked(settings: dict, told: str, toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"response": "7", "reference": "7", "meta": {"level": 1}}])
    score(run, ScoreConfig(scorers={"numeric": {}}))
    before = run.ledger.stages()
    with pytest.raises(UserError) as error:
        filter_rows(run, FilterConfig(**settings))
    assert told in str(error.value)
    assert run.ledger.stages() == before


def test_conditions_over_what_a_scorer_said(toy_run: Callable[..., Run], rejections: Callable) -> None:
    texts = ["這是一個測試，請問您會說國語嗎？", "这是一个测试，请问您会说国语吗？", "This is a plain English sentence about the sea.", "7"]
    run = toy_run([{"prompt": str(number), "response": text} for number, text in enumerate(texts)])
    names = row_ids(load_rows(run))
    score(run, ScoreConfig(scorers={"language": {}, "found": {"scorer": "regex", "pattern": "[a-z]+"}}))
    filter_rows(run, FilterConfig(where=("script: language.detail == 'zh-Hant'",)))
    assert {name: found[0] for name, found in rejections(run, "filter").items()} == dict.fromkeys(names[1:], "script")
    filter_rows(run, FilterConfig(where=("'zh' in language.detail or found.detail == 'his'",)))
    assert set(rejections(run, "filter")) == {names[3]}
    with pytest.raises(UserError, match=r"unknown column 'langage\.detail': did you mean 'language\.detail'\?"):
        filter_rows(run, FilterConfig(where=("langage.detail == 'en'",)))


def test_a_column_of_nulls_rejects_every_row_and_says_so(toy_run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    run = toy_run([{"prompt": str(place), "response": LONG} for place in range(3)])
    with caplog.at_level("WARNING"):
        outcome = filter_rows(run, FilterConfig(where=("logprob > -1",)))
    assert outcome.removed == {"unscored:logprob > -1": 3}
    assert "filter kept none of 3 rows; the rule 'unscored:logprob > -1' alone removed 3" in caplog.text


def test_controls_are_as_many_rows_and_as_long(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"prompt": str(place), "response": "word " * (1 + place % 10)} for place in range(60)])
    outcome = filter_rows(run, FilterConfig(repetition=False, min_words=8, controls=True))
    controls = [pl.read_ndjson(run.path / "curate" / "controls" / f"filter_{name}.jsonl") for name in ("random", "length_matched")]
    assert len(outcome.kept) == 18
    assert len(controls[0]) == 18
    assert {len(turns[-1]["content"].split()) for turns in controls[1]["messages"]} <= {7, 8, 9, 10}


def test_a_build_refuses_a_condition_before_it_begins(toy_run: Callable[..., Run]) -> None:
    run = toy_run([{"response": "7"}])
    run.close()
    steps = BuildConfig(filter=FilterConfig(where=("nmber > 1",)), decontaminate=None, dedup=None)
    with pytest.raises(UserError, match="unknown column 'nmber'"):
        build(None, run.path, steps)


def test_a_pattern_that_would_backtrack_for_years_is_an_error(toy_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    run = toy_run([{"response": "two words"}, {"response": "x" * 4000}])
    with pytest.raises(
        UserError, match=r"took longer than 0\.2 s to search for in a text of 4,000 characters; write it without repeats within"
    ):
        filter_rows(run, FilterConfig(exclude=(r"(x+x+)+y",)))
    assert "filter" not in run.ledger.stages()


def test_keys_of_meta_that_hold_a_dot_or_nothing_are_known(toy_run: Callable[..., Run]) -> None:
    more = [{"a.b": 1, "c": {"d": 1}, "none": None}, {"a.b": 2, "c": {"d": 2}, "none": None}]
    run = toy_run([{"prompt": f"p{place}", "response": "r", "meta": meta} for place, meta in enumerate(more)])
    filter_rows(run, FilterConfig(where=("meta.a.b == 1 and meta.c.d == 1 and meta.none is None",)))
    assert load_rows(run)["prompt"].to_list() == ["p0"]
