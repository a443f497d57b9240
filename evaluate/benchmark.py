"""Tasks: the same questions to all models, marked by rules, compared question by question."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ..core.checks.sandbox import available
from ..core.config import to_mapping
from ..core.errors import UserError, missing_package
from ..core.files import write_atomically
from ..core.judge import Judge, read_rubric
from ..core.named_models import find_models
from ..core.progress import Progress
from ..core.store import SampleStore
from ..core.values import ValueStore
from .ask import Asked, ask, choose_likeliest, compared, loaded_when_needed, ways, ways_of
from .compare import Answer
from .config import TasksConfig
from .contamination import contaminated
from .graded import SCALE, grade_answers, warn_of
from .harness import PREFIX, hand_over
from .health import health
from .marks import Marks, TaskResult, adjust, compare_marks, measure, without
from .results import counted, finish_section, left_out, open_section, told
from .tasks import open_task
from .tasks.base import Item, Mark, Task

log = logging.getLogger(__name__)

ANSWERS: dict[str, Any] = {
    "task": pl.String,
    "model": pl.String,
    "item": pl.String,
    "sample_index": pl.Int32,
    "text": pl.String,
    "finish_reason": pl.String,
    "num_tokens": pl.Int64,
    "key": pl.String,
    "error": pl.String,  # why there is no answer
}
SCORES: dict[str, Any] = {
    "task": pl.String,
    "model": pl.String,
    "item": pl.String,
    "sample_index": pl.Int32,
    "metric": pl.String,
    "value": pl.Float64,
    "found": pl.Boolean,
    "answer": pl.String,  # what was read out of the text
    "trained_on": pl.String,  # the training row that holds the question
}


@dataclass(frozen=True, kw_only=True)
class TasksResult:
    """What came out of all tasks."""

    folder: Path | None  # evaluate/ of the run, where one was given
    tasks: list[TaskResult]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for results.json."""
        return {each.name: asdict(each) for each in self.tasks}

    def summary(self) -> str:
        """Write it for people."""
        place = [f"answers: {self.folder / 'task_answers.parquet'}, marks: {self.folder / 'task_scores.parquet'}"] if self.folder else []
        return "\n\n".join([*(each.summary() for each in self.tasks), *place])


def open_tasks(names: Sequence[str], config: TasksConfig) -> tuple[list[Task], list[str]]:
    """Return the tasks of these names, and the names of those that are lm-eval's.

    Raises UserError for what cannot be asked or marked here. The judge that grades is not looked for: a recipe may yet have to fetch it.
    """
    handed = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    tasks = [_limited(open_task(name, config), config) for name in names if not name.startswith(PREFIX)]
    known = [*(each.name for each in tasks), *handed]
    repeated = [each for each in known if known.count(each) > 1]
    if repeated:
        raise UserError(f"tasks: {repeated[0]} is given twice (a file goes by its name, without its folder); expected each once")
    if not known:
        raise UserError("tasks: none was given; expected --tasks NAME,NAME")
    refusal = available() if any(each.code for each in tasks) and not config.unsafe else None
    if refusal:
        raise UserError(f"{', '.join(each.name for each in tasks if each.code)}: runs programs that models wrote, and {refusal}")
    if handed and importlib.util.find_spec("lm_eval") is None:
        raise missing_package("lm-eval", "lm-eval")
    needing = [each.name for each in tasks if each.judged]
    if needing and config.judge is None:
        raise UserError(f"{', '.join(needing)}: no rule can mark the answers; expected --judge MODEL, which grades them")
    if needing:
        read_rubric(config.rubric)
    return tasks, handed


def evaluate_tasks(models: Mapping[str, str], names: Sequence[str], out: Path | None, config: TasksConfig) -> TasksResult:
    """Ask all models (name: reference) the questions of tasks, mark the answers, and compare with the first model, paired.

    Into the run folder `out` go evaluate/task_answers.parquet, task_scores.parquet and the section `tasks` of results.json.
    Answers are stored under keys of what decides them and apart from their marks: marking again generates nothing, new weights
    generate all anew. Without `out` nothing is kept. Raises UserError for a task or a model that is not there, for programs
    where there is no sandbox, and where no question is left that every model answered.
    """
    tasks, handed = open_tasks(names, config)
    named = {config.judge: config.judge} if config.judge is not None and any(each.judged for each in tasks) else {}
    judge = find_models(named, config.judge_engine)[0] if named else None
    held = {task.name: contaminated(task.items, config.train_data) for task in tasks} if config.train_data else {}
    found = find_models(models, config.engine)
    asked = ways(found, tasks, config)
    theirs = [way for way in asked if not way.chat or way.own_template]  # lm-eval knows no template but a model's own
    chatless = [model.name for model in found if all(way.model is not model for way in theirs)]
    if handed and chatless:
        raise UserError(f"{PREFIX}{handed[0]}: lm-eval cannot ask {chatless[0]} in chats, since it has no template; leave out --ask chat")
    settings = {"tasks": list(names), "models": dict(models), **to_mapping(config)}
    with ExitStack() as stack:
        folder = stack.enter_context(open_section(out, "tasks", settings))
        store = stack.enter_context(SampleStore(folder / "answers.sqlite"))
        choices = stack.enter_context(ValueStore(folder / "choices.sqlite"))
        answers: dict[str, dict[str, list[list[Answer]]]] = {task.name: {} for task in tasks}
        new: dict[str, dict[str, int]] = {task.name: {} for task in tasks}
        for model in found:
            with loaded_when_needed(model) as engine:
                for task, way in [(each, way) for each in tasks for way in ways_of(each, asked) if way.model is model]:
                    said = choose_likeliest(way, task, choices, engine) if task.likelihood else ask(way, task, store, config, engine)
                    answers[task.name][way.name], new[task.name][way.name] = said
        if judge is not None:
            warn_of(judge, found)
            grades = stack.enter_context(ValueStore(folder / "judgements.sqlite"))
            with Judge(judge, grades, rubric=config.rubric, scale=SCALE) as judging:
                for place, task in enumerate(tasks):
                    if task.judged:
                        tasks[place], answers[task.name] = grade_answers(task, answers[task.name], judging)
        tests = sum(len(compared(ways_of(each, asked))) for each in tasks) + len(handed) * len(compared(theirs))
        results, tables = [], [pl.DataFrame(schema=SCORES)]
        for task in tasks:
            result, scores = _result(task, ways_of(task, asked), answers[task.name], new[task.name], held.get(task.name), config, tests)
            results.append(result)
            tables.append(scores)
        results += [hand_over(name, theirs, folder, config, tests) for name in handed]
        outcome = TasksResult(folder=folder if out else None, tasks=adjust(results))
        with write_atomically(folder / "task_answers.parquet") as temporary:
            tables_of_answers = [_answer_table(task, answers[task.name]) for task in tasks]
            pl.concat([pl.DataFrame(schema=ANSWERS), *tables_of_answers]).write_parquet(temporary)
        with write_atomically(folder / "task_scores.parquet") as temporary:
            pl.concat(tables).write_parquet(temporary)
        finish_section(folder, "tasks", outcome.facts(), {"models": list(models), "tasks": [each.name for each in results]})
        return outcome


def _limited(task: Task, config: TasksConfig) -> Task:
    return replace(task, items=task.items[: config.limit])


def _result(
    task: Task,
    asked: Sequence[Asked],
    answers: Mapping[str, list[list[Answer]]],
    new: Mapping[str, int],
    held: Mapping[str, str] | None,  # items that stand in the training data; None where there is none to look at
    config: TasksConfig,
    tests: int,
) -> tuple[TaskResult, pl.DataFrame]:
    errors = {name: [next((one.error for one in each if one.error), None) for each in several] for name, several in answers.items()}
    unasked = _unasked(asked, errors)
    asked = [way for way in asked if way.name not in unasked]
    reasons = left_out({way.name: errors[way.name][place] for way in asked} for place in range(len(task.items)))
    counts = counted(reasons)
    used = [place for place, reason in enumerate(reasons) if reason is None]
    if not used:
        raise UserError(f"{task.name}: none of its {len(task.items):,} questions was answered by every model: {told(counts)}")
    items = [task.items[place] for place in used]
    marks = {way.name: _mark(task, way.name, items, [answers[way.name][place] for place in used], config) for way in asked}
    groups = [item.group for item in items]
    drawn = {"resamples": config.resamples, "seed": config.seed}
    metrics = {}
    for name, each in marks.items():
        metrics[name] = [measure(each, metric, groups, drawn) for metric in task.metrics]
        if held is not None:
            clean = [item.id not in held for item in items]
            metrics[name] = [without(metric, each, groups, clean, drawn) for metric in metrics[name]]
    result = TaskResult(
        name=task.name,
        n=len(items),
        left_out=counts,
        asked={way.name: "choices" if task.likelihood else way.told for way in asked},
        unasked=unasked,
        metrics=metrics,
        health={way.name: None if task.likelihood else _health(items, [answers[way.name][place] for place in used]) for way in asked},
        comparisons=compare_marks(task.name, task.metrics[0], marks, compared(asked), groups, drawn, tests=tests),
        generated=dict(new),
        contaminated=None if held is None else sum(item.id in held for item in items),
    )
    return result, _score_table(task, items, marks, held or {})


def _unasked(asked: Sequence[Asked], errors: Mapping[str, Sequence[str | None]]) -> dict[str, str]:
    """Return the ways in which not one question was answered, each with the reasons, of models that another way has answers of."""
    silent = {way.name for way in asked if all(errors[way.name])}
    heard = {way.model.name for way in asked if way.name not in silent}
    found = {}
    for way in asked:
        if way.name in silent and way.model.name in heard:
            found[way.name] = told(counted(left_out({way.name: error} for error in errors[way.name])))
            log.warning("%s answered no question and is left out: %s", way.name, found[way.name])
    return found


def _health(items: Sequence[Item], answers: Sequence[Sequence[Answer]]) -> Any:
    pairs = [(item.question, answer) for item, several in zip(items, answers, strict=True) for answer in several]
    return health([question for question, _ in pairs], [answer for _, answer in pairs])


def _mark(task: Task, name: str, items: Sequence[Item], answers: Sequence[Sequence[Answer]], config: TasksConfig) -> list[Marks]:
    jobs = [(item, answer) for item, several in zip(items, answers, strict=True) for answer in several]

    def mark_of(job: tuple[Item, Answer]) -> dict[str, Mark]:
        item, answer = job
        grade = task.grades.get((item.id, answer.key))
        return task.score(item, answer.text) if grade is None else grade

    if not task.code:
        marks = [mark_of(job) for job in jobs]
    else:
        with Progress(f"{task.name}: run {name}'s programs", total=len(jobs), unit="programs") as progress:
            marks = []
            with ThreadPoolExecutor(config.workers) as pool:
                for mark in pool.map(mark_of, jobs):
                    marks.append(mark)
                    progress.advance()
    each = len(answers[0])
    return [marks[place : place + each] for place in range(0, len(marks), each)]


def _answer_table(task: Task, answers: Mapping[str, list[list[Answer]]]) -> pl.DataFrame:
    rows = [
        {
            "task": task.name,
            "model": name,
            "item": item.id,
            "sample_index": index,
            **{column: None if each.error else getattr(each, column) for column in ("text", "finish_reason", "num_tokens")},
            "key": each.key or None,
            "error": each.error,
        }
        for name, several in answers.items()
        for item, given in zip(task.items, several, strict=True)
        for index, each in enumerate(given)
    ]
    return pl.DataFrame(rows, schema=ANSWERS)


def _score_table(task: Task, items: Sequence[Item], marks: Mapping[str, list[Marks]], held: Mapping[str, str]) -> pl.DataFrame:
    rows = [
        (task.name, name, item.id, index, metric, mark.value, mark.found, mark.answer, held.get(item.id))
        for name, several in marks.items()
        for item, given in zip(items, several, strict=True)
        for index, each in enumerate(given)
        for metric, mark in each.items()
    ]
    return pl.DataFrame(rows, schema=SCORES, orient="row")
