"""Programs in answers: found in the text, and run against unit tests that they cannot read."""

import re
from dataclasses import dataclass

from .sandbox import Limits, Order, run

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# where a completion has gone on to something else: code at the margin after the function
NEXT = re.compile(r"\n(?:class\b|if __name__|print\(|#|@|```|<\|?\w+\|?>|[\"'])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program passed its tests, and how it ended: passed, wrong, error, syntax, ended, time, memory, output, no_code.

    `attempts` names what it tried beyond computing: network, files, processes, signals, interpreter, limits.
    """

    passed: bool
    ended: str
    message: str = ""
    attempts: tuple[str, ...] = ()


def run_tests(program: str, tests: str, *, entry_point: str | None = None, limits: Limits | None = None, unsafe: bool = False) -> Verdict:
    """Run a program and its tests in two sandboxes; only the sandbox of the tests says what passed.

    Tests are plain asserts on what the program defines, functions test_*, or `check(candidate)` for an entry point, as in
    HumanEval. Raises UserError where there is no sandbox, unless `unsafe`.
    """
    if not program.strip():
        return Verdict(False, "no_code", "the answer has no program")
    candidate, tested = run([Order(program, "candidate"), Order(tests, "tests", entry_point)], limits, unsafe=unsafe)
    if tested.ended == "done":
        return Verdict(True, "passed", "", candidate.attempts)
    # what ended the program says more than the tests' last words, which are that it is gone
    own = candidate.ended not in ("done", "ended") and not (candidate.ended == "time" and tested.ended == "wrong")
    told = candidate if own else tested
    ended = "ended" if told is tested and tested.message.startswith("EOFError") else told.ended
    return Verdict(False, ended, told.message, candidate.attempts)


def extract_program(answer: str, *, prompt: str = "", entry_point: str | None = None) -> str:
    """Return the program in an answer; "" where there is none.

    Of several code blocks the last that defines the entry point counts, else all of them in Python, one after the other. With
    a `prompt` (the beginning of a program, as in HumanEval) an answer that goes on from it is put behind it, and one that
    begins anew gets the prompt's imports and helpers.
    """
    blocks = [(language.lower(), body) for language, body in FENCE.findall(answer)]
    if blocks:
        code = [body for language, body in blocks if language in ("", "python", "py", "python3")] or [body for _, body in blocks]
        defining = [body for body in code if _defines(body, entry_point)]
        body = defining[-1] if defining else "\n".join(code) if not prompt else code[0]
        return _joined(prompt, body, entry_point)
    if prompt and not _defines(answer, entry_point):
        return prompt + cut_completion(answer)
    return _joined(prompt, answer, entry_point) if prompt or answer.strip() else ""


def cut_completion(completion: str) -> str:
    """Return a completion of a function up to where it goes on to something else at the margin."""
    body = NEXT.search(completion)
    kept = completion[: body.start()] if body else completion
    following = re.search(r"\ndef (?!.*\bself\b)", kept)
    return kept[: following.start()] if following else kept


def _defines(code: str, entry_point: str | None) -> bool:
    return (
        entry_point is not None
        and re.search(rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(entry_point)}\b", code, re.MULTILINE) is not None
    )


def _joined(prompt: str, body: str, entry_point: str | None) -> str:
    if not prompt:
        return body
    if not _defines(body, entry_point):
        return prompt + (body if body.startswith((" ", "\t")) else "\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    head = re.split(rf"^def\s+{re.escape(entry_point or '')}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{head}\n{body}"
