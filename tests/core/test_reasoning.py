"""Thoughts and answer of a thinking model apart."""

import pytest
from sftkit.core.reasoning import split_reasoning


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nLet me see.\n</think>\n\n42", False, ("Let me see.", "42")),
        ("\n<think>\n\n</think>\n\n42", False, (None, "42")),  # told not to think
        ("Let me see.</think>42", True, ("Let me see.", "42")),  # the prompt ended with the tag
        ("<think>Let me", False, ("Let me", "")),  # cut while it thought
        ("Let me", True, ("Let me", "")),
        ("42", False, (None, "42")),
        ("The tags are <think> and </think>.", False, (None, "The tags are <think> and </think>.")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
    ],
)
def test_split(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, opened=opened) == expected
