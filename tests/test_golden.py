"""The cases that other systems get wrong: each that the page on curation names is a test."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_each_case_of_the_page_is_a_test_that_names_who_fails() -> None:
    page = (TESTS.parent / "docs" / "curation.md").read_text(encoding="utf-8")
    cases = re.findall(r"^\|[^|]+\|[^|]+\| ([^|]+) \| `(\S+)::(\w+)` \|$", page, re.MULTILINE)
    assert len(cases) == 14
    for fails, file, name in cases:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        (function,) = (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) and each.name == name)
        told = f"{name} {ast.get_docstring(function)} {ast.get_docstring(tree)}".lower()
        peers = [each for each in PEERS if each in fails.lower()]
        assert peers, fails
        assert all(each in told for each in peers), f"{file}::{name} does not name {', '.join(peers)}"


PEERS = (
    *("distilabel", "semhash", "semdedup", "nemo", "minhash", "deita", "open-instruct", "curator", "data-juicer", "open-r1"),
    *("datatrove", "run-batch", "synthetic-data-kit"),
)
