"""Scores that a model says: a judge's grade of an answer, and the tags it gives a prompt. Any engine can be asked.

What was asked is kept in the run, by the hash of the model and of what it was asked: it is asked once.
"""

import json
import re
from collections.abc import Iterator, Sequence

from ..core.asked import Asked
from ..core.errors import UserError
from ..core.judge import OF_QUESTIONS, Item, Judge, Pair
from ..core.named_models import find_models
from ..core.run import Run
from ..core.text import shortened
from ..core.values import ValueStore
from .model_scores import BATCH_TOKENS, CHUNK, VALUES, engine_config
from .scorers import Candidate, ColumnScorer, Result

PROMPTS = 1 << 10  # whose answers are compared together
TAGGING = (
    "Name the intentions of the request below, each as a tag of one to three words, as fine as they can be told apart: what is to be"
    ' done, in which field, under which conditions. Write one JSON list of texts, as ["poem", "rhyme scheme", "about autumn"], and'
    " nothing else.\n\n[Request]\n{prompt}\n[End of request]"
)


def judge(
    *,
    model: str,
    rubric: str = "helpfulness",
    scale: int = 6,
    engine: str = "auto",
    base_url: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
    parse: bool = False,
) -> ColumnScorer:
    """Give the grade of the answer by a judge, from 1 to `scale`: the expected grade, or the one it writes. See core.judge.

    A row's reference is shown to the judge. `rubric` is helpfulness, correctness, instructions, quality, complexity, a text file
    or the text itself. With `parse`, and from a server, what the judge writes is read.
    """
    config = engine_config(engine, device, dtype, batch_tokens, base_url=base_url, replicas=replicas, executor=executor)

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        alone = rubric in OF_QUESTIONS
        (found,) = find_models({model: model}, config)
        with (
            ValueStore(run.room("curate") / VALUES) as store,
            Judge(found, store, rubric=rubric, scale=scale, parse=parse) as judging,
        ):
            for start in range(0, len(rows), CHUNK):
                places = range(start, min(start + CHUNK, len(rows)))
                answered = [number for number in places if alone or rows[number].response is not None]
                items = [
                    Item(rows[number].prompt, None) if alone else Item(rows[number].prompt, rows[number].response, rows[number].reference)
                    for number in answered
                ]
                grades = dict(zip(answered, judging.grade(items), strict=True))
                for number in places:
                    yield number, (grades[number].value, grades[number].error) if number in grades else (None, "no response")

    return ColumnScorer(score)


def pairwise(
    *,
    model: str,
    rubric: str = "helpfulness",
    opponents: int = 3,
    engine: str = "auto",
    base_url: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
    parse: bool = False,
) -> ColumnScorer:
    """Give the share of comparisons with other answers to the same prompt that the answer wins by a judge; a tie is half of one.

    Each answer meets the `opponents` that follow it, in a circle, so that all meet as many, and none the same twice. A pair is judged
    in both orders and a flip is a tie. The detail counts what was won, tied and lost. Other options are those of `judge`.
    """
    config = engine_config(engine, device, dtype, batch_tokens, base_url=base_url, replicas=replicas, executor=executor)
    if opponents < 1:
        raise UserError(f"opponents: expected a whole number above 0, found {opponents}")

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if row.response is None:
                yield number, (None, "no response")
            else:
                groups.setdefault(row.prompt, []).append(number)
        (found,) = find_models({model: model}, config)
        with ValueStore(run.room("curate") / VALUES) as store, Judge(found, store, rubric=rubric, parse=parse) as judging:
            prompts = list(groups.values())
            for start in range(0, len(prompts), PROMPTS):
                part = prompts[start : start + PROMPTS]
                meetings = [each for members in part for each in in_a_circle(members, opponents)]
                verdicts = judging.compare(
                    [Pair(rows[a].prompt, rows[a].response or "", rows[b].response or "", rows[a].reference) for a, b in meetings]
                )
                outcomes: dict[int, list[float]] = {number: [] for members in part for number in members}
                errors: dict[int, str] = {}
                for (first, second), verdict in zip(meetings, verdicts, strict=True):
                    if verdict.winner is None:
                        errors[first] = errors[second] = verdict.error
                        continue
                    won = {1: 1.0, 2: 0.0, 0: 0.5}[verdict.winner]
                    outcomes[first].append(won)
                    outcomes[second].append(1 - won)
                for number, each in outcomes.items():
                    if each:
                        counts = f"{each.count(1.0)} won, {each.count(0.5)} tied, {each.count(0.0)} lost"
                        yield number, (sum(each) / len(each), counts)
                    else:
                        yield number, (None, errors.get(number, "no other answer to its prompt"))

    return ColumnScorer(score)


def in_a_circle(members: Sequence[int], opponents: int) -> list[tuple[int, int]]:
    """Return who meets whom: each of a circle the `opponents` after it, no two twice."""
    count = len(members)
    met: dict[frozenset[int], tuple[int, int]] = {}
    for step in range(1, min(opponents, count - 1) + 1):
        for place, member in enumerate(members):
            other = members[(place + step) % count]
            met.setdefault(frozenset((member, other)), (member, other))
    return list(met.values())


def tags(
    *,
    model: str,
    engine: str = "auto",
    base_url: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    replicas: str | None = None,
    executor: str = "local",
) -> ColumnScorer:
    """Give the number of different intentions that a model finds in the prompt, a measure of its complexity; the detail names them.

    As #InsTag does with a model of its own (Lu et al. 2023, arXiv 2308.07074); here any model is asked. What it writes that is no
    list is a row without a value.
    """
    config = engine_config(engine, device, dtype, batch_tokens, base_url=base_url, replicas=replicas, executor=executor)

    def score(rows: Sequence[Candidate], run: Run) -> Iterator[tuple[int, Result]]:
        (found,) = find_models({model: model}, config)
        with ValueStore(run.room("curate") / VALUES) as store, Asked(found, store, work="tag") as asked:
            for start in range(0, len(rows), CHUNK):
                questions = [[{"role": "user", "content": TAGGING.replace("{prompt}", row.prompt)}] for row in rows[start : start + CHUNK]]
                for number, (written, error) in enumerate(asked.written(questions), start):
                    yield number, (None, error) if written is None else read_tags(written)

    return ColumnScorer(score)


def read_tags(written: str) -> Result:
    """Read a list of tags that a model wrote, the last JSON list of texts in it: how many different ones, and which."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]", written)):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if found and all(isinstance(each, str) and each.strip() for each in found):
            names = dict.fromkeys(" ".join(each.lower().split()) for each in found)
            return float(len(names)), "; ".join(names)
    return None, f"not a list of tags: {shortened(written)!r}"
