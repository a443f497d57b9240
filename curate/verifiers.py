"""Scores by rules that decide: formulas that are equal, JSON of a schema, instructions that are followed, programs that pass tests."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..core.checks.code import Verdict, extract_program, run_tests
from ..core.checks.sandbox import Limits
from ..core.errors import UserError, missing_package
from ..core.files import load_json
from ..core.hardware import usable_cores
from ..core.progress import Progress
from ..core.run import Run
from ..core.values import ValueStore, value_key
from .scorers import Candidate, ColumnScorer, Result, Scorer, failure

VALUES = "values.sqlite"  # beside what models computed: a program that was run is not run again
PROGRAMS = 4  # for each processor: a program that waits uses none


def math(*, gold: str | None = None) -> Scorer:
    """Say whether the formula or number that the response ends with equals that of the reference (or of the column `gold`): 1 or 0.

    By math-verify, which knows that 1/2 is \\frac{2}{4}; the detail is what it found in the response. `numeric` needs no package.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise missing_package("math-verify", "math") from None

    def score(row: Candidate) -> Result:
        reference = row.reference if gold is None else row.meta.get(gold)
        if reference is None or row.response is None:
            return None, "no reference" if reference is None else "no response"
        # a bare formula is found only between dollars; a text that ends with its answer is read as it is
        wanted = parse(str(reference), parsing_timeout=5) or parse(f"${reference}$", parsing_timeout=5)
        if not wanted:
            return None, "no formula in the reference"
        found = parse(row.response, parsing_timeout=5)
        return float(verify(wanted, found, timeout_seconds=5)), "" if not found else str(found[-1])[:200]

    return score


def json_schema(*, schema: str | None = None, column: str | None = None) -> Scorer:
    """Say whether the response is JSON that a schema accepts: 1, or 0 with the reason as detail.

    The schema is a file, or stands in each row's `column`. JSON may stand in a code block; the last one counts.
    """
    from ..core.checks.schema import check_schema

    if (schema is None) == (column is None):
        raise UserError("scorer json_schema needs schema=FILE, the same for all rows, or column=NAME, where each row has its own")
    shared: Any = None
    if schema is not None:
        try:
            shared = load_json(Path(schema).expanduser())
        except (OSError, ValueError) as error:
            raise UserError(f"{schema}: cannot be read as JSON: {error}") from None
        check_schema("null", shared)  # raises for what is no schema, once and not for each row

    def score(row: Candidate) -> Result:
        if row.response is None:
            return None, "no response"
        own = shared if column is None else row.meta.get(column)
        if own is None:
            return None, f"no schema in the column {column!r}"
        reason = check_schema(row.response, json.loads(own) if isinstance(own, str) else own)
        return float(reason is None), reason or ""

    return score


def ifeval(*, loose: bool = False, names: str = "instruction_id_list", arguments: str = "kwargs") -> Scorer:
    """Give the share of a row's written instructions that the response follows; the detail names those it does not.

    The instructions are IFEval's 25 types (Zhou et al. 2023, arXiv 2311.07911), by name in the column `names` with their arguments
    in the column `arguments`, as in IFEval's data. `loose` forgives a first or a last line, and stars.
    """
    from ..core.checks.instructions import check_instructions

    def score(row: Candidate) -> Result:
        wanted = row.meta.get(names)
        if not wanted:
            return None, f"no instructions in the column {names!r}"
        if row.response is None:
            return None, "no response"
        given = row.meta.get(arguments) or [{}] * len(wanted)
        followed = check_instructions(row.response, wanted, [each or {} for each in given])
        verdicts = followed.loose if loose else followed.strict
        return sum(verdicts) / len(verdicts), ", ".join(name for name, held in zip(wanted, verdicts, strict=True) if not held)

    return score


def unit_test(
    *, tests: str = "test", entry_point: str = "entry_point", begins: str | None = None, seconds: float = 10.0, unsafe: bool = False
) -> ColumnScorer:
    """Say whether the program in the response passes the tests in the row's column `tests`: 1, or 0 with how it ended as detail.

    Tests are asserts, functions test_*, or `check(candidate)` for the function that the column `entry_point` names, as in
    HumanEval. The column `begins` holds the beginning of the program, where the response goes on from it. Programs run in a
    sandbox without network, files or more than `seconds` of processor time (by the clock three times that, or 30 seconds where that
    is more); `unsafe` runs them without one.
    """
    if seconds <= 0:
        raise UserError(f"scorer unit_test: seconds: expected a number above 0, found {seconds:g}")
    whole = max(1, round(seconds))
    limits = Limits(cpu_seconds=whole, seconds=max(Limits().seconds, 3.0 * whole))
    decisive = [whole] if limits.seconds == Limits().seconds else [whole, limits.seconds]  # verdicts of when there was one clock stay valid

    def order(row: Candidate) -> tuple[str, str, str | None] | str:
        checks = row.meta.get(tests)
        if row.response is None or not checks:
            return "no response" if row.response is None else f"no tests in the column {tests!r}"
        function = row.meta.get(entry_point)
        name = None if function is None else str(function)
        beginning = "" if begins is None else str(row.meta.get(begins) or "")
        return extract_program(row.response, prompt=beginning, entry_point=name), str(checks), name

    def one(program: str, checks: str, name: str | None) -> Verdict:
        return run_tests(program, checks, entry_point=name, limits=limits, unsafe=unsafe)

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        orders = [order(row) for row in rows]
        keys = [None if isinstance(each, str) else value_key("unit_test", *each, *decisive) for each in orders]
        with ValueStore(run.room("curate") / VALUES) as store:
            missing = {key: each for key, each in zip(keys, orders, strict=True) if key and not isinstance(each, str) and key not in store}
            failed: dict[str, Result] = {}
            for key, told in _run_all(missing, one):
                if isinstance(told, Verdict):
                    store.put(key, [float(told.passed)], _told(told))
                else:
                    failed[key] = failure(told)
            for number, (stored, each) in enumerate(zip(keys, orders, strict=True)):
                if stored is None:
                    yield number, (None, str(each))
                elif stored in failed:
                    yield number, failed[stored]
                else:
                    numbers, words = store.entry(stored)
                    yield number, (float(numbers[0]), words)

    return ColumnScorer(score)


def _told(verdict: Verdict) -> str:
    """Say how a program ended, and what it tried beyond computing; nothing where it passed and tried nothing."""
    tried = f"tried {' '.join(verdict.attempts)}" if verdict.attempts else ""
    parts = [tried] if verdict.passed else [verdict.ended, verdict.message, tried]
    return ": ".join(each for each in parts if each)[:500]


def _run_all(orders: Mapping[str, tuple[Any, ...]], call: Any) -> Iterator[tuple[str, Any]]:
    """Run programs several at a time; yield what came of each, or the error. What the user can mend is raised."""
    if not orders:
        return
    width = PROGRAMS * usable_cores()
    waiting: deque[tuple[str, Future[Any]]] = deque()
    with ThreadPoolExecutor(width) as pool, Progress("run tests", total=len(orders), unit="programs") as progress:
        try:
            for key, each in orders.items():
                waiting.append((key, pool.submit(call, *each)))
                if len(waiting) >= 2 * width:
                    yield _outcome(*waiting.popleft())
                    progress.advance()
            while waiting:
                yield _outcome(*waiting.popleft())
                progress.advance()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcome(key: str, future: "Future[Any]") -> tuple[str, Any]:
    try:
        return key, future.result()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  one row's failure is that row's result
        return key, error
