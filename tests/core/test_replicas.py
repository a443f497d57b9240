"""Engines in processes of their own: the same answers, and a run that finishes although they die, hang and are killed."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from sftkit.core.engines import replicas
from sftkit.core.engines.base import ChoiceRequest, Completion, EngineConfig, EngineDied, Request, Sampling, ScoreRequest, choice_logprobs
from sftkit.core.engines.loading import start
from sftkit.core.engines.ray_replicas import check_address
from sftkit.core.engines.registry import open_engine
from sftkit.core.engines.replicas import Replicas
from sftkit.core.errors import UserError

SAMPLING = Sampling(temperature=0.8, max_new_tokens=12)
Open = Callable[..., Replicas]


def config(**changes: object) -> EngineConfig:
    return EngineConfig(**{"engine": "transformers", "dtype": "float32", "device": "cpu", "replicas": 1, "batch_tokens": 256, **changes})


def requests(count: int) -> list[Request]:
    """Return prompts of ten tokens; the first one is the number of the request, from 300."""
    return [
        Request(key=str(number), prompt_ids=(300 + number, *range(5, 14)), messages=[], sampling=SAMPLING, seed=number)
        for number in range(count)
    ]


@pytest.fixture
def poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "poison"
    path.write_text("")
    monkeypatch.setenv("SFTKIT_TEST_POISON", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return path


@pytest.fixture
def poisoned(poison: Path) -> Iterator[Open]:
    opened: list[Replicas] = []

    def make(**changes: object) -> Replicas:
        opened.append(Replicas("poisoned_engine", "model", config(**changes), revision=None, chat=None))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
    assert_no_process_left()


def assert_no_process_left() -> None:
    left = [each for each in psutil.Process().children(recursive=True) if "sftkit.core.engines.worker" in " ".join(each.cmdline())]
    assert left == []


def by_key(completions: Iterator[Completion]) -> dict[str, Completion]:
    found = list(completions)
    assert len(found) == len({each.key for each in found})  # none twice
    return {each.key: each for each in found}


def pids(engine: Replicas) -> list[int]:
    return [each._popen.pid for each in engine._processes if each]


def test_two_processes_give_the_answers_of_one(tiny_model: Path) -> None:
    """All 103: open-instruct gives each of its workers equally many, scores 96 of 103 on 8, and stops at its own assertion."""
    wanted = requests(103)
    with closing(open_engine(str(tiny_model), config(replicas=None))) as alone:
        expected = by_key(alone.generate(wanted))
        scores = [ScoreRequest(key=each.key, ids=each.prompt_ids, start=3) for each in wanted]
        scored = {each.key: each.logprobs for each in alone.logprobs(scores)}
        choices = [ChoiceRequest(key=each.key, ids=each.prompt_ids, choices=(5, 9, 300)) for each in wanted]
        chosen = {each.key: each.logprobs for each in choice_logprobs(alone, choices)}
        identity = alone.identity
    with closing(open_engine(str(tiny_model), config(replicas=2))) as engine:
        assert isinstance(engine, Replicas)
        assert (engine.identity, engine.context_length) == (identity, 512)
        found = by_key(engine.generate(wanted))
        assert {key: (each.text, each.finish_reason, each.num_tokens) for key, each in found.items()} == {
            key: (each.text, each.finish_reason, each.num_tokens) for key, each in expected.items()
        }
        assert list(engine.generate([])) == []
        again = {each.key: each.logprobs for each in engine.logprobs(scores)}
        assert {key: pytest.approx(values, abs=1e-4) for key, values in scored.items()} == again
        again = {each.key: each.logprobs for each in choice_logprobs(engine, choices)}
        assert {key: pytest.approx(values, abs=1e-4) for key, values in chosen.items()} == again
    assert_no_process_left()


def test_a_killed_process_is_started_again_and_nothing_is_lost_or_made_twice(tiny_model: Path) -> None:
    with closing(open_engine(str(tiny_model), config(replicas=2))) as engine:
        assert isinstance(engine, Replicas)
        wanted = requests(150)
        expected = by_key(engine.generate(wanted))
        before, found = pids(engine), []
        for number, completion in enumerate(engine.generate(wanted)):
            found.append(completion)
            if number == 20:
                os.kill(before[0], signal.SIGKILL)
        again = by_key(iter(found))
        assert {key: each.text for key, each in again.items()} == {key: each.text for key, each in expected.items()}
        assert before[1] in pids(engine)  # the other one went on
    assert_no_process_left()


def test_one_death_blames_nobody(poison: Path, poisoned: Open) -> None:
    engine = poisoned()
    poison.write_text("once 310")
    found = by_key(engine.generate(requests(30)))
    assert {key: each.text for key, each in found.items()} == {str(number): str(300 + number) for number in range(30)}
    assert poison.with_suffix(".log").read_text() == "once 10\n"


@pytest.mark.parametrize(
    ("what", "ending"), [("kill", r"was killed \(SIGKILL\)"), ("raise", r"stopped \(RuntimeError: a fault of the device\)")]
)
def test_the_request_at_which_an_engine_dies_is_found_and_fails_alone(
    poison: Path, poisoned: Open, what: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = poisoned()
    poison.write_text(f"{what} 317\n{what} 341")
    found = by_key(engine.generate(requests(60)))
    failed = {key: each.error for key, each in found.items() if each.error}
    assert sorted(failed) == ["17", "41"]
    for error in failed.values():
        assert re.fullmatch(rf"the engine {ending} each of the \d+ times it answered this request", error or "")
    assert Counter(poison.with_suffix(".log").read_text().split("\n"))[f"{what} 17"] <= 4
    assert by_key(engine.generate(requests(5))).keys() == {"0", "1", "2", "3", "4"}  # and it still works


def test_an_engine_that_hangs_is_dumped_and_started_again(poison: Path, poisoned: Open, capfd: pytest.CaptureFixture[str]) -> None:
    engine = poisoned(stall_seconds=2)
    poison.write_text("hang 303")
    (found,) = engine.generate(requests(4)[3:])  # alone, it is found at the second death
    assert found.error == "the engine gave no token for 2 s each of the 2 times it answered this request"
    assert by_key(engine.generate(requests(3))).keys() == {"0", "1", "2"}
    said = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in said  # where every thread stood
    assert "poisoned_engine.py" in said


def test_an_engine_that_always_dies_is_given_up(poison: Path, poisoned: Open) -> None:
    engine = poisoned()
    poison.write_text("\n".join(f"kill {number}" for number in range(300, 340)))
    with pytest.raises(EngineDied, match=r"its engine was killed \(SIGKILL\), the 9th in a row without an answer"):
        list(engine.generate(requests(40)))


def test_what_an_engine_refuses_is_the_users(poison: Path, poisoned: Open) -> None:
    engine = poisoned()
    poison.write_text("refuse 302")
    with pytest.raises(UserError, match=r"^these settings are not taken$"):
        list(engine.generate(requests(4)))


def test_an_engine_that_cannot_start_is_said_at_once(poison: Path, poisoned: Open, tiny_model: Path, tmp_path: Path) -> None:
    poison.write_text("no start")
    with pytest.raises(EngineDied, match=r"its engine was killed \(SIGSEGV\) while it started"):
        poisoned()
    with pytest.raises(UserError, match=r"device cuda: this machine has no usable GPU"):
        open_engine(str(tiny_model), config(device="cuda"))  # said by the process, raised here
    assert_no_process_left()


def test_an_engine_that_dies_while_it_starts_is_started_again_and_that_is_said(
    poison: Path, poisoned: Open, caplog: pytest.LogCaptureFixture
) -> None:
    poison.write_text("no start once")
    engine = poisoned(replicas="2")
    engine.wait_for_all()
    assert "model: an engine was killed (SIGSEGV) while it started; it is started again" in caplog.text
    assert sum(each.ready is not None for each in engine._processes if each) == 2


def test_an_engine_that_hangs_while_it_starts_is_not_waited_for(poison: Path, poisoned: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "SECONDS_TO_START", 1.0)
    poison.write_text("never starts")
    with pytest.raises(EngineDied, match=r"^model: its engine gave no sign for 1 s while it started$"):
        poisoned()
    assert_no_process_left()


def test_processes_end_with_the_one_that_feeds_them(poison: Path) -> None:
    """Killed in the middle of its work: nobody is left to hold a GPU's memory."""
    script = """
import os, sys
from itertools import count
from sftkit.core.engines.base import EngineConfig, Request, Sampling
from sftkit.core.engines.replicas import Replicas
engine = Replicas("poisoned_engine", "model", EngineConfig(device="cpu", replicas=2), revision=None, chat=None)
print(*[each._popen.pid for each in engine._processes], flush=True)
wanted = (Request(key=str(n), prompt_ids=(n % 99,), messages=[], sampling=Sampling(), seed=n) for n in count())
for number, _ in enumerate(engine.generate(wanted)):
    if number == 100:
        print("at work", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout
    workers = [psutil.Process(int(each)) for each in process.stdout.readline().split()]
    assert process.stdout.readline() == "at work\n"
    process.kill()
    process.wait()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def test_left_early_it_forgets_what_it_was_asked(poisoned: Open) -> None:
    engine = poisoned()
    stream = engine.generate(requests(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wanted = requests(3)
    assert by_key(engine.generate([*wanted])).keys() == {"0", "1", "2"}


def test_out_of_memory_at_its_start_it_is_tried_once_with_less(
    poison: Path, poisoned: Open, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    poison.write_text("no memory 0.8")
    poisoned()
    told = "the model: cannot start with it; memory may be the reason: trying once more, with 0.77 of the card's instead of 0.90"
    assert told in capfd.readouterr().err  # the process says it
    with closing(start("poisoned_engine", "model", config())) as engine:
        assert engine.identity == "poisoned"
    assert told in caplog.text
    poison.write_text("no memory 0.5")
    with pytest.raises(UserError, match=r"^the model: cannot start with it$"):
        poisoned()
    assert capfd.readouterr().err.count("trying once more") == 1


@pytest.mark.parametrize("count", ["0", "many", "1.5", -1])
def test_how_many_there_can_be_is_said_before_anything_is_read(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, count: object
) -> None:
    with pytest.raises(UserError, match="replicas: expected a whole number from 1, or auto"):
        config(replicas=count)
    asked = ("curate", "distill", tmp_path / "nowhere.jsonl", "--teacher", "nobody/nothing", "-o", tmp_path / "run", "--replicas", count)
    code, _, told = cli(*asked)
    assert (code, told.count("\n")) == (1, 1)
    assert f"replicas: expected a whole number from 1, or auto (one for each GPU), found '{count}'" in told
    assert not (tmp_path / "run").exists()


def test_an_address_of_ray_where_nobody_listens_is_told_at_once() -> None:
    for address in ("", "auto", "local"):
        check_address(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:70000"):
        with pytest.raises(UserError, match=rf"ray: nobody listens at {address} \(.*\); start a cluster there with `ray start`"):
            check_address(address)
