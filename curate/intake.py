"""Take the rows of a data file into a run, so that the steps of curation can decide on them."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from ..core.config import to_mapping
from ..core.errors import TooManyFailures, UserError, unknown_name
from ..core.example import Decision, Example, Message
from ..core.files import write_atomically
from ..core.formats import iterate_examples, split_prompt
from ..core.run import Run
from .config import ImportConfig
from .decided import Outcome, record
from .rows import STORED, UNREADABLE

log = logging.getLogger(__name__)

REFERENCES = ("reference", "ground_truth", "gold", "final_answer", "expected_answer")  # columns taken for the reference by themselves
FEW = 8  # columns that a warning names
TEXTS = ("solution", "text", "content", "response", "answer", "completion")  # where a candidate that is a mapping has its text


def open_run(source: str | Path, out: Path | None) -> Run:
    """Open a run for writing: the run folder `source`, or the run `out` with the rows of the file `source` taken in."""
    if out is not None:
        is_itself = Path(source).is_dir() and Path(source).resolve() == out.resolve()
        return Run.create(out) if is_itself else import_run(source, out, ImportConfig())
    path = Path(source)
    if path.exists() and not (path / "config.yaml").exists():
        raise UserError(f"{source}: is no run folder; give -o RUN, the folder that its rows are taken into")
    Run.open(path)
    return Run.create(path)


def import_run(source: str | Path, out: Path, config: ImportConfig) -> Run:
    """Open the run `out` for writing, with the rows of a data file taken in. Rows that cannot be read leave no folder behind."""
    taken = _read(source, config)
    run = Run.create(out)
    try:
        _take_in(source, run, config, *taken)
        _check_failed(run, config, taken[-1])
    except BaseException:
        run.close()
        raise
    return run


def take_in(source: str | Path, run: Run, config: ImportConfig) -> Outcome | None:
    """Make the rows of a data file the candidates of a run, as the stage "import"; None where they are that already.

    With `samples`, each row is a prompt with one sample per column, numbered in their order; a row that lacks one has it
    rejected (no_text). Raises UserError for a run that holds other rows, and, with max_failed 0, for the first row that cannot be
    read; with more, such rows are failed in the ledger, called FILE:ROW, and TooManyFailures is raised after the others are taken in.
    """
    taken = _read(source, config)
    outcome = _take_in(source, run, config, *taken)
    _check_failed(run, config, taken[-1])
    return outcome


Columns = dict[str, list[Any]]  # as in STORED


def _read(source: str | Path, config: ImportConfig) -> tuple[list[Example], Columns, list[Decision]]:
    examples, failed = _examples(source, config)
    if not examples:
        raise UserError(f"{source}: has no rows that can be read; {failed[0].rule}" if failed else f"{source}: has no rows")
    columns, decisions = _sampled(examples, config, source) if config.samples else _whole(examples, config)
    return examples, columns, decisions + failed


def _take_in(
    source: str | Path, run: Run, config: ImportConfig, examples: list[Example], columns: Columns, decisions: list[Decision]
) -> Outcome | None:
    if (run.path / "curate" / "prompts.parquet").exists():
        raise UserError(f"{run.path}: holds the answers of a teacher already; give another folder for the rows of {source}")
    if "grow" in run.ledger.stages():  # the rows of two would hide each other from later steps
        raise UserError(f"{run.path}: holds the prompts that `curate prompts` has grown; give another folder for the rows of {source}")
    rows = pl.DataFrame(columns, schema=STORED)
    digest = digest_of(rows.drop("source"))  # the same rows may have been moved
    settings = {name: value for name, value in to_mapping(config).items() if value not in (None, [])}
    before = run.config().get("intake", {})
    if before and before["content"] != digest and before["content"] != digest_of(rows):  # the source was a part of it once
        other = f"holds other rows, those of {before['source']} as they were then or by other settings"
        raise UserError(f"{run.path}: {other}; give another folder for {source}")
    run.configure("intake", {"source": str(source), **settings, "content": digest}, free=("*",))
    path = run.room("curate") / "rows.parquet"
    if path.exists() and "import" in run.ledger.stages() and (path.with_name("README.md")).exists():  # the card is written last
        log.info("%s: holds the rows of %s already", run.path, source)
        return None
    with write_atomically(path) as temporary:
        rows.write_parquet(temporary)
    if not config.samples:
        _tell_unanswered(source, examples)
    return record(run, "import", [(each.example_id, each.sample_index) for each in decisions], decisions)


def digest_of(rows: pl.DataFrame) -> str:
    """Return 16 hex digits that tell rows from others."""
    lines = rows.select(pl.concat_str(pl.all().fill_null("\x00"), separator="\x1f")).to_series()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _check_failed(run: Run, config: ImportConfig, decisions: Sequence[Decision]) -> None:
    failed = [each.rule for each in decisions if each.action == "failed"]
    if len(failed) > config.max_failed * len(decisions):
        raise TooManyFailures(
            f"{run.path}: {len(failed):,} of {len(decisions):,} rows cannot be read, more than the share of {config.max_failed:g} that"
            f" max_failed allows, the first: {failed[0]}; the others are taken in"
        )


def _tell_unanswered(source: str | Path, examples: Sequence[Example]) -> None:
    """Warn of rows without an answer: prompts look the same as pairs whose answer stands in a column of an unusual name."""
    without = [each for each in examples if each.messages[-1]["role"] != "assistant"]
    if without:
        names = ", ".join(list(without[0].meta)[:FEW])
        hint = f"; if one of its other columns is it ({names}), name that as answer column" if names else ""
        log.warning("%s: %s of %s rows have no answer, as %s%s", source, f"{len(without):,}", f"{len(examples):,}", without[0].source, hint)


def _examples(source: str | Path, config: ImportConfig) -> tuple[list[Example], list[Decision]]:
    """Return the rows, and the decisions on those that cannot be read."""
    prompt, answer = config.prompt_column, config.answer_column
    examples: list[Example] = []
    failed: list[Decision] = []
    named: Counter[str] = Counter()  # of files of one name in several folders

    def faulty(place: str, error: UserError) -> None:
        if examples and not config.max_failed:
            raise UserError(f"{error}; `sftkit curate import --max-failed 0.01` leaves such rows out")
        name = place.rpartition("/")[2]  # an id holds no /, which parts it from the number of a sample
        named[name] += 1
        failed.append(_failed(config, error, name if named[name] == 1 else f"{name}~{named[name]}"))

    rows = iterate_examples(source, format=config.format, prompt_column=prompt, answer_column=answer, faulty=faulty)
    for example in islice(rows, config.limit):
        examples.append(example)  # one by one, as `faulty` looks at them
    return examples, failed


def _failed(config: ImportConfig, error: UserError, name: str, index: int | None = None) -> Decision:
    """Return the decision on what cannot be read; raise the error where none may be so."""
    if not config.max_failed:
        raise error
    return Decision(name, index, "import", "failed", f"{UNREADABLE}: {error}")


def columns_of(examples: Sequence[Example], config: ImportConfig) -> dict[str, list[Any]]:
    """Return rows as columns, as in STORED."""
    return _whole(examples, config)[0]


def _whole(examples: Sequence[Example], config: ImportConfig) -> tuple[dict[str, list[Any]], list[Decision]]:
    columns: dict[str, list[Any]] = {name: [] for name in STORED}
    decisions = []
    for example in examples:
        try:
            reference = _reference(example, config)
        except UserError as error:
            decisions.append(_failed(config, error, example.id))
            continue
        decisions.append(Decision(example.id, None, "import", "kept"))
        _append(columns, example.id, None, example.messages, reference, example.source, example.meta)
    return columns, decisions


def _sampled(examples: Sequence[Example], config: ImportConfig, source: str | Path) -> tuple[dict[str, list[Any]], list[Decision]]:
    known = {name for example in examples for name in example.meta}
    for name in config.samples:
        if name not in known:
            raise unknown_name("column", name, known, str(source))
    columns: dict[str, list[Any]] = {name: [] for name in STORED}
    decisions = []
    for example in examples:
        prompt, answer = split_prompt(example)
        try:
            reference = _reference(example, config) or answer
        except UserError as error:
            decisions.append(_failed(config, error, example.id))
            continue
        rest = {name: value for name, value in example.meta.items() if name not in config.samples}
        for index, (column, candidate) in enumerate(_candidates(example, config.samples)):
            try:
                text, extra = _candidate_text(candidate, f"{example.source}: column {column}")
            except UserError as error:
                decisions.append(_failed(config, error, example.id, index))
                continue
            if text is None:
                decisions.append(Decision(example.id, index, "import", "rejected", "no_text"))
                continue
            decisions.append(Decision(example.id, index, "import", "kept"))
            messages = [*prompt, {"role": "assistant", "content": text}]
            _append(columns, example.id, index, messages, reference, example.source, {**rest, "sample": {"column": column, **extra}})
    return columns, decisions


def _candidates(example: Example, names: Iterable[str]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in names:
        value = example.meta.get(name)
        found += [(name, each) for each in value] if isinstance(value, list) else [(name, value)]
    return found


def _candidate_text(candidate: Any, place: str) -> tuple[str | None, dict[str, Any]]:
    if candidate is None or isinstance(candidate, str):
        return candidate, {}
    if isinstance(candidate, dict):
        name = next((name for name in TEXTS if isinstance(candidate.get(name), str)), None)
        if name:
            return candidate[name], {key: value for key, value in candidate.items() if key != name}
    raise UserError(f"{place}: expected a text, or a mapping with one under {', '.join(TEXTS)}; found {str(candidate)[:80]!r}")


def _reference(example: Example, config: ImportConfig) -> str | None:
    names = (config.reference_column,) if config.reference_column else REFERENCES
    value = next((example.meta[name] for name in names if example.meta.get(name) is not None), None)
    if config.reference_column and config.reference_column not in example.meta:  # null in one row, that row has none
        raise UserError(f"{example.source}: no column {config.reference_column!r}; there are {', '.join(example.meta) or 'no others'}")
    return None if value is None else str(value)


def _append(
    columns: dict[str, list[Any]],
    example_id: str,
    index: int | None,
    messages: list[Message],
    reference: str | None,
    source: str,
    meta: dict[str, Any],
) -> None:
    told = {**meta, **meta.get("sample", {})} if index is not None else meta
    tokens = told.get("num_tokens")
    values = {
        "example_id": example_id,
        "sample_index": index,
        "messages": _valid(json.dumps(messages, ensure_ascii=False)),
        "reference": None if reference is None else _valid(reference),
        "source": source,
        "meta": _valid(json.dumps(meta, ensure_ascii=False, default=str)),
        "finish_reason": told.get("finish_reason") if told.get("finish_reason") in ("stop", "length") else None,
        "num_tokens": tokens if isinstance(tokens, int) and abs(tokens) < 2**63 else None,  # else it is no count, and fits in no column
        "logprob": told.get("logprob") if isinstance(told.get("logprob"), float) else None,
    }
    for name, value in values.items():
        columns[name].append(value)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text, and no file would take it
