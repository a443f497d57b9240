"""The judge: expected grades equal a plain forward pass, both orders decide, and what is no number is an error with its words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_server import Server, answer, fault
from sftkit.core import judge as judging
from sftkit.core.chat import load_chat
from sftkit.core.engines.base import EngineConfig
from sftkit.core.errors import UserError
from sftkit.core.judge import Item, Judge, Pair, parse_grade, parse_verdict, read_rubric
from sftkit.core.models import load_model, resolve_model
from sftkit.core.named_models import find_models
from sftkit.core.values import ValueStore

CPU = EngineConfig(engine="transformers", device="cpu", dtype="float32")
ITEMS = [Item("What is 1+1?", "2"), Item("What is 1+1?", "3", reference="2"), Item("你好", "世界")]


@pytest.fixture
def open_judge(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    monkeypatch.setattr(judging, "LEAST_MASS", 0.0)  # a model of random weights gives its digits what it gives any token

    def make(**settings: Any) -> Judge:
        (model,) = find_models({"judge": str(tiny_model)}, CPU)
        return Judge(model, ValueStore(tmp_path / "values.sqlite"), **settings)

    return make


def next_chances(folder: Path, messages: list[dict[str, str]], labels: str) -> list[float]:
    chat, model = load_chat(resolve_model(folder)), load_model(resolve_model(folder), dtype="float32")
    tokens = [chat.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels]
    with torch.no_grad():
        logits = model(torch.tensor([chat.prompt(messages)])).logits[0, -1]
    return logits[tokens].softmax(-1).tolist()


def test_a_grade_is_the_expected_digit(open_judge: Callable[..., Judge], tiny_model: Path) -> None:
    judge = open_judge()
    for item, grade in zip(ITEMS, judge.grade(ITEMS), strict=True):
        chances = next_chances(tiny_model, judge._grading(item), "123456")
        assert grade.value == pytest.approx(sum((place + 1) * chance for place, chance in enumerate(chances)), abs=1e-4)
        assert grade.error == ""


def test_a_pair_is_judged_in_both_orders_and_a_flip_is_a_tie(open_judge: Callable[..., Judge], tiny_model: Path) -> None:
    judge = open_judge()
    pairs = [Pair("What is 1+1?", text, "3 and more") for text in ("2", "the sea", "你好", "A", "#### 42", "model", "word " * 30)]
    verdicts = judge.compare(pairs)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        shown_first = next_chances(tiny_model, judge._comparing(pair.prompt, pair.first, pair.second, None), "AB")[0]
        shown_second = next_chances(tiny_model, judge._comparing(pair.prompt, pair.second, pair.first, None), "AB")[1]
        assert verdict.orders == pytest.approx((shown_first, shown_second), abs=1e-4)
        assert verdict.preference == pytest.approx((shown_first + shown_second) / 2, abs=1e-4)
        agree = (shown_first > 0.5) == (shown_second > 0.5)
        assert verdict.winner == ((1 if shown_first > 0.5 else 2) if agree else 0)
        assert verdict.flipped == (not agree)
    assert any(each.flipped for each in verdicts)  # this judge sees places
    turned = judge.compare([Pair(each.prompt, each.second, each.first) for each in pairs])
    assert [each.winner for each in turned] == [{1: 2, 2: 1, 0: 0}[each.winner or 0] for each in verdicts]


def test_what_was_judged_is_not_judged_again(open_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_judge().grade(ITEMS)
    written = open_judge(parse=True).grade(ITEMS)
    monkeypatch.setattr("sftkit.core.named_models.open_engine", lambda *_: pytest.fail("the model was opened"))
    assert open_judge().grade(ITEMS) == first
    assert open_judge(parse=True).grade(ITEMS) == written


def test_nonsense_is_an_error_with_its_words(open_judge: Callable[..., Judge]) -> None:
    judge = open_judge(parse=True)
    for grade in judge.grade(ITEMS):
        assert grade.value is None
        assert grade.error.startswith("not a number from 1 to 6: '")
    (verdict,) = judge.compare([Pair("q", "a", "b")])
    assert verdict.winner is None
    assert verdict.error.startswith("not a verdict: '")


def test_a_judge_that_would_not_write_a_grade_gives_none(tmp_path: Path, tiny_model: Path) -> None:
    (model,) = find_models({"judge": str(tiny_model)}, CPU)
    with Judge(model, ValueStore(tmp_path / "values.sqlite"), scale=2) as judge:
        grades = judge.grade(ITEMS)
    assert {each.value for each in grades} == {None}
    assert all("not a grade: the judge gives 1 to 2 together a probability of 0.0" in each.error for each in grades)


def test_an_answer_beyond_the_context_is_that_rows_error(open_judge: Callable[..., Judge]) -> None:
    good, long = open_judge().grade([ITEMS[0], Item("q", "word " * 100_000)])
    assert good.value is not None
    assert long.value is None
    assert "do not fit the context of 512" in long.error


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4.0),
        (" **4** ", 4.0),
        ("Rating: 3.5", 3.5),
        ("5/6", 5.0),
        ("My score is 2.", 2.0),
        ("<think>maybe 1 or 2</think>\n6", 6.0),
        ("The answer has 3 faults and 2 merits.\nScore: 4", 4.0),
        ("8/10", None),
        ("It is good.\nScore: 3/10", None),
        ("It is good.\n**Score:** 3 out of 6", 3.0),
        ("It is bad.\nRating: -3", None),
        ("7", None),
        ("-3", None),
        ("0", None),
        ("four", None),
        ("It has 3 faults and 2 merits", None),
        ("", None),
        ("<think>still thinking 4", None),
    ],
)
def test_grades_are_read(text: str, value: float | None) -> None:
    grade = parse_grade(text, 6)
    assert grade.value == value
    assert bool(grade.error) == (value is None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        ("(b)", 0.0),
        ("Answer B.", 0.0),
        ("[[A]]", 1.0),
        ("I find that answer A is better, for B is wrong.", 1.0),
        ("A is nice", None),
        ("[[A]] or [[B]]", None),
        ("neither", None),
        ("Neither answer A nor answer B is better.", None),
        ("I don't think that answer A is better.", None),
        ("B is not right, so answer A is better.", 1.0),
    ],
)
def test_verdicts_are_read(text: str, value: float | None) -> None:
    found = parse_verdict(text)
    assert found == value if value is not None else str(found).startswith("not a verdict: ")


def test_rubrics_are_names_files_or_words(tmp_path: Path) -> None:
    assert "right" in read_rubric("correctness")
    assert read_rubric("Judge the rhyme alone.") == "Judge the rhyme alone."
    (tmp_path / "rubric.txt").write_text("Judge the metre.\n")
    assert read_rubric(str(tmp_path / "rubric.txt")) == "Judge the metre."
    with pytest.raises(UserError, match=r"expected one of helpfulness, correctness, .* a text file, or the rubric itself in words"):
        read_rubric("helpfulnes")


def test_a_scale_beyond_one_digit_is_refused(open_judge: Callable[..., Judge]) -> None:
    with pytest.raises(UserError, match="scale: expected 2 to 9, one digit, found 10"):
        open_judge(scale=10)


@pytest.mark.usefixtures("hasty")
def test_a_server_can_judge_and_what_it_says_is_read(server: Server, tmp_path: Path) -> None:
    """It prefers the longer answer in both orders, grades by length, and now and then writes or answers something else."""

    def reply(body: dict[str, Any]) -> Any:
        said = body["messages"][-1]["content"]
        parts = [said.split(f"[{title}]\n")[1].split("\n[End")[0] for title in ("Answer", "Answer A", "Answer B") if f"[{title}]\n" in said]
        if "broken" in said:
            return fault(400, "not this one")
        if "poem" in said:
            return answer("Roses are red.")
        return answer(f"Score: {len(parts[0])}" if len(parts) == 1 else "AB"[len(parts[1]) > len(parts[0])])

    server.reply = reply
    (model,) = find_models({"judge": "m"}, EngineConfig(base_url=server.url))
    with ValueStore(tmp_path / "values.sqlite") as store, Judge(model, store) as judge:
        assert judge.parse
        grades = judge.grade([Item("q", "four"), Item("q", "poem"), Item("q", "broken"), Item("q", "too long to grade")])
        assert [each.value for each in grades] == [4.0, None, None, None]
        assert grades[1].error == "not a number from 1 to 6: 'Roses are red.'"
        assert "not this one" in grades[2].error
        longer, shorter, same = judge.compare([Pair("q", "long one", "short"), Pair("q", "s", "longer"), Pair("q", "same", "size")])
        assert (longer.winner, longer.preference) == (1, 1.0)
        assert (shorter.winner, shorter.preference) == (2, 0.0)
        assert (same.winner, same.flipped, same.preference) == (0, True, 0.5)  # it says A whatever stands there
        asked = len(server.asked)
        assert judge.compare([Pair("q", "long one", "short")]) == [longer]
        assert len(server.asked) == asked
