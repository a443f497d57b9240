"""The final number of an answer: found where it is meant, and compared exactly."""

from fractions import Fraction

import pytest
from sftkit.core.checks.numbers import canonical, extract_number

MARKED = [
    ("so 3\n#### 1,234.50 dollars", "1234.5"),
    ("#### 9*2=18", "18"),
    (r"thus \boxed{\frac{3}{4}}", "0.75"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{\$18 \text{ dollars}}", "18"),
    (r"\boxed{x = 18}", "18"),
    (r"first \boxed{3}, then \boxed{18}", "18"),
    ("The answer is $18.", "18"),
    ("The answer is: **18**.\nThat took 5 steps", "18"),
    ("The answer is 3 + 15 = 18. Done in 7", "18"),
    ("The answer is 18.5.", "18.5"),
    ("The answer is \\(18\\).", "18"),
    ("The answer is 1 1/2 cups", "1.5"),
    ("the final answer to the question of how many is 12 apples", "12"),
    ("**Answer:** 1,000", "1000"),
    ("答案是 18。还有 5 个", "18"),
    ("答案：１８", "18"),
    ("work\nA: -2.5", "-2.5"),
    ("#### -1/3", "-1/3"),
    ("#### 50%", "50"),
    ("#### 18.000", "18"),
]
UNMARKED = [
    ("she has 5 and then 18 left.", "18"),
    ("it costs 10-15", "15"),
    ("it is −5 degrees", "-5"),
    ("he owes -$5", "-5"),
    ("40 tonnes of CO2", "40"),
    ("5 m²", "5"),
    ("#### Step 3\nwe get 7", "7"),  # a heading of Markdown
    ("#### 2. Add them up\nwe get 7", "7"),
    ("he paid $1,000,000.", "1000000"),
    ("1e6", "1000000"),
    (".5", "0.5"),
]


@pytest.mark.parametrize(("text", "number"), MARKED)
@pytest.mark.parametrize("rule", ["strict", "flexible"])
def test_marked_answers_are_found_by_both_rules(text: str, number: str, rule: str) -> None:
    found = extract_number(text, rule)
    assert found is not None
    assert canonical(found) == number


@pytest.mark.parametrize(("text", "number"), UNMARKED)
def test_only_the_flexible_rule_takes_the_last_number(text: str, number: str) -> None:
    found = extract_number(text)
    assert found is not None
    assert canonical(found) == number
    assert extract_number(text, "strict") is None


@pytest.mark.parametrize("text", ["", "none here", "3" * 6000, "1/0", r"\boxed{}", "x2 y3"])
def test_no_number(text: str) -> None:
    assert extract_number(text) is None


def test_order_of_the_marks() -> None:
    assert extract_number("The answer is 1. \\boxed{2} #### 3") == 3
    assert extract_number("#### 3 \n The answer is 1. \\boxed{2}") == 3
    assert extract_number("The answer is 1. \\boxed{2}") == 2


def test_numbers_are_exact() -> None:
    assert extract_number("#### 0.1") == Fraction(1, 10)
    assert extract_number("#### 1/3") != extract_number("#### 0.3333333333333333")
    assert extract_number("#### 2/4") == extract_number("#### 0.50")
    assert [canonical(Fraction(each)) for each in ("-1/8", "22/7", "100", "-0.05")] == ["-0.125", "22/7", "100", "-0.05"]
