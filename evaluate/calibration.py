"""What a judge is worth: how often it says what people said of labelled pairs, as LLMBar's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import UserError
from ..core.judge import Judge, Pair
from ..core.sources import iterate_rows
from ..core.statistics import Estimate, Interval
from .preferences import Agreement, agreement
from .results import aligned
from .task_data import read_data


def calibrate(judging: Judge, source: str, limit: int | None) -> list[Agreement]:
    """Let the judge judge labelled pairs (subset, input, output_1, output_2, label, as LLMBar's), and say how often it agrees.

    The source is a file, or "llmbar", whose pairs come along. Of each subset the first `limit` pairs. Zeng et al. 2023, arXiv 2310.07641.
    """
    texts = ("input", "output_1", "output_2")
    rows = _labelled(source, (*texts, "label"), read_data(source) if source == "llmbar" else None)
    for number, row in enumerate(rows, 1):
        if empty := [name for name in texts if row[name] is None]:
            raise UserError(f"{source}: row {number} has no {empty[0]}; expected a text")
    chosen = [row for subset in _subsets(rows) for row in [each for each in rows if _subset(each) == subset][:limit]]
    verdicts = judging.compare([Pair(str(row["input"]), str(row["output_1"]), str(row["output_2"])) for row in chosen])
    said: list[tuple[int | None, int | None]] = []
    for verdict in verdicts:
        first, second = (None if each == 0.5 else 1 if each > 0.5 else 2 for each in verdict.orders or (0.5, 0.5))
        said.append((first, second))
    return _agreements(chosen, said)


def read_verdicts(source: str, *, judge: str, prompt: str | None = None) -> list[Agreement]:
    """Return how often a judge's verdicts in a file (label, winner_orig, winner_swapped, judge, as LLMBar's) agree with the labels.

    Verdicts by several prompts are told apart: those on the same pair are not independent.
    """
    verdicts = _labelled(source, ("label", "winner_orig", "winner_swapped", "judge"))
    chosen = [row for row in verdicts if row["judge"] == judge and prompt in (None, row.get("prompt"))]
    if not chosen:
        known = ", ".join(sorted({str(row["judge"]) for row in verdicts}))
        raise UserError(f"{source}: no verdicts of {judge!r}{f' with the prompt {prompt!r}' if prompt else ''}; there are {known}")
    winners = {str(row[name]) for row in chosen for name in ("winner_orig", "winner_swapped")}
    if not any(map(_side, winners)):
        raise UserError(f"{source}: the winners are {', '.join(sorted(winners)[:5])}; expected 1 or 2, the number of the better output")
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in chosen:
        prompts.setdefault(str(row.get("prompt") or "no prompt"), []).append(row)
    found = []
    for name, rows in prompts.items():
        agreements = _agreements(rows, [(_side(row["winner_orig"]), _side(row["winner_swapped"])) for row in rows])
        found += agreements if len(prompts) == 1 else [replace(each, name=f"{name}: {each.name}") for each in agreements]
    return found


def _labelled(source: str, needed: Sequence[str], known: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    rows = [row for _, row in iterate_rows(source)] if known is None else known
    for number, row in enumerate(rows, 1):
        missing = [name for name in needed if name not in row]
        if missing or _side(row["label"]) is None:
            what = f"no column {missing[0]!r}" if missing else f"the label {row['label']!r}"
            raise UserError(f"{source}: row {number} has {what}; expected {', '.join(needed)}, with label 1 or 2 for the better output")
    if not rows:
        raise UserError(f"{source}: holds no labelled pairs")
    return rows


def _subset(row: Mapping[str, Any]) -> str:
    return str(row.get("subset") or "all")


def _subsets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_subset(row) for row in rows))


def _side(value: Any) -> int | None:
    return {"1": 1, "2": 2, "1.0": 1, "2.0": 2}.get(str(value))  # beside a null, tables hold whole numbers as 1.0


def _agreements(rows: Sequence[Mapping[str, Any]], said: Sequence[tuple[int | None, int | None]]) -> list[Agreement]:
    """Return the agreement of each subset, and of those together whose names begin alike, as LLMBar/Adversarial."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        name = _subset(row)
        for group in dict.fromkeys((name, name.rpartition("/")[0] if name.count("/") > 1 else name)):
            groups.setdefault(group, []).append(place)
    return [
        agreement(name, [_side(rows[place]["label"]) or 0 for place in places], [said[place] for place in places])
        for name, places in sorted(groups.items())
    ]


def agreement_lines(agreements: Sequence[Agreement]) -> list[str]:
    """Write how often a judge agrees with labels, as a table."""
    rows: list[tuple[str, ...]] = [("labelled pairs", "n", "right", "95 %", "right in both orders", "orders agree")]
    for each in agreements:
        shares = [f"{100 * share:.0f} %" for share in (each.both, each.same)]
        rows.append((each.name, f"{each.n:,}", *share(Estimate(each.accuracy, each.interval)), *shares))
    return aligned(rows) if agreements else []


def share(estimate: Estimate) -> tuple[str, str]:
    """Write a share and its interval, in percent."""
    span: Interval | None = estimate.interval
    return f"{100 * estimate.value:.1f} %", "one pair" if span is None else f"{100 * span.low:.0f} to {100 * span.high:.0f}"
