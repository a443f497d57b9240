"""Choose among the samples of each prompt: by scores, by majority of their answers, or at random as a control."""

from collections import defaultdict
from collections.abc import Sequence

import polars as pl

from ..core.config import to_mapping
from ..core.example import Decision, row_id
from ..core.run import Run
from .config import BestConfig, Gate, parse_gate
from .rows import Outcome, input_rows, keys, record
from .score import best_first, read_score, sort_columns


def best(run: Run, config: BestConfig) -> Outcome:
    """Keep the best samples of each prompt, as the stage "best"; an imported row without sample index is a prompt of its own.

    Not eligible, in this order: cut answers (rule truncated), rows without an answer (no_response), a gate not passed
    (gate:NAME) or without a value (unscored). With `majority`, the eligible samples vote with the answer they give
    (no_answer: none); those with another answer lose (not_majority: score is the share of their answer, threshold that of
    the winning one). A tie between answers goes to the one whose best row is better. Better is: higher by the scores in
    order, no value last; then shorter; then the lower index. Losers (not_best) name the winner as their witness.
    """
    rows = input_rows(run, "best")
    columns = sort_columns(run, rows, config.by, config.seed)
    gates = [(gate, read_score(run, rows, gate.name)["value"].to_list()) for gate in map(parse_gate, config.gate)]
    answers = read_score(run, rows, config.answers)["detail"].to_list() if config.majority else None
    run.configure("best", to_mapping(config), free=("*",))

    names = keys(rows)
    lengths = [len(text or "") for text in rows["response"]]
    order = [(best_first(columns, row), lengths[row], -1 if names[row][1] is None else names[row][1], row) for row in range(len(rows))]
    decisions: list[Decision | None] = _not_eligible(rows, gates)
    prompts: defaultdict[str, list[int]] = defaultdict(list)
    for row, (example_id, _) in enumerate(names):
        prompts[example_id].append(row)
    without = 0
    for members in prompts.values():
        eligible = sorted((row for row in members if decisions[row] is None), key=lambda row: order[row])
        if answers is not None:
            eligible = _vote(eligible, answers, names, decisions, config.min_share)
        without += not eligible
        for rank, row in enumerate(eligible):
            example_id, index = names[row]
            if rank < config.keep:
                decisions[row] = Decision(example_id, index, "best", "kept")
            else:
                first = eligible[0]
                own, winner = (columns[0][row], columns[0][first]) if columns else (None, None)
                sign = -1.0 if config.by and config.by[0].startswith("-") else 1.0
                decisions[row] = Decision(
                    example_id,
                    index,
                    "best",
                    "rejected",
                    "not_best",
                    None if own is None else own * sign,
                    None if winner is None else winner * sign,
                    row_id(*names[first]),
                )
    notes = [f"{without:,} of {len(prompts):,} prompts have no eligible sample"] if without else []
    if rows["sample_index"].null_count() == len(rows):
        notes.append("these rows are not samples of one prompt each: every row stood alone")
    return record(run, "best", rows, [each for each in decisions if each is not None], notes)


def _not_eligible(rows: pl.DataFrame, gates: Sequence[tuple[Gate, list[float | None]]]) -> list[Decision | None]:
    decisions: list[Decision | None] = []
    columns = rows.select("example_id", "sample_index", "finish_reason", "num_tokens", "response").iter_rows()
    for row, (example_id, index, finish_reason, num_tokens, response) in enumerate(columns):
        found: tuple[str, float | None, float | None] | None = None
        if finish_reason == "length":
            found = ("truncated", None if num_tokens is None else float(num_tokens), None)
        elif response is None:
            found = ("no_response", None, None)
        else:
            for gate, values in gates:
                value = values[row]
                if value is None or not gate.passes(value):
                    found = ("unscored" if value is None else f"gate:{gate.name}", value, gate.threshold)
                    break
        decisions.append(None if found is None else Decision(example_id, index, "best", "rejected", *found))
    return decisions


def _vote(
    eligible: list[int], answers: list[str | None], names: list[tuple[str, int | None]], decisions: list[Decision | None], min_share: float
) -> list[int]:
    """Return the rows with the majority's answer, and decide on the others. `eligible` comes best first."""
    votes: defaultdict[str, list[int]] = defaultdict(list)
    for row in eligible:
        answer = answers[row]
        if answer:
            votes[answer].append(row)
        else:
            decisions[row] = Decision(*names[row], "best", "rejected", "no_answer")
    if not votes:
        return []
    winner = max(votes, key=lambda answer: len(votes[answer]))  # of equals the first entered: the one whose best row is better
    total = sum(map(len, votes.values()))
    share = len(votes[winner]) / total
    if share < min_share:
        for row in (row for each in votes.values() for row in each):
            decisions[row] = Decision(*names[row], "best", "rejected", "low_agreement", share, min_share)
        return []
    witness = row_id(*names[votes[winner][0]])
    for answer, members in votes.items():
        for row in members if answer != winner else ():
            decisions[row] = Decision(*names[row], "best", "rejected", "not_majority", len(members) / total, share, witness)
    return votes[winner]
