"""What is not suspected of repeating itself does not: the columns clear no text that the rule would reject."""

import random

import polars as pl
import pytest
from sftkit.curate.repeats import duplicate_ngrams, may_repeat, top_ngram

BOUNDS = ((0.5, 0.5), (0.2, 0.3), (0.0, 0.0), (0.9, 0.1), (1.0, 1.0))


def made(draw: random.Random) -> str:
    variety = draw.choice((1, 2, 3, 5, 20, 200))
    words = [str(draw.randrange(variety)) for _ in range(draw.randrange(90))]
    if draw.random() < 0.5:
        words = words[: draw.randrange(1, 12)] * draw.randrange(1, 15) + words
    return draw.choice((" ", ". ", "\n")).join([*words, *(["é"] if draw.random() < 0.05 else [])])


def test_every_text_at_fault_is_suspected() -> None:
    draw = random.Random(0)
    texts = [made(draw) for _ in range(4000)]
    for max_duplicate, max_top in BOUNDS:
        suspected = may_repeat(pl.Series(texts), max_duplicate, max_top)
        at_fault = 0
        for text, suspect in zip(texts, suspected, strict=True):
            words = text.replace(".", " ").split()
            tops = [top_ngram(words, n) for n in (2, 3, 4)] if len(words) >= 50 else [0.0]
            if duplicate_ngrams(words, 10) > max_duplicate or max(tops) > max_top:
                at_fault += 1
                assert suspect, text
        assert at_fault > 500 or max_top == 1


@pytest.mark.parametrize("windows", range(1, 100))
def test_a_share_at_its_bound_is_left_to_the_rule(windows: int) -> None:
    """A share is 1 - different / windows there, which may be a little more than the bound that it is."""
    for different in range(1, windows + 1):
        words = [f"w{place % different}" for place in range(windows + 9)]
        share, bound = duplicate_ngrams(words, 10), (windows - different) / windows
        assert share <= bound or may_repeat(pl.Series([" ".join(words)]), bound, 1.0)[0]


def test_what_people_write_is_cleared_however_long_it_is() -> None:
    draw = random.Random(0)
    words = [f"w{number}" for number in range(3000)]
    frequent = draw.choices(words, [1 / (place + 1) for place in range(3000)], k=200_000)  # a word in nine is the same
    texts = [" ".join(frequent[start : start + draw.choice((30, 300, 3000))]) for start in range(0, 190_000, 1000)]
    assert not may_repeat(pl.Series(texts), 0.5, 0.5).any()


def test_no_text_at_all() -> None:
    assert may_repeat(pl.Series([], dtype=pl.String), 0.5, 0.5).to_list() == []
    assert not may_repeat(pl.Series(["", "...", "a"]), 0.5, 0.5)[0]
