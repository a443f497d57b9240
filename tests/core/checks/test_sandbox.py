"""Untrusted programs: what they try is stopped and named, and honest ones pass their tests."""

import errno
import platform
import time
from pathlib import Path

import pytest
from sftkit.core.checks import sandbox
from sftkit.core.checks.code import Verdict, cut_completion, extract_program, run_tests
from sftkit.core.checks.sandbox import Limits, Order, Outcome, available, run
from sftkit.core.checks.seccomp import CALLS
from sftkit.core.errors import UserError

REASON = available()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LIMITS = Limits(cpu_seconds=2, seconds=60.0, memory_mb=512)
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(31) == 4711\n"


def alone(source: str, limits: Limits = LIMITS) -> Outcome:
    return run([Order(source)], limits)[0]


def tried(outcome: Outcome | Verdict) -> set[str]:
    return {each.partition(":")[0] for each in outcome.attempts}


def processes_with(word: str) -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(each)] if word in each.read_text(errors="replace") else []
        except OSError:  # it has just ended
            continue
    return found


@needs_sandbox
def test_the_network_is_not_there() -> None:
    outcome = alone("import urllib.request\nurllib.request.urlopen('http://192.0.2.7/')")
    assert outcome.ended == "error"
    assert "unreachable" in outcome.message
    assert "network" in tried(outcome)


@needs_sandbox
def test_files_outside_are_not_there(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outcome = alone(f"print(open({str(secret)!r}).read())")
    assert outcome.ended == "error"
    assert outcome.message.startswith("FileNotFoundError")
    assert outcome.attempts == (f"files: read {secret}",)
    hidden = alone("import os\nprint(os.environ, [os.listdir(each) for each in ('/root', '/home', '/etc') if os.path.isdir(each)])")
    assert "sftkit" not in hidden.output
    assert "files" in tried(hidden)


@needs_sandbox
def test_a_fork_bomb_is_counted() -> None:
    outcome = alone("import os\nwhile True:\n    os.fork()")
    assert outcome.ended == "error"
    assert outcome.message.startswith("BlockingIOError")
    assert "processes" in tried(outcome)


@needs_sandbox
def test_a_memory_bomb_is_refused() -> None:
    outcome = alone("held = []\nwhile True:\n    held.append(bytearray(1 << 24))")
    assert (outcome.ended, outcome.message) == ("memory", "MemoryError")
    assert "limits: ran out of memory" in outcome.attempts


@needs_sandbox
def test_the_memory_of_all_processes_together_is_bounded_and_what_they_share_counts_once() -> None:
    limits = Limits(cpu_seconds=20, seconds=60.0, memory_mb=512, together_mb=300)
    hold = "held = b'x' * (120 << 20)\n"
    fork = "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        break\n"
    close = "for number in range(64):\n    try:\n        os.close(number)\n    except OSError:\n        pass\n"
    outcome = alone(fork + hold + "time.sleep(1000)", limits)
    assert (outcome.ended, outcome.message) == ("memory", "ran out of memory")
    assert "limits: ran out of memory" in outcome.attempts
    assert alone(fork + close + hold + "time.sleep(1000)", limits).ended == "memory"  # with nothing left that it could write to
    assert alone(hold + fork + "time.sleep(0.5)", limits).ended == "done"


@needs_sandbox
def test_memory_that_no_process_owns_is_refused_and_so_are_the_key_rings_and_a_sandbox_of_its_own() -> None:
    _, clone, _, numbers = CALLS[platform.machine()]
    outcome = alone(
        "import ctypes, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "def tell(name, result): print(name, result, ctypes.get_errno())\n"
        "tell('shmget', c.shmget(0, 1 << 20, 0o1600))\n"
        "tell('unshare', c.unshare(0x10000000))\n"
        "tell('memfd', c.memfd_create(b'x', 0))\n"
        "tell('mount', c.mount(b't', b'/tmp', b'tmpfs', 0, b''))\n"
        f"tell('keyctl', c.syscall({numbers['keyctl']}, 0, -3, 0))\n"
        f"tell('clone', c.syscall({clone}, 0x10000011, 0, 0, 0, 0))\n"
        "import subprocess\n"
        "print(subprocess.run(['/bin/sh', '-c', 'exit 3']).returncode)\n"
    )
    assert outcome.output.splitlines() == [
        *(f"{name} -1 {errno.EPERM}" for name in ("shmget", "unshare", "memfd", "mount", "keyctl", "clone")),
        "3",
    ], outcome


@needs_sandbox
def test_endless_loops_end() -> None:
    busy = alone("while True:\n    pass", Limits(cpu_seconds=1))
    assert (busy.ended, tried(busy)) == ("time", {"limits"})
    asleep = alone("import time\ntime.sleep(1e6)", Limits(seconds=1.0))
    assert (asleep.ended, tried(asleep)) == ("time", {"limits"})


@needs_sandbox
@pytest.mark.parametrize(
    "reader",
    [
        "import sys\n    frame = sys._getframe()\n    while frame:\n        assert '4711' not in str(frame.f_code.co_consts)\n        frame = frame.f_back",
        "import gc\n    for each in gc.get_objects():\n        assert '4711' not in (each if isinstance(each, str) and 'candidate(' in each else '')",
        "import glob, os\n    [open(each).read() for each in glob.glob('/proc/*/environ') + glob.glob('/tmp/*') + ['tests.py']]",
        "import os, signal\n    os._exit(0)",
    ],
)
def test_the_tests_cannot_be_read_nor_passed_over(reader: str) -> None:
    verdict = run_tests(f"def f(x):\n    {reader}\n    return 4", TESTS, entry_point="f", limits=LIMITS)
    assert not verdict.passed
    assert verdict.ended in ("wrong", "error", "ended")
    if "4711" not in reader:  # it did not get past its own reading
        assert verdict.ended in ("error", "ended")
    if "gc" in reader:
        assert "interpreter" in tried(verdict)
    if "glob" in reader:
        assert "files" in tried(verdict)


@needs_sandbox
def test_huge_output_is_cut() -> None:
    outcome = alone("while True:\n    print('x' * 10_000)")
    assert outcome.ended == "output"
    assert len(outcome.output) <= 2_000
    assert "limits: wrote too much" in outcome.attempts


@needs_sandbox
def test_its_parent_and_all_others_stay_alive() -> None:
    outcome = alone("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)\nprint('alone')")
    assert "signals" in tried(outcome)
    assert outcome.ended in ("done", "error")


@needs_sandbox
def test_the_interpreter_cannot_be_changed() -> None:
    packages = Path(sandbox.__file__)
    outcome = alone(
        "import os, sysconfig\n"
        "for folder in (sysconfig.get_paths()['purelib'], sysconfig.get_paths()['stdlib'], '/usr/lib', '/dev/shm', '/'):\n"
        "    try:\n"
        "        open(os.path.join(folder, 'planted.pth'), 'w').write('x')\n"
        "        print('wrote in', folder)\n"
        "    except OSError as error:\n"
        "        print(error.strerror)\n"
    )
    assert outcome.ended == "done", packages
    assert "wrote in" not in outcome.output
    assert "files" in tried(outcome)
    assert any("planted.pth" in each for each in outcome.attempts)


@needs_sandbox
def test_what_it_starts_dies_with_it() -> None:
    outcome = alone("import subprocess\nsubprocess.Popen(['/usr/bin/sleep', '98765.0123'], start_new_session=True)\nprint('gone')")
    assert (outcome.ended, outcome.output) == ("done", "gone\n")
    assert "processes" in tried(outcome)
    deadline = time.monotonic() + 60
    while processes_with("98765.0123") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_with("98765.0123") == []


@needs_sandbox
def test_a_silent_child_that_holds_the_output_open_does_not_hold_us_up() -> None:
    outcome = alone("import os, time\nif os.fork() == 0:\n    time.sleep(1e6)\nprint('gone')")
    assert outcome.output == "gone\n"


VECTOR = """
class V:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
    def __add__(self, other): return V(self.x + other.x)
    def __neg__(self): return V(-self.x)
"""
BETWEEN = "TypeError: '{}' not supported between instances of 'Remote' and 'Remote'"
YES = """
class Yes:
    def __eq__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __sub__(self, other): return self
    def __abs__(self): return 0
def f(x): return [Yes() for _ in x] if isinstance(x, list) else Yes()
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "tests", "entry_point", "ended", "message"),
    [
        ("def f(x): return 2 * x if x < 9 else 4711", TESTS, "f", "passed", ""),
        ("def f(x): return 4", TESTS, "f", "wrong", "AssertionError"),
        ("def g(x): return 4", TESTS, "f", "wrong", "AssertionError: the program defines no f"),
        ("def f(x) return 4", TESTS, "f", "syntax", "SyntaxError: expected ':' (<program>, line 1)"),
        ("def f(x): raise KeyError('a')", TESTS, "f", "error", "KeyError: \"'a'\""),
        ("1/0", TESTS, "f", "error", "ZeroDivisionError: division by zero"),
        ("def f(x):\n    while True: pass", TESTS, "f", "time", "ran out of time"),
        ("def f(x): return bytearray(1 << 40)", TESTS, "f", "memory", "MemoryError"),
        ("def f(x):\n    while True: print('x' * 9999)", TESTS, "f", "output", "wrote too much"),
        ("  ", TESTS, "f", "no_code", "the answer has no program"),
        ("def add(a, b): return a + b", "assert add(1, 2) == 3\nassert add([1], b=[2]) == [1, 2]", None, "passed", ""),
        ("def add(a, b): return a - b", "assert add(1, 2) == 3, 'adds'", None, "wrong", "AssertionError: adds"),
        ("def sort(x): x.sort()", "a = [3, 1]\nsort(a)\nassert a == [1, 3]", None, "passed", ""),
        ("def up(n):\n    yield from range(n)", "assert list(up(3)) == [0, 1, 2]", None, "passed", ""),
        (
            "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def __len__(self): return len(self.items)",
            "def test_push():\n    s = Stack()\n    s.push(1)\n    assert len(s) == 1 and s.items == [1]",
            None,
            "passed",
            "",
        ),
        ("def f(x): raise ValueError('no')", "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'", None, "passed", ""),
        ("def f(): return {1: (2.5, None), 'a': {1, 2}, b'x': float('inf')}", "assert f() == {1: (2.5, None), 'a': {1, 2}, b'x': float('inf')}", None, "passed", ""),
        ("def f(x): return 0\ndef abs(x): return 0", "def check(candidate):\n    assert abs(candidate(1) - 5) < 1e-6", "f", "wrong", "AssertionError"),
        ("def f(x): return 0\ndef abs(x): return 0", "assert abs(f(1) - 5) < 1e-6", None, "wrong", "AssertionError"),
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", None, "passed", ""),
        ("__builtins__ = {'abs': len}\ndef f(x): return 0", "assert abs(f(1) - 5) < 1e-6", "f", "wrong", "AssertionError"),
        ("def f(x): return 0\ndef test_f(): pass", "def test_f():\n    assert f(1) == 5", None, "wrong", "AssertionError"),
        ("def f(x): return 0\ndef check(x): pass", "assert f(1) == 5", "f", "wrong", "AssertionError"),
        ("def f(x): return 1", "assert f(1) == 1", "f", "passed", ""),
        ("class Node: pass\ndef f(x): return Node()", "assert f(1)", "f", "passed", ""),
        ("class Empty:\n    def __len__(self): return 0\ndef f(x): return Empty()", "assert f(1)", "f", "wrong", "AssertionError"),
        (
            "def f(x): return 0",
            "import unittest\nclass Tests(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 5)",
            None,
            "wrong",
            "AssertionError: the tests check nothing: they are no asserts on what the program defines, test_* or check(candidate)",
        ),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()\ndef f(x): return 1", "assert f(1) == 1", "f", "passed", ""),
        ("class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()", "assert f(1) == 3", None, "wrong", "AssertionError"),
        (VECTOR, "assert (V(1) + V(2)).x == 3 and V(1) < V(2) and -V(1) == V(-1) and sorted([V(2), V(1)])[0].x == 1", None, "passed", ""),
        (VECTOR, "assert V(1) + V(2) == V(4)", None, "wrong", "AssertionError"),
        (VECTOR, "def check(candidate):\n    a = candidate(1)\n    a += candidate(2)\n    assert a == candidate(3)", "V", "passed", ""),
        ("import enum\nclass Color(enum.Enum):\n    RED = 1", "assert Color.RED == Color.RED", None, "passed", ""),
        (YES, "out = f([3, 1, 2])\nassert len(out) == 3 and all(a <= b for a, b in zip(out, out[1:]))", None, "error", BETWEEN.format("<=")),
        (YES, "out = f([3, 1, 2])\nassert sorted(out) == out", None, "error", BETWEEN.format("<")),
        (YES, "assert f(2) > f(1)", None, "error", BETWEEN.format(">")),
        (YES, "assert abs(f(2) - f(1)) < 1e-6", None, "error", "TypeError: unsupported operand type(s) for -: 'Remote' and 'Remote'"),
        (YES.replace("def f(x): return", "class f:\n  def __new__(cls, x): return"), "assert f(2) > f(1)", None, "error", BETWEEN.format(">")),
        (YES + "Counter = Yes", "from collections import Counter\nassert Counter([1]) and f(2) > f(1)", None, "error", BETWEEN.format(">")),
        (
            "class Yes:\n    def __sub__(self, other): return self\n    def __abs__(self): return 0\ndef f(x): return Yes()",
            "assert abs(f(1) - 3) < 1e-6",  # the other side of the minus is what the program should not see
            None,
            "error",
            "TypeError: unsupported operand type(s) for -: 'Remote' and 'int'",
        ),
    ],
)  # fmt: skip
def test_verdicts(program: str, tests: str, entry_point: str | None, ended: str, message: str) -> None:
    verdict = run_tests(program, tests, entry_point=entry_point, limits=LIMITS)
    assert (verdict.ended, verdict.message) == (ended, message)
    assert verdict.passed == (ended == "passed")


def test_without_a_sandbox_nothing_runs_unless_one_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._mode.cache_clear()
    try:
        assert available() == "bubblewrap is not installed: apt-get install bubblewrap (Linux)"
        with pytest.raises(UserError, match="untrusted programs are not run: bubblewrap is not installed"):
            run_tests("x = 1", "assert x == 1")
        assert run_tests("x = 1", "assert x == 1", unsafe=True).passed
        assert run_tests("x = 2", "assert x == 1", unsafe=True).ended == "wrong"
    finally:
        sandbox._mode.cache_clear()


@pytest.mark.parametrize(
    ("answer", "prompt", "entry_point", "program"),
    [
        ("Here:\n```python\ndef f(x):\n    return 1\n```\nDone.", "", "f", "def f(x):\n    return 1\n"),
        ("```\na = 1\n```\nand\n```python\nb = 2\n```", "", None, "a = 1\n\nb = 2\n"),
        ("```python\ndef f(x):\n    return 1\n```\nlike\n```python\nf(3)\n```", "import re\n\ndef f(x):\n    'd'\n", "f", "import re\n\n\ndef f(x):\n    return 1\n"),
        ("    return 1\n\ndef g():\n    pass", "def f(x):\n", "f", "def f(x):\n    return 1\n"),
        ("```python\nreturn 1\n```", "def f(x):\n", "f", "def f(x):\n\n    return 1\n"),
        ("```python\ndef f(x):\n    return 1", "", "f", "def f(x):\n    return 1"),
        ("```bash\npip install x\n```\n```py\ndef f(): pass\n```", "", "f", "def f(): pass\n"),
        ("", "", "f", ""),
        ("def f(x):\n    return 1", "def f(x):\n    'doc'\n", "f", "\ndef f(x):\n    return 1"),
    ],
)  # fmt: skip
def test_programs_are_found_in_answers(answer: str, prompt: str, entry_point: str | None, program: str) -> None:
    assert extract_program(answer, prompt=prompt, entry_point=entry_point) == program


def test_a_completion_ends_with_its_function() -> None:
    assert cut_completion("    return 1\n\nprint(2)") == "    return 1\n"
    assert cut_completion("    return 1\n# next\n") == "    return 1"
    assert cut_completion("    a = 1\n\n    return a") == "    a = 1\n\n    return a"


def test_bubblewrap_is_found_anywhere_on_the_path_and_what_it_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "bwrap"
    mine.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._mode.cache_clear()
    try:
        assert "cannot make a sandbox on this machine (it ended by itself, with exit code 1: bwrap: No perm" in str(available())
    finally:
        sandbox._mode.cache_clear()
