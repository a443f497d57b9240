"""Growing prompts: what is asked, what is kept and why not, whose child each is, and that the same call goes on."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from sftkit.cli import sftkit
from sftkit.core.chat import load_chat
from sftkit.core.config import load_config
from sftkit.core.engines.base import Completion, Request
from sftkit.core.errors import TooManyFailures, UserError
from sftkit.core.files import read_json_lines
from sftkit.core.formats import read_examples
from sftkit.core.models import resolve_model
from sftkit.core.ngrams import words
from sftkit.core.run import Run
from sftkit.core.store import SampleStore
from sftkit.curate import distill as distill_module
from sftkit.curate import show as show_module
from sftkit.curate.config import GrowConfig
from sftkit.curate.grow import GrowResult, grow
from sftkit.curate.growth import chunks, fault, pre_query, read_answer, read_passages
from sftkit.curate.rouge import RougePool, longest_common_subsequence

SEEDS = ["Name three rivers of Europe.", "Write a haiku about snow.", "Explain recursion to a child."]


class Teacher:
    """A server's engine whose answers a function writes; it remembers what it was asked."""

    identity, chat, context_length, steps = "openai:teacher", None, None, 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, write: Callable[[str, int], str]) -> None:
        self.asked: list[str] = []
        self.write = write
        self.stop_after: int | None = None
        self.cut = False
        monkeypatch.setattr(distill_module, "open_engine", lambda *arguments, **keywords: self)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(request.messages[-1]["content"])
            text = self.write(self.asked[-1], request.seed)
            if text == "fail":
                yield Completion(key=request.key, finish_reason="error", error="timed out")
            else:
                yield Completion(key=request.key, text=text, num_tokens=10, finish_reason="length" if self.cut else "stop")

    def close(self) -> None:
        pass


def config(**changes: Any) -> GrowConfig:
    server = {"engine": "openai", "base_url": "http://localhost:1/v1"}
    return load_config(GrowConfig, {"teacher": "m", "engine": server, **changes})


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in SEEDS))
    return path


def grown(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "curate" / "prompts.jsonl").read_text().splitlines()]


def texts(run: Path) -> list[str]:
    return [each["messages"][0]["content"] for each in grown(run)]


def rules(run: Path) -> list[tuple[str, str]]:
    return Run.open(run).ledger.read().select("action", "rule").rows()


def numbered(seed: int) -> str:
    """Return two tasks that no other seed gives."""
    chance = random.Random(seed)
    return "\n".join(f"{place}. Task: Compare {chance.randrange(10**9)} with {chance.randrange(10**9)} in words." for place in (1, 2))


def test_self_instruct_grows_from_seeds_and_from_what_grew(
    tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    teacher = Teacher(monkeypatch, lambda prompt, seed: numbered(seed))
    result = grow(seeds, tmp_path / "run", config(count=100, similarity=0.99))
    assert (result.prompts, result.rounds, len(teacher.asked)) == (100, 2, 64)
    assert all(seed in teacher.asked[0] for seed in SEEDS)
    assert "Here are 3 tasks" in teacher.asked[0]
    assert "Here are 5 tasks" in teacher.asked[40]  # two of the new ones are shown too
    assert "Write 8 new tasks" in teacher.asked[0]
    rows = grown(tmp_path / "run")
    ids = {each.id for each in read_examples(str(seeds))}
    assert set(rows[0]["meta"]["parents"]) == ids
    assert rows[-1]["meta"]["round"] == 1
    assert len({each["id"] for each in rows} & set(rows[-1]["meta"]["parents"])) == 2
    assert rows[0]["messages"][0]["content"].startswith("Compare ")  # without the number and the label
    ledger = Run.open(tmp_path / "run").ledger.read()
    assert ledger.height == 128
    assert ledger.filter(pl.col("action") == "kept")["witness_id"][0] == rows[0]["meta"]["parents"][0]
    assert ledger["rule"].value_counts().sort("rule").rows() == [("", 100), ("more_than_wanted", 28)]
    assert [each.id for each in read_examples(str(result.path))] == [each["id"] for each in rows]  # what distill reads

    parent, text = rows[0]["meta"]["parents"][0], rows[0]["messages"][0]["content"]
    for name in (rows[0]["id"], rows[0]["meta"]["answer"]):
        code, out, err = cli("curate", "why", name, tmp_path / "run")
        assert (code, out.splitlines()[1:]) == (0, ["  grow  kept", f"      it comes from {parent}"]), err
    assert cli("curate", "why", rows[0]["id"], tmp_path / "run")[1].startswith(f"{rows[0]['id']}: {text}")
    grandchild = next(each for each in rows if each["meta"]["parents"][0] not in ids)
    read: list[Path] = []
    monkeypatch.setattr(show_module, "read_json_lines", lambda path: read.append(path) or read_json_lines(path))
    assert f"it comes from {grandchild['meta']['parents'][0]}: Compare " in cli("curate", "why", grandchild["id"], tmp_path / "run")[1]
    assert len(read) == 1
    assert text in cli("curate", "show", tmp_path / "run")[1]


def test_an_interruption_costs_nothing_and_a_larger_count_goes_on(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(monkeypatch, lambda prompt, seed: numbered(seed))
    wanted = config(count=100, similarity=0.99)
    grow(seeds, tmp_path / "whole", wanted)
    teacher.asked, teacher.stop_after = [], 40
    with pytest.raises(KeyboardInterrupt):
        grow(seeds, tmp_path / "run", wanted)
    teacher.stop_after = None
    grow(seeds, tmp_path / "run", wanted)
    assert len(teacher.asked) == 64
    assert grown(tmp_path / "run") == grown(tmp_path / "whole")
    assert grow(seeds, tmp_path / "run", wanted).prompts == 100
    assert len(teacher.asked) == 64  # everything was there
    more = grow(seeds, tmp_path / "run", config(count=150, similarity=0.99))
    assert (more.prompts, len(teacher.asked)) == (150, 96)
    assert grown(tmp_path / "run")[:100] == grown(tmp_path / "whole")
    with pytest.raises(UserError, match=r"grow.per_ask was 8, now 4"):
        grow(seeds, tmp_path / "run", config(count=150, per_ask=4))


def test_what_is_left_out_has_its_reason(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "\n".join(
        [
            "Sure! Here they are:",
            "1. Name three rivers of Europa.",  # a seed, but for a word
            "2. Describe the image in a sentence.",
            "3. Explain.",
            "4. Tell a joke about [insert topic].",
            "5. List the moons of Mars",
            "   and say who found them.",
            "6) Write a poem with these words: " + "word " * 200,
            "7. Summarize what happens in the given prompt.",
            "8. Cut in the mid",
        ]
    )
    teacher = Teacher(monkeypatch, lambda prompt, seed: answer)
    teacher.cut = True
    result = grow(seeds, tmp_path / "run", config(count=10))
    assert texts(tmp_path / "run") == ["List the moons of Mars\n   and say who found them."]
    assert rules(tmp_path / "run")[:8] == [
        ("rejected", "duplicate"),
        ("rejected", "needs_media"),
        ("rejected", "too_short"),
        ("rejected", "placeholder"),
        ("kept", ""),
        ("rejected", "too_long"),
        ("rejected", "talks_of_itself"),
        ("rejected", "truncated"),
    ]
    ledger = Run.open(tmp_path / "run").ledger.read()
    first, again = ledger.row(0, named=True), ledger.row(8 + 4, named=True)
    assert first["witness_id"] == next(each.id for each in read_examples(str(seeds)))
    assert (first["score"], first["threshold"]) == (pytest.approx(0.8), 0.7)
    assert (again["rule"], again["score"], again["witness_id"]) == ("duplicate", 1.0, grown(tmp_path / "run")[0]["id"])
    assert result.rounds == 3  # two without a new prompt
    assert "of the 10 that were wanted: no more new ones came" in result.summary()


def test_an_answer_without_a_numbered_list_is_no_fault(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have another list, or none at all, of which nothing can be read."""
    said = iter(["I cannot think of any.", "- Name the longest rivers of Asia.\n* Explain what a thread is.", *["No."] * 1000])
    Teacher(monkeypatch, lambda prompt, seed: next(said))
    result = grow(seeds, tmp_path / "run", config(count=10))
    assert texts(tmp_path / "run") == ["Name the longest rivers of Asia.", "Explain what a thread is."]
    assert result.rejected["nothing_to_read"] == result.asked - 1


def test_evol_deepens_and_tries_again_what_was_not_kept(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(prompt: str, seed: int) -> str:
        parent = prompt.rpartition("Prompt:\n")[2]
        return "" if "haiku" in parent else f'#Rewritten Prompt#: "{parent} Also consider case {len(parent)}, as {parent[:6]} did."'

    teacher = Teacher(monkeypatch, write)
    result = grow(seeds, tmp_path / "run", config(method="evol", rounds=2, count=100))
    assert (result.prompts, len(teacher.asked)) == (4, 6)
    rows = grown(tmp_path / "run")
    first, second = rows[0], rows[2]
    assert first["messages"][0]["content"] == f"{SEEDS[0]} Also consider case {len(SEEDS[0])}, as {SEEDS[0][:6]} did."
    assert second["meta"]["parents"] == [first["id"]]
    assert second["meta"]["operation"] in {"constraint", "deepen", "concrete", "reasoning", "input", "breadth"}
    assert sum("haiku" in each for each in teacher.asked) == 2
    assert result.rejected == {"nothing_to_read": 2}


@pytest.mark.parametrize(("method", "each"), [("evol", 1), ("converse", 2)])
def test_no_more_is_asked_for_than_may_be_wanted(method: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Compare {random.Random(number).random()} with one."}) + "\n" for number in range(200)))
    teacher = Teacher(monkeypatch, lambda prompt, seed: f"A harder question number {seed}, longer than it was.")
    some = grow(path, tmp_path / "run", config(method=method, count=40, similarity=1.0))
    assert (some.prompts, some.asked, len(teacher.asked)) == (40, 40 * each, 40 * each)
    first = grown(tmp_path / "run")
    more = grow(path, tmp_path / "run", config(method=method, count=150, similarity=1.0))
    assert (more.prompts, len(teacher.asked)) == (150, 150 * each)
    assert grown(tmp_path / "run")[:40] == first
    left_out = {"more_than_wanted": 50} if method == "converse" else {}  # its seeds each have their row in the ledger
    assert more.rejected == left_out
    rest = grow(path, tmp_path / "run", config(method=method, count=180, similarity=1.0, budget_tokens=10 * len(teacher.asked)))
    assert (rest.prompts, rest.over_budget) == (150, True)
    assert "of the 180 that were wanted: a budget is used up" in rest.summary()


def test_a_request_that_does_not_fit_is_not_made(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("word " * 600, "Say hi to them.")))
    tiny = {"teacher": str(tiny_model), "engine": {"engine": "transformers", "device": "cpu"}, "max_new_tokens": 8}
    result = grow(path, tmp_path / "run", load_config(GrowConfig, {**tiny, "method": "evol", "rounds": 1}))
    assert (result.asked, result.failed, result.rejected["prompt_too_long"]) == (1, {}, 1)
    decided = Run.open(tmp_path / "run").ledger.read().filter(pl.col("rule") == "prompt_too_long")
    assert decided["score"][0] > decided["threshold"][0] == 512


def test_documents_give_questions_with_their_passage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# Bees\n\n" + "Bees dance. " * 30 + "\n\n# Ants\n\n" + "Ants march. " * 30)
    (folder / "deep" / "b.txt").write_text("Rust keeps water out.")
    (folder / "c.png").write_bytes(b"\x89PNG")
    teacher = Teacher(monkeypatch, lambda prompt, seed: "1. Why do bees dance?" if "Bees" in prompt else "1. What do ants do all day?")
    grow(folder, tmp_path / "run", config(method="documents", chunk_words=80, per_ask=2))
    assert len(teacher.asked) == 3
    assert [each["meta"]["parents"] for each in grown(tmp_path / "run")] == [["a.md#1"], ["a.md#2"]]
    assert rules(tmp_path / "run")[2] == ("rejected", "duplicate")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no text; expected a file, or a folder of \.txt, \.md"):
        grow(tmp_path / "empty", tmp_path / "other", config(method="documents"))


def test_a_conversation_goes_on_in_both_roles(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(prompt: str, seed: int) -> str:
        if prompt.startswith("Here is a conversation"):
            return "" if "haiku" in prompt else f"The user: And number {prompt.count('Assistant:')}?"
        return f"An answer to: {prompt}"

    teacher = Teacher(monkeypatch, write)
    wanted = config(method="converse", rounds=2)
    result = grow(seeds, tmp_path / "run", wanted)
    assert (result.prompts, result.rejected) == (2, {"empty": 1})
    row = grown(tmp_path / "run")[0]
    first = read_examples(str(seeds))[0]
    assert row["meta"]["parents"] == [first.id]
    assert [(each["role"], each["content"]) for each in row["messages"]] == [
        ("user", SEEDS[0]),
        ("assistant", f"An answer to: {SEEDS[0]}"),
        ("user", "And number 1?"),
        ("assistant", "An answer to: And number 1?"),
        ("user", "And number 2?"),
    ]
    assert Run.open(tmp_path / "run").ledger.read().select("example_id", "action", "rule").row(1) == (
        read_examples(str(seeds))[1].id,
        "rejected",
        "empty",
    )
    asked = len(teacher.asked)
    assert asked == 3 + 3 + 2 + 2 == result.asked
    grow(seeds, tmp_path / "run", wanted)
    assert len(teacher.asked) == asked  # all of it was stored
    follow_ups = [each for each in teacher.asked if each.startswith("Here is a conversation")]
    assert f"User: {SEEDS[0]}\n\nAssistant: An answer to: {SEEDS[0]}" in follow_ups[0]
    assert len({each.partition("in which the user ")[2].partition(".")[0] for each in follow_ups}) > 1
    teacher.cut = True
    assert grow(seeds, tmp_path / "cut", wanted).rejected == {"truncated": 3}
    with open(seeds, "a") as file:
        file.write(json.dumps({"prompt": " "}) + "\n")
    assert grow(seeds, tmp_path / "blank", wanted).rejected == {"truncated": 3, "blank_prompt": 1}


def test_failed_requests_are_counted(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Teacher(monkeypatch, lambda prompt, seed: "fail" if seed % 2 else numbered(seed))
    with pytest.raises(TooManyFailures, match="requests failed, most often with: timed out; what came is kept"):
        grow(seeds, tmp_path / "run", config(count=5, similarity=0.99))
    assert ("failed", "error: timed out") in rules(tmp_path / "run")
    assert len(grown(tmp_path / "run")) == 5


def test_a_budget_stops_it(tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(monkeypatch, lambda prompt, seed: numbered(seed))
    result = grow(seeds, tmp_path / "run", config(count=1000, similarity=0.99, budget_tokens=600, max_new_tokens=12))
    assert result.tokens == 10 * len(teacher.asked) <= 600
    assert result.prompts == 2 * len(teacher.asked)


def test_magpie_writes_what_a_user_would(tmp_path: Path, tiny_model: Path) -> None:
    chat = load_chat(resolve_model(str(tiny_model)))
    assert chat.decode(pre_query(chat)) in ("<|im_start|>user\n", "user\n")
    assert chat.tokenizer.decode(pre_query(chat)) == "<|im_start|>user\n"
    assert chat.tokenizer.decode(pre_query(chat, "Be brief.")) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    arguments = [
        "curate",
        "prompts",
        "-o",
        str(tmp_path / "run"),
        "--teacher",
        str(tiny_model),
        "--method",
        "magpie",
        "--engine",
        "transformers",
    ]
    arguments += ["--count", "5", "--max-new-tokens", "40", "--rounds", "3", "--temperature", "1.2"]
    said = CliRunner().invoke(sftkit, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    with SampleStore(tmp_path / "run" / "curate" / "samples.sqlite") as store:
        samples = store.frame()
    assert samples["text"].n_unique() > 20  # one prompt, many streams of random numbers
    assert set(texts(tmp_path / "run")) <= {text.strip() for text in samples["text"]} | {
        each for text in samples["text"] for each in read_answer(config(method="magpie"), text)
    }
    assert CliRunner().invoke(sftkit, arguments, catch_exceptions=False).stdout == said.stdout


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"method": "magpie"}, True, "magpie: writes prompts from nothing; leave the seeds out"),
        ({"method": "magpie"}, False, "magpie: a server renders for itself"),
        ({"method": "evol"}, False, "evol: needs seed prompts"),
        ({"method": "documents"}, False, "documents: needs files whose passages are asked about"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, seeds: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], source: bool, message: str
) -> None:
    Teacher(monkeypatch, lambda prompt, seed: "")
    with pytest.raises(UserError, match=message):
        grow(seeds if source else None, tmp_path / "run", config(**changes))
    for wrong, told in [
        ({"count": 0}, "count: expected 1 or more, found 0"),
        ({"similarity": 2}, "similarity: expected a ROUGE-L above 0"),
        ({"max_words": 2}, r"max_words: expected min_words \(3\) or more, found 2"),
    ]:
        with pytest.raises(UserError, match=told):
            config(**wrong)


def test_rouge_is_that_of_the_table(shared_data: Path) -> None:
    """Against the textbook's table of prefixes, and against comparing with every text."""
    chance = random.Random(3)

    def table(left: list[bytes], right: list[bytes]) -> int:
        before = [0] * (len(right) + 1)
        for word in left:
            row = [0]
            for place, other in enumerate(right):
                row.append(before[place] + 1 if word == other else max(before[place + 1], row[place]))
            before = row
        return before[-1]

    for _ in range(300):
        left, right = ([bytes([chance.randrange(97, 103)]) for _ in range(chance.randrange(1, 90))] for _ in range(2))
        assert longest_common_subsequence(left, right) == table(left, right)

    every = [
        each.messages[0]["content"] for each in read_examples(str(shared_data / "self_instruct" / "user_oriented_instructions.jsonl.gz"))
    ]
    pool, kept = RougePool(0.45), []
    for number, text in enumerate(every[:150]):
        mine = words(text)
        scores = [(2 * table(mine, theirs) / (len(mine) + len(theirs)), name) for name, theirs in kept]
        best = max((score for score, _ in scores), default=0.0)
        found = pool.like(text)
        assert (found is not None) == (best >= 0.45)
        if found:
            assert found[1] == pytest.approx(best)
        pool.add(str(number), text)
        kept.append((str(number), mine))


def test_passages_keep_paragraphs_whole(tmp_path: Path) -> None:
    text = "# One\n\n" + "a " * 50 + "\n\n" + "b " * 60 + "\n\n# Two\n\n" + "c " * 230
    found = chunks(text, 100)
    assert [len(each.split()) for each in found] == [52, 60, 102, 100, 30]
    assert found[0].startswith("# One")
    assert found[2].startswith("# Two")
    assert " ".join(found).split() == text.split()  # nothing is lost
    (tmp_path / "x.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_passages(tmp_path / "x.md", 100)


def test_chinese_is_cut_into_passages_of_the_size_asked_for(tmp_path: Path) -> None:
    """Each character counts as a word: between spaces there are whole paragraphs."""
    long = "人工智慧正在改變世界。" * 60
    text = "\n\n".join(["# 標題", long, *(f"第{number}句話說明一件事情。" for number in range(40))])
    (tmp_path / "x.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = [each.text for each in read_passages(tmp_path / "x.md", 100)]
    assert len(found) > 10
    assert max(map(len, found)) < 140
    assert found[0].startswith("# 標題\n\n人工")
    assert "".join("".join(found).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("answer", "prompts"),
    [
        ("1、《紅樓夢》的作者是誰？\n2、「一帶一路」是什麼？", ["《紅樓夢》的作者是誰？", "「一帶一路」是什麼？"]),
        ("1.什麼是量子力學？\n2.圓周率是3.14嗎？\n", ["什麼是量子力學？", "圓周率是3.14嗎？"]),
        ("（1）什麼是量子力學？\n（2）請寫一首詩。", ["什麼是量子力學？", "請寫一首詩。"]),
        ("1. “海底撈”是什麼意思？\n2. “什麼是量子力學？”", ["“海底撈”是什麼意思？", "什麼是量子力學？"]),
        ('1. "Rest" or "rust"?\n2. "What is rust?"\n', ['"Rest" or "rust"?', "What is rust?"]),
        ("1. Which number is larger,\n3.5 or 3.50?", ["Which number is larger,\n3.5 or 3.50?"]),
        ("1. Solve for x:\n(1) 2x = 5\n   (2) 3x = 8\n2. Name a river.", ["Solve for x:\n(1) 2x = 5\n   (2) 3x = 8", "Name a river."]),
        ("1、回答：\n（1）誰寫的？\n（2）何時？\n2、寫一首詩。", ["回答：\n（1）誰寫的？\n（2）何時？", "寫一首詩。"]),
        ("1. 安排行程：\n10：30 開會\n2. 寫一首詩。", ["安排行程：\n10：30 開會", "寫一首詩。"]),
        ("1：安排行程：\n10：30 開會\n2：寫一首詩。", ["安排行程：\n10：30 開會", "寫一首詩。"]),
        ("1、5加3等於多少？\n2、12減4等於多少？", ["5加3等於多少？", "12減4等於多少？"]),
        ("1、總結：\n2024、2025 年的銷售\n2、寫一首詩。", ["總結：\n2024、2025 年的銷售", "寫一首詩。"]),
        ("* 回答：\n- 誰寫的？", ["回答：", "誰寫的？"]),
    ],
)
def test_prompts_are_read_as_they_were_written(answer: str, prompts: list[str]) -> None:
    found = read_answer(config(), answer)
    assert found == prompts
    assert [fault(config(), each, 9) for each in found] == [None] * len(found)


def test_the_seed_tasks_of_self_instruct_can_be_read(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Teacher(monkeypatch, lambda prompt, seed: numbered(seed))
    result: GrowResult = grow(shared_data / "self_instruct" / "seed_tasks.jsonl.gz", tmp_path / "run", config(count=10, similarity=0.99))
    assert result.prompts == 10
    assert all(len(each["meta"]["parents"]) == 6 for each in grown(tmp_path / "run"))
