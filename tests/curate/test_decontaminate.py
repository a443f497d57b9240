"""Contamination: an item that is copied is found whatever its length, and what was found is told with its measure."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.copies import Index, Matcher, build_index
from sftkit.core.errors import UserError
from sftkit.core.ngrams import words
from sftkit.core.run import Run
from sftkit.curate.build import build, planned_stages
from sftkit.curate.config import BuildConfig
from sftkit.curate.decide_config import DecontaminateConfig, DedupConfig
from sftkit.curate.decontaminate import bundled, decontaminate, open_benchmark

BUNDLED = ("gsm8k", "humaneval", "ifeval", "mmlu", "mt-bench")


def found(texts: list[str], items: dict[str, str], ngram: int = 8, min_coverage: float = 0.5, asked: bool = True) -> list[tuple]:
    matcher = Matcher([build_index("bench", list(items.items()))], ngram, min_coverage)
    return sorted(
        (each.text, matcher.item(each.entry)[1], each.longest, each.coverage) for each in matcher.find(texts, [asked] * len(texts))
    )


def oracle(text: str, item: str, ngram: int) -> tuple[int, float]:
    """The longest run of words in both, and the share of the item's words in runs of `ngram` or more, by the definition."""
    a, b = words(text), words(item)
    covered: set[int] = set()
    longest = 0
    for start in range(len(b)):
        for end in range(start + 1, len(b) + 1):
            if any(a[place : place + end - start] == b[start:end] for place in range(len(a))):
                longest = max(longest, end - start)
                if end - start >= ngram:
                    covered |= set(range(start, end))
    return longest, len(covered) / len(b)


@pytest.mark.parametrize("seed", range(12))
def test_coverage_and_longest_run_equal_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    vocabulary = [f"w{number}" for number in range(int(random.choice([3, 30])))]
    items = {str(number): " ".join(random.choice(vocabulary, int(random.integers(8, 30)))) for number in range(6)}
    texts = []
    for _ in range(8):
        parts = list(random.choice(vocabulary, 12))
        for _ in range(2):
            source = words(items[str(random.integers(6))])
            begin = int(random.integers(0, len(source)))
            parts += [word.decode() for word in source[begin : begin + int(random.integers(5, 20))]]
        texts.append(" ".join(parts))
    for ngram in (8, 10, 13):
        for min_coverage in (0.0, 0.5):
            expected = []
            for number, text in enumerate(texts):
                for item, words_of_item in items.items():
                    longest, coverage = oracle(text, words_of_item, ngram)
                    whole = longest == len(words(words_of_item))
                    if whole or (longest >= ngram and coverage >= min_coverage):
                        expected.append((number, item, longest, pytest.approx(1.0 if whole else coverage)))
            assert found(texts, items, ngram, min_coverage) == expected


QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many did she sell?"


def test_a_six_word_question_copied_verbatim_is_flagged() -> None:
    """open-r1's decontamination (8-grams) and datatrove's (12-grams of the labels) cannot see an item that is shorter than their runs."""
    items = {"q": "Name the boiling point of osmium"}
    for text in ("Name the boiling point of osmium?", "Question: name the BOILING point\nof osmium. Answer briefly."):
        assert found([text], items) == [(0, "q", 6, 1.0)]
    assert found(["Name the boiling point of gold"], items) == []


def test_short_items_in_answers_must_be_a_sentence_and_shorter_ones_a_turn() -> None:
    items = {"title": "The Voting Rights Act of 1965", "tiny": "Explain photosynthesis briefly", "word": "Osteoclasts"}
    assert found(["It ended with the Voting Rights Act of 1965, some say."], items, asked=False) == []
    assert found(["Quiz:\nThe Voting Rights Act of 1965?\nYes"], items, asked=False) == [(0, "title", 6, 1.0)]
    assert found(["Explain photosynthesis briefly."], items) == [(0, "tiny", 3, 1.0)]
    assert found(["Explain photosynthesis briefly, and respiration too."], items) == []
    assert found(["Explain photosynthesis briefly."], items, asked=False) == []
    assert found(["Osteoclasts"], items) == [], "one word is no item"


def test_writing_it_otherwise_does_not_hide_a_copy() -> None:
    items = {"q": "Janet’s ducks lay 16 eggs per day, and she eats three for breakfast"}
    text = "JANET'S  ducks lay １６ eggs\nper day -- and she eats **three** for breakfast"
    ((_, item, longest, coverage),) = found([text.replace("-- ", "")], items)
    assert (item, longest, coverage) == ("q", 13, 1.0)


def test_thirteen_words_are_a_stricter_measure_than_eight() -> None:
    ten = " ".join(QUESTION.split()[:10])
    assert found([ten], {"q": QUESTION}, ngram=8, min_coverage=0) == [(0, "q", 10, pytest.approx(10 / 25))]
    assert found([ten], {"q": QUESTION}, ngram=8) == []
    assert found([ten], {"q": QUESTION}, ngram=13, min_coverage=0) == []
    assert found([" ".join(QUESTION.split()[:13])], {"q": QUESTION}, ngram=13) == [(0, "q", 13, 13 / 25)]


def test_rows_are_removed_with_benchmark_item_coverage_and_the_longest_run_wins(
    toy_run: Callable[..., Run], rejections: Callable, tmp_path: Path
) -> None:
    other = "Half of it: " + " ".join(QUESTION.split()[:14]) + " and something else that nobody has asked before now"
    benchmark = tmp_path / "mine.jsonl"
    benchmark.write_text(json.dumps({"question": other, "answer": "1"}) + "\n" + json.dumps({"question": QUESTION, "answer": "2"}) + "\n")
    run = toy_run(
        [
            {"id": "asked", "prompt": f"Solve this. {QUESTION}", "response": "72"},
            {"id": "answered", "prompt": "Write a question.", "response": QUESTION},
            {"id": "clean", "prompt": "Write a question.", "response": "Who was Natalia?"},
            {"id": "empty", "prompt": "?!", "response": ""},
        ]
    )
    outcome = decontaminate(run, DecontaminateConfig(benchmarks=(str(benchmark),)))
    removed = ("contaminated:mine", 1.0, 0.5, "mine.jsonl:2")
    assert rejections(run, "decontaminate") == {"asked": removed, "answered": removed}
    assert outcome.removed == {"contaminated:mine": 2}
    report = pl.read_parquet(run.path / "curate" / "contamination.parquet")
    best = report.filter(pl.col("item") == "mine.jsonl:2")
    assert best["row"].to_list() == ["asked", "answered"]
    assert best["turn"].to_list() == [0, 1]
    assert set(best["longest"]) == {25}
    assert best["text"][0] == b" ".join(words(QUESTION)).decode()
    assert report["longest"].is_sorted(descending=True)
    decontaminate(run, DecontaminateConfig(benchmarks=(str(benchmark),), on="prompt"))
    assert set(rejections(run, "decontaminate")) == {"asked"}


def test_every_turn_is_looked_at(toy_run: Callable[..., Run], rejections: Callable) -> None:
    turns = [QUESTION, "I do not know.", "Try.", "No."]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    run = toy_run([{"id": "a", "messages": messages}])
    index = build_index("bench", [("q", QUESTION)])
    index.save(run.path / "bench.npz")
    decontaminate(run, DecontaminateConfig(benchmarks=("gsm8k",)))
    assert rejections(run, "decontaminate") == {}
    matcher = Matcher([index], 8, 0.5)
    assert [each.longest for each in matcher.find(turns, [True, False, True, False])] == [25]


def test_an_index_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftkit.curate import decontaminate as module

    monkeypatch.setattr(module, "BUNDLED", tmp_path)
    made = build_index("bench", [("a", QUESTION), ("b", "Name the boiling point of osmium"), ("c", "")])
    made.save(tmp_path / "bench.npz")
    read = open_benchmark("bench")
    assert isinstance(read, Index)
    assert read.items == ["a", "b", "c"]
    assert read.sizes.tolist() == [25, 6, 0]
    assert read.grams.values.tolist() == made.grams.values.tolist()
    assert read.whole.tolist() == made.whole.tolist()


def test_the_benchmarks_that_come_along_hold_hashes_and_no_text() -> None:
    assert bundled() == list(BUNDLED)
    sizes = {"gsm8k": 1319, "humaneval": 164, "ifeval": 541, "mmlu": 14042, "mt-bench": 160}
    assert {name: len(set(open_benchmark(name).items)) for name in BUNDLED} == sizes
    folder = Path(decontaminate.__code__.co_filename).parent / "data"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    assert b"Janet" not in (folder / "gsm8k.npz").read_bytes()


def test_every_item_of_the_shipped_benchmarks_is_found_when_copied(shared_data: Path) -> None:
    """Recall 1.0 on verbatim copies: of GSM8K, IFEval, HumanEval and MT-bench every item, of MMLU each question of one item alone."""

    def rows(name: str) -> list[dict]:
        with gzip.open(shared_data / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    asked = {
        "gsm8k": [row["question"] for row in rows("gsm8k/test.jsonl.gz")],
        "ifeval": [row["prompt"] for row in rows("ifeval/input_data.jsonl.gz")],
        "humaneval": [row["prompt"] for row in rows("humaneval/HumanEval.jsonl.gz")],
        "mt-bench": [text for row in rows("mt_bench/question.jsonl.gz") for text in row["turns"] if len(words(text)) > 2],
    }
    mmlu = [row for row in rows("mmlu/mmlu.jsonl.gz") if row["split"] == "test"]
    stems = [tuple(words(row["question"])) for row in mmlu]
    once = {stem for stem, count in Counter(stems).items() if count == 1}
    asked["mmlu"] = [row["question"] for row, stem in zip(mmlu, stems, strict=True) if stem in once and len(stem) > 2]
    assert len(asked["mmlu"]) > 13_500
    whole = ["\n".join(str(row[name]) for name in ("question", "A", "B", "C", "D")) for row in mmlu]
    asked["mmlu"] += [text for text, stem in zip(whole, stems, strict=True) if stem not in once and len(words(text)) >= 8]
    for name, texts in asked.items():
        matcher = Matcher([open_benchmark(name)], 8, 0.5)
        complete = {each.text for each in matcher.find(texts, [True] * len(texts)) if each.coverage == 1.0}
        assert [text for number, text in enumerate(texts) if number not in complete] == [], name


def test_little_of_alpaca_is_called_contaminated(shared_data: Path, tmp_path: Path) -> None:
    """3 of 18,669 rows when this was written, of which 1 is an item of MT-bench word for word."""
    from sftkit.curate.config import ImportConfig
    from sftkit.curate.intake import take_in

    with Run.create(tmp_path / "run") as run:
        take_in(shared_data / "alpaca_subset" / "alpaca_subset.jsonl.gz", run, ImportConfig(limit=6000))
        outcome = decontaminate(run, DecontaminateConfig())
    assert sum(outcome.removed.values()) <= 6


def test_a_build_decontaminates_before_it_deduplicates_unless_told_not_to(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "How do you like dancing? Can you teach me?", "completion": "Yes."}, {"prompt": "Prove it.", "completion": "No."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exact = DedupConfig(semantic=None)
    assert planned_stages(BuildConfig(dedup=exact)) == ["decontaminate", "dedup_exact"]
    result = build(data, tmp_path / "run", BuildConfig(dedup=exact))
    assert [(each.stage, each.removed) for each in result.outcomes] == [
        ("decontaminate", {"contaminated:mt-bench": 1}),
        ("dedup_exact", {}),
    ]
    off = build(data, tmp_path / "off", BuildConfig(dedup=exact, decontaminate=None))
    assert [each.stage for each in off.outcomes] == ["dedup_exact"]


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "How do you like dancing? Can you teach me?", "completion": "Yes."}\n{"prompt": "a", "completion": "b"}\n')
    result = CliRunner().invoke(sftkit, ["curate", "decontaminate", str(data), "-o", str(tmp_path / "run"), "--benchmark", "mt-bench"])
    assert result.exit_code == 0, result.output
    assert "contaminated:mt-bench 1" in result.output
    assert "1 row with an item of mt-bench" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_coverage": -0.5}, "min_coverage: expected a share between 0 and 1, found -0.5"),
        ({"ngram": 5}, "ngram: expected 8 words or more"),
        ({"benchmarks": ()}, "no benchmark is given"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecontaminateConfig(**settings)


def test_an_unknown_benchmark_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown benchmark 'gsm8': did you mean 'gsm8k'"):
        open_benchmark("gsm8")
    with pytest.raises(UserError, match="no such file"):
        open_benchmark(str(tmp_path / "none.jsonl"))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty; expected at least one row"):
        open_benchmark(str(tmp_path / "none.jsonl"))
    (tmp_path / "tiny.jsonl").write_text('{"prompt": "?!"}\n{"prompt": "one two"}\n')
    with pytest.raises(UserError, match="none of its 2 items has 3 words"):
        open_benchmark(str(tmp_path / "tiny.jsonl"))
