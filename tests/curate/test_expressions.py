"""Conditions as a person writes them: what they say of rows, what is missing, and one line for what is none."""

import polars as pl
import pytest
from sftkit.core.errors import UserError
from sftkit.curate.expressions import Kind, parse_condition

KINDS: dict[str, Kind] = {"num_tokens": "number", "ifd": "number", "source": "text", "response": "text"}
TABLE = pl.DataFrame(
    {
        "num_tokens": [10.0, 900.0, 10.0, None],
        "ifd": [0.5, 0.5, None, 2.0],
        "source": ["a", "b", "a", "c"],
        "response": ["yes", "no", "你好", ""],
        "meta.level": ["3", "10", None, "high"],
    }
)


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("num_tokens < 800 and ifd < 1", [True, False, None, False]),
        ("num_tokens < 800 or ifd < 1", [True, True, True, None]),
        ("not ifd < 1", [False, False, None, True]),
        ("0 < ifd <= 0.5", [True, True, None, False]),
        ("ifd is None", [False, False, True, False]),
        ("ifd is not None and num_tokens is not None", [True, True, False, False]),
        ("num_tokens * 2 + 1 >= 21", [True, True, True, None]),
        ("source in ('a', 'c')", [True, False, True, True]),
        ("source not in ('a', 'c')", [False, True, False, False]),
        ("num_tokens in (10, 11)", [True, False, True, None]),
        ("'o' in response", [False, True, False, False]),
        ("len(response) == 2", [False, True, True, False]),
        ("meta.level > 9", [False, True, None, None]),
        ("meta.level == '3'", [True, False, None, False]),
        ("ifd > -1", [True, True, None, True]),
        ("1 > ifd", [True, True, None, False]),
        ("num_tokens / 0 > 1", [None, None, None, None]),
        ("num_tokens / (num_tokens - 10) > 1", [None, True, None, None]),
    ],
)
def test_what_a_condition_says(text: str, truth: list[bool | None]) -> None:
    assert TABLE.select(parse_condition(text, KINDS).truth).to_series().to_list() == truth


def test_a_condition_is_called_by_its_text_or_by_the_name_before_it() -> None:
    assert parse_condition(" ifd < 1 ", KINDS).name == "ifd < 1"
    named = parse_condition("easy: ifd < 1 and num_tokens > 3", KINDS)
    assert (named.name, named.text, named.names) == ("easy", "ifd < 1 and num_tokens > 3", ("ifd", "num_tokens"))
    assert named.compared is None
    single = parse_condition("easy: 1 > ifd", KINDS).compared
    assert single is not None
    assert single[1] == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("num_token < 3", "unknown column 'num_token': did you mean 'num_tokens'?"),
        ("ifd = 1", "equality is written =="),
        ("ifd", "is a number, which is neither true nor false"),
        ("meta.good", "may hold anything; compare it, as meta.good == True"),
        ("ifd < 'a'", "ifd is a number, 'a' a text"),
        ("'a' < ifd", "'a' is a text, ifd a number"),
        ("ifd < 1e400", "a number is too large"),
        ("source and ifd < 1", "'source' is a text, expected a truth"),
        ("ifd is 1", "`is` stands before None alone"),
        ("ifd == None", "None stands only after `is`"),
        ("__import__('os').system('x')", "is not understood"),
        ("[each for each in source]", "is not understood"),
        ("source in ()", "after `in` expected texts or numbers"),
        ("ifd < 1; ifd", "expected a condition like"),
        ("", "expected a condition like"),
        ("(" * 500 + "ifd" + ")" * 500, "expected a condition like"),
        ("not " * 5000 + "ifd < 1", "expected a condition like"),
    ],
)
def test_what_is_no_condition_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_condition(text, KINDS)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
