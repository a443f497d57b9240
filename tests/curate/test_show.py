"""What is read back in a terminal or a pipe is whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core.errors import UserError
from sftkit.core.run import Run
from sftkit.curate.best import best
from sftkit.curate.decide_config import BestConfig, DedupConfig, FilterConfig
from sftkit.curate.dedup import dedup
from sftkit.curate.filters import filter_rows


def test_why_cuts_nothing_off_where_lines_are_short(
    toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns a table had `not_…` for the rule and a witness that could not be asked about."""
    monkeypatch.setenv("COLUMNS", "60")
    twice = {"prompt": "第一題？ \x1b[31m", "response": "a  long answer that is there twice"}
    run = toy_run([{"id": "aaaa0000aaaa0000", **twice}, {"id": "bbbb0000bbbb0000", **twice}])
    filter_rows(run, FilterConfig(where=("short-and-with-a-name-of-its-own: num_chars < 100",)))
    dedup(run, DedupConfig(exact=True))
    run.close()
    code, out, _ = cli("curate", "why", "bb", run.path)
    assert code == 0
    assert out.splitlines() == [
        "bbbb0000bbbb0000: 第一題？ \\x1b[31m",
        "  import       kept",
        "  filter       kept",
        "  dedup_exact  rejected  exact_duplicate",
        "      for it stands aaaa0000aaaa0000: 第一題？ \\x1b[31m",
    ]


def test_why_tells_the_samples_of_a_prompt_apart(
    toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = toy_run([{"id": "aaaa0000aaaa0000", "prompt": "q", "response": f"r{n}", "index": n, "logprob": -1.0 - n} for n in range(2)])
    best(run, BestConfig(by=("logprob",)))
    run.close()
    code, out, _ = cli("curate", "why", "aaaa", run.path)
    assert code == 0
    assert out.splitlines()[1:5] == [
        "  aaaa0000aaaa0000/0  import  kept",
        "  aaaa0000aaaa0000/1  import  kept",
        "  aaaa0000aaaa0000/0  best    kept",
        "  aaaa0000aaaa0000/1  best    rejected  not_best  score -2, threshold -1",
    ]
    assert out.splitlines()[5] == "      for it stands aaaa0000aaaa0000/0: q"
    assert cli("curate", "why", "aaaa0000aaaa0000/1", run.path)[1].count("\n") == 4


def test_a_row_is_known_by_what_its_file_calls_it(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Ours begins with the digits of many a number: the file's own comes first."""
    rows = [{"id": f"{name}", "prompt": f"question {name}", "completion": "a"} for name in [*range(40), "題目/3", 'a "b"']]
    rows += [{"id": "twice", "prompt": text, "completion": "a"} for text in "pq"]
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert cli("curate", "import", data, "-o", run)[0] == 0
    for name in ("3", "17", "題目/3", 'a "b"'):
        assert cli("curate", "why", name, run)[1].splitlines()[0].endswith(f": question {name}")
        assert f"question {name} " in cli("curate", "show", run, "--id", name)[1]
        assert f"question {name} " in cli("curate", "show", data, "--id", name)[1]
    code, _, err = cli("curate", "why", "twice", run)
    assert (code, "2 rows are called 'twice' by their files: give one of our ids, as " in err) == (1, True)
    assert "no decision about 'zz'" in cli("curate", "why", "zz", run)[2]


def test_a_run_without_rows_says_so_and_what_removed_them(toy_run: Callable[..., Run], cli: Callable[..., tuple[int, str, str]]) -> None:
    run = toy_run([{"prompt": "p", "response": "r"}])
    filter_rows(run, FilterConfig(min_words=9))
    run.close()
    code, out, err = cli("curate", "show", run.path)
    assert (code, out) == (0, "")
    assert "no row is left to show; --rejected RULE shows what a rule removed: min_words" in err


def test_what_removed_the_last_rows_is_named_and_not_what_removed_most(toy_run: Callable[..., Run], tmp_path: Path) -> None:
    run = toy_run([{"prompt": f"p{n}", "response": "word " * n} for n in range(1, 5)])
    filter_rows(run, FilterConfig(min_words=4))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "p4", "completion": "word " * 4}) + "\n")
    dedup(run, DedupConfig(exact=True, semantic=None, against=str(tmp_path / "other.jsonl")))
    with pytest.raises(UserError, match="no row is left to decide on: stage dedup_exact removed the last 1 by its rule 'exact_duplicate'"):
        best(run, BestConfig(by=("random",)))
