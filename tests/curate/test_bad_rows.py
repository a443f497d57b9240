"""Bad input to the deciding steps: each is one clear line, or a row with its reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sftkit.core.run import Run
from sftkit.curate.rows import load_rows

Cli = Callable[..., tuple[int, str, str]]
ROWS = [{"prompt": f"Question {place}", "response": "an answer of words " + "x" * place, "num_tokens": 50} for place in range(6)]


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert cli("curate", "import", file, "-o", tmp_path / "run")[0] == 0
    return tmp_path / "run"


COMMANDS = [  # what is asked, and the one line that is said
    ("dedup {run} --semantic -0.9", "semantic: expected a cosine above 0 and up to 1, found -0.9; a distance of d is given as 1 - d"),
    (
        "dedup {run} --minhash 1.5",
        "minhash: expected a Jaccard similarity above 0 and up to 1, found 1.5; a distance of d is given as 1 - d",
    ),
    ("select {run} --method longest --budget 0", "budget: expected 1 or more, found 0"),
    ("select {run} --method longest --budget-tokens 49", "the first row of the ranking alone has 50 tokens, more than budget_tokens 49"),
    ("select {run} --method top --by logprob --budget 2", "none of 6 rows has a score 'logprob', which top chooses by"),
    ("best {run} --by num_tokns", "unknown score 'num_tokns': did you mean 'num_tokens'? known are"),
    ("best {run} --by num_tokens --keep 0", "keep: expected 1 or more, found 0"),
    ("best {run} --gate num_tokens --keep-all --min-pass-rate 50", "min_pass_rate: expected a share between 0 and 1, found 50"),
    ("filter {run} --where num_tokn<3", "unknown column 'num_tokn': did you mean 'num_tokens'?"),
    ("filter {run} --where num_tokens=3", "equality is written =="),
    ("filter {run} --max num_tokens=many", "--min/--max num_tokens=many: expected NAME=VALUE with a number"),
    ("filter {run} --min-words 5 --max-words 3", "no row has 5 words or more and 3 or less"),
    ("filter {run} --min num_chars=5 --max num_chars=3", "no row has 5 num_chars or more and 3 or less"),
    ("filter {run} --preset corect", "unknown preset 'corect': did you mean 'correct'?"),
    ("export {run} -o {run}", "is not empty and no export of sftkit; give a new folder"),
    ("mix {run} --repeat 2", "rows are repeated only into a new run; give -o RUN"),
    ("show {run} --rejected nothing", "no row was rejected by 'nothing'; it has rejected nothing"),
    ("why zzz {run}", "no decision about 'zzz'"),
]


@pytest.mark.parametrize(("command", "told"), COMMANDS)
def test_one_line_says_what_is_wrong(command: str, told: str, run: Path, cli: Cli) -> None:
    code, _, err = cli("curate", *command.format(run=run).split())
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(lines) == 1
    assert told in lines[0]
    assert "Traceback" not in err


def test_a_score_that_no_row_has_decides_nothing_and_that_is_said(run: Path, cli: Cli) -> None:
    for command in (("best", run, "--by", "logprob"), ("dedup", run, "--no-semantic", "--by=-logprob")):
        code, _, err = cli("curate", *command)
        assert code == 0
        assert "none of 6 rows has a score 'logprob', so it puts none before another" in err


def test_more_than_there_is_keeps_all_and_says_so(run: Path, cli: Cli) -> None:
    code, out, _ = cli("curate", "select", run, "--method", "longest", "--budget", "60")
    assert code == 0
    assert "the budget holds all 6 rows: every one is kept" in out


def test_rows_that_are_the_same_keep_ids_of_their_own(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "twice.jsonl"
    file.write_text((json.dumps(ROWS[0]) + "\n") * 3)
    assert cli("curate", "import", file, "-o", tmp_path / "run")[0] == 0
    ids = load_rows(Run.open(tmp_path / "run"))["example_id"].to_list()
    assert ids[1:] == [f"{ids[0]}~2", f"{ids[0]}~3"]
    code, out, _ = cli("curate", "dedup", tmp_path / "run", "--no-semantic")
    assert code == 0
    assert "exact_duplicate 2" in out


def test_unicode_that_does_not_normalise_to_one_form_goes_through(tmp_path: Path, cli: Cli) -> None:
    texts = [
        "e\u0301 \u0344 \u0345",
        "\u00e9 \u0308\u0301 \u03b9",
        "\ufdfa",
        "\u1e9b\u0323",
        "\U0001f468\u200d\U0001f469",
        "\u202eabc",
        "\x00\x1f",
    ]
    file = tmp_path / "odd.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "response": text}) + "\n" for text in texts))
    for command in (["import", file, "-o", tmp_path / "run"], ["dedup", tmp_path / "run", "--no-semantic"], ["verify", tmp_path / "run"]):
        code, _, err = cli("curate", *command)
        assert code == 0, err
    assert len(load_rows(Run.open(tmp_path / "run"))) == 6, "the second is the first after NFKC and case folding"


def test_a_row_of_many_megabytes_is_a_row(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "big.jsonl"
    rows = [{"prompt": "p", "response": "word \u00e9 " * 1_000_000}, ROWS[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("curate", "import", file, "-o", tmp_path / "run")[0] == 0
    code, out, _ = cli("curate", "filter", tmp_path / "run", "--max-words", "1000")
    assert code == 0
    assert "max_words 1" in out
