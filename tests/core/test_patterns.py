"""A user's regular expression is read in one way, and ends."""

import re

import pytest
from sftkit.core import patterns
from sftkit.core.checks.schema import check_schema
from sftkit.core.errors import UserError
from sftkit.core.patterns import Pattern, SlowPattern

ENDLESS = r"^(x+x+)+y$"  # which tries all ways to part a run of x


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"####\s*[-+$]?[\d.]", "so\n#### 4"),
        ("^Answer: \\w+$", "a\nAnswer: 好"),
        ("(?i)שלום", "- שלום"),
        (r"\p{Han}{2}", "ok 你好"),
        ("a|b", "zb"),
    ],
)
def test_it_finds_what_python_finds(pattern: str, text: str) -> None:
    found = Pattern("", pattern, re.MULTILINE).search(text)
    assert found is not None
    if r"\p" not in pattern:  # which Python's own has not
        assert found.span() == re.search(pattern, text, re.MULTILINE).span()  # type: ignore[union-attr]
    assert Pattern("", pattern, re.MULTILINE).search("0") is None


def test_what_is_none_or_takes_too_long_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^here: '\(' is not a regular expression: missing \)"):
        Pattern("here: ", "(")
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(SlowPattern, match=r"took longer than 0\.1 s to search for in a text of 3,000 characters; write it without repeats"):
        Pattern("", ENDLESS).search("x" * 3000)


def test_a_pattern_of_a_schema_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": ENDLESS}}}
    assert check_schema('{"a": "xxxy"}', schema) is None
    assert check_schema('{"a": "y"}', schema) == "$.a: 'y' does not match '^(x+x+)+y$'"
    assert check_schema('{"a": 7}', {"properties": {"a": {"pattern": "x"}}}) is None  # a pattern is of texts
    assert "$: cannot be checked against the pattern '^(x+x+)+y$': took longer" in str(check_schema(f'{{"a": "{"x" * 3000}"}}', schema))
    with pytest.raises(UserError, match=r"json schema: is not valid at \$\.properties\.a\.pattern: '\(' is not a 'regex'"):
        check_schema('{"a": "y"}', {"properties": {"a": {"pattern": "("}}})


def test_patterns_of_the_names_of_a_schema_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    long = f'{{"{"x" * 3000}": 1}}'
    for schema in ({"patternProperties": {ENDLESS: {}}}, {"additionalProperties": False, "patternProperties": {ENDLESS: {}}}):
        assert "took longer" in str(check_schema(long, schema))
    schema = {"properties": {"a": {}}, "patternProperties": {"^n_": {"type": "number"}}, "additionalProperties": {"type": "string"}}
    assert check_schema('{"a": [], "n_b": 1, "c": "d"}', schema) is None
    assert check_schema('{"n_b": "1"}', schema) == "$.n_b: '1' is not of type 'number'"
    assert check_schema('{"c": 1}', schema) == "$.c: 1 is not of type 'string'"
    assert check_schema('{"a": 1, "c": 1}', {**schema, "additionalProperties": False}) == "$: Additional properties are not allowed: 'c'"
    assert check_schema("[1]", {**schema, "additionalProperties": False}) is None


def test_flags_that_exclude_each_other_and_what_is_nested_without_end_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^here: '\(\?au\)x' is not a regular expression: ASCII"):
        Pattern("here: ", "(?au)x")
    with pytest.raises(UserError, match=r"^here: a pattern of 20,001 characters is nested too deeply"):
        Pattern("here: ", "(" * 10_000 + "a" + ")" * 10_000)
