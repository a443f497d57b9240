"""The 25 instruction types of IFEval, strict and loose, and JSON schemas."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from sftkit.core.checks.instructions import INSTRUCTIONS, capital_words, check_instructions, count_sentences, detect_language
from sftkit.core.checks.schema import check_schema
from sftkit.core.errors import UserError

ENGLISH = "this is a quiet morning in a small english town by the sea"
CASES: list[tuple[str, dict[str, Any], str, str]] = [  # name, arguments, an answer that follows, one that does not
    ("keywords:existence", {"keywords": ["sea", "wind"]}, "Wind over the sea", "the sea"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea and Sea", "sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "seaside", "by the Sea."),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "less than"}, "a q", "Qq"),
    ("language:response_language", {"language": "de"}, "Das ist ein ruhiger Morgen in einer kleinen Stadt am Meer.", ENGLISH),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "Mr. One is here"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "it's three"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Sea"},
        "a\n\n'sea, it is",
        "a\n\nthe sea",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and * *"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Sea>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it\nyes", "yes, say it"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'so it is. the end."', "The end. No."),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "THE SEA is", "THE sea"),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.title()),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


def test_every_type_is_here_once() -> None:
    assert sorted(name for name, *_ in CASES) == sorted(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


@pytest.mark.parametrize(("name", "arguments", "follows", "breaks"), CASES, ids=[name for name, *_ in CASES])
def test_one_follows_and_the_other_does_not(name: str, arguments: dict[str, Any], follows: str, breaks: str) -> None:
    assert check_instructions(follows, [name], [arguments]).strict == (True,)
    assert check_instructions(breaks, [name], [arguments]).strict == (False,)
    assert check_instructions(" \n", [name], [arguments]) == check_instructions("", [name], [arguments])
    assert check_instructions("", [name], [arguments]).loose == (False,)


def test_loose_forgives_the_lines_around_and_the_stars() -> None:
    ends = ["startend:end_checker"], [{"end_phrase": "the end"}]
    assert check_instructions("It is\nthe end\nHope this helps!", *ends) == check_instructions("It is\nthe end\nBye", *ends)
    assert check_instructions("It is\nthe end\nBye", *ends).strict == (False,)
    assert check_instructions("It is\nthe end\nBye", *ends).loose == (True,)
    assert check_instructions("It is **the end**", *ends).loose == (True,)
    assert check_instructions("Sure, here it is:\na b", ["punctuation:no_comma"], [{}]).loose == (True,)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("one", 1),
        ("One. Two! Three?", 3),
        ("Dr. Smith met Mr. Jones at 5 p.m. on Friday. They left.", 2),
        ("It costs 3.5 dollars, i.e. a lot. Fine.", 2),
        ("He said \"Stop.\" Then he left.", 2),
        ("Well... yes. No.", 2),
        ("J. R. Smith wrote it. It sold.", 2),
    ],
)  # fmt: skip
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_capital_words_are_counted_as_the_reference_counts_them() -> None:
    assert capital_words("I DON'T know NATO, the U.S. or ABC-DEF") == 6
    assert capital_words("None Here") == 0


def test_languages_are_the_same_each_time() -> None:
    mixed = "ja nein yes no oui"
    assert len({detect_language(mixed) for _ in range(5)}) == 1
    assert detect_language("12345 !!!") is None
    assert detect_language("今天天气很好，我们去海边走走吧。") == "zh-cn"


@pytest.mark.parametrize(
    "answer", ["a" * 100_000, "." * 100_000, "*" * 100_000, "[" * 100_000, "\n" * 100_000 + "x", "<" * 100_000, "A a. " * 20_000]
)
def test_an_endless_answer_is_checked_all_the_same(answer: str) -> None:
    names = [name for name, *_ in CASES]
    followed = check_instructions(answer, names, [arguments for _, arguments, *_ in CASES])
    assert len(followed.strict) == len(followed.loose) == 25


def test_bad_instructions_are_named() -> None:
    with pytest.raises(UserError, match="unknown instruction 'keywords:exist': did you mean 'keywords:existence'"):
        check_instructions("a", ["keywords:exist"], [{}])
    with pytest.raises(UserError, match="keywords:frequency: found no frequency; expected keyword, frequency, relation"):
        check_instructions("a", ["keywords:frequency"], [{"keyword": "a", "relation": "at least"}])
    with pytest.raises(UserError, match="relation is 'about'"):
        check_instructions("a", ["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}])


def test_all_of_ifeval_is_understood(shared_data: Path) -> None:
    rows = [json.loads(line) for line in gzip.decompress((shared_data / "ifeval" / "input_data.jsonl.gz").read_bytes()).splitlines()]
    checks = 0
    for row in rows:
        followed = check_instructions("Quite so.", row["instruction_id_list"], row["kwargs"])
        checks += len(followed.strict)
        assert all(loose or not strict for strict, loose in zip(followed.strict, followed.loose, strict=True))
    assert (len(rows), checks) == (541, 834)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"a": 1}', None),
        ('Here:\n```json\n{"a": 1}\n```', None),
        ('{"a": "1"}', "$.a: '1' is not of type 'integer'"),
        ("{}", "$: 'a' is a required property"),
        ("a", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "not JSON: "),
    ],
)
def test_schemas(answer: str, reason: str | None) -> None:
    found = check_schema(answer, SCHEMA)
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


def test_what_cannot_be_checked_is_a_reason_and_no_crash() -> None:
    deep = "[" * 400 + "]" * 400
    assert "nests too deeply" in str(check_schema(deep, {"items": {"$ref": "#"}}))
    assert "refers to itself without end" in str(check_schema("1", {"$ref": "#"}))
    assert "cannot be checked: int too large" in str(check_schema("1" + "0" * 400, {"multipleOf": 0.5}))


def test_bad_schemas_are_named() -> None:
    with pytest.raises(UserError, match=r"json schema: is not valid at \$\.type: 'nothing' is not valid"):
        check_schema("1", {"type": "nothing"})
    with pytest.raises(UserError, match=r"refers to .*elsewhere"):
        check_schema("1", {"$ref": "https://example.org/elsewhere.json"})
