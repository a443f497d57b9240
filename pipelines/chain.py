"""The whole chain as one run folder: curate, train, evaluate, report. Each step is done once; a stopped run goes on."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.catalogue import CATALOGUE, cached, fetch
from ..core.config import part, to_mapping
from ..core.errors import UserError
from ..core.files import read_json, write_json, write_text
from ..core.formats import read_examples, split_prompt
from ..core.models import resolve_model
from ..core.progress import duration, timed
from ..core.run import Run, is_done, mark_done, read_done
from ..core.sources import find_source, hash_files
from ..curate.build import build, check_early
from ..evaluate.benchmark import evaluate_tasks, open_tasks
from ..evaluate.compare import compare, read_questions
from ..evaluate.config import CompareConfig, TasksConfig
from ..evaluate.loss import loss
from ..train.config import TrainConfig
from ..train.sft import train
from .config import RecipeConfig
from .report import headline, write_report

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChainResult:
    """Where everything is, what came out, and how long this call took for each step."""

    run: Path
    report: Path
    findings: list[str]
    seconds: dict[str, float]

    def summary(self) -> str:
        """Write it for people."""
        times = ", ".join(f"{step} {duration(seconds)}" for step, seconds in self.seconds.items())
        took = f"this call took: {times}; {duration(sum(self.seconds.values()))} in all"
        return "\n".join([*self.findings, took, f"report: {self.report}"])


def run_chain(recipe: RecipeConfig, out: Path, *, name: str = "", accept_licence: bool = False) -> ChainResult:
    """Run a recipe into the folder `out`; steps that are done there with these settings are not done again.

    Models of the catalogue that the recipe names are fetched. Raises UserError for what any step refuses, as early as it can
    be known, and for a folder that holds another run.
    """
    seconds: dict[str, float] = {}
    Run.create(out).close()  # a folder of something else is refused before anything is fetched
    if recipe.evaluate.compare.questions:
        read_questions(recipe.evaluate.compare.questions, CompareConfig())
    if recipe.evaluate.tasks and (names := [each for each in recipe.evaluate.tasks.names if not _is_made(each, out)]):
        open_tasks(names, recipe.evaluate.tasks)
    _fetch_models(recipe, accept_licence)
    check_early(out, recipe.curate)
    for step, do in (("curate", _curate), ("train", _train), ("evaluate", _evaluate)):
        with timed(step, seconds):
            do(recipe, out)
        write_json(out / "times.json", _longest(out / "times.json", seconds))
    with Run.create(out) as run:
        run.configure("recipe", {"name": name, "about": recipe.about}, free=("*",))
    report = write_report(out)
    return ChainResult(run=out, report=report, findings=headline(out), seconds=seconds)


def _is_made(task: str, out: Path) -> bool:
    """Say whether a task, FILE or FILE:SCORING, is of rows that the recipe itself makes: they are not there yet."""
    path = Path(task.rpartition(":")[0] or task).expanduser().resolve()
    return path == out.resolve() or path.is_relative_to((out / "curate").resolve())


def _fetch_models(recipe: RecipeConfig, accept_licence: bool) -> None:
    """Fetch the catalogue's models that the recipe names; a student that is not there and a licence are refused before any download."""
    curate = recipe.curate
    embedders = [step.embed.model for step in (curate.dedup, curate.select) if step]
    named = dict.fromkeys([recipe.teacher, recipe.train.model, *embedders])
    missing = [name for name in named if name in CATALOGUE and cached(name) is None]
    if recipe.train.model not in missing:
        resolve_model(recipe.train.model, revision=recipe.train.revision)
    for name in sorted(missing, key=lambda each: not CATALOGUE[each].must_accept):
        fetch(name, accept_licence=accept_licence)


def _curate(recipe: RecipeConfig, out: Path) -> None:
    room = out / "curate"
    digest = _digest(recipe, data=_content(recipe.data))
    before = read_done(room) if is_done(room) else {}
    if before and "made" not in before and before["settings"] == _former_digest(recipe):
        before = {"settings": digest, "made": _made(room)}
        mark_done(room, **before)
    if before.get("settings") == digest and before.get("made") == _made(room):
        log.info("curate: done already")
        return
    if before.get("settings") != digest:
        if is_done(out / "train"):
            raise UserError(f"{out}: its model was trained on other data than this recipe makes; give another folder with -o")
        (room / "done.json").unlink(missing_ok=True)  # else a stop on the way would leave files that it does not tell of
    build(recipe.data, out, recipe.curate)
    mark_done(room, settings=digest, made=_made(room))


def _digest(recipe: RecipeConfig, **data: str | None) -> str:
    settings = {**data, **to_mapping(recipe.curate)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _former_digest(recipe: RecipeConfig) -> str:
    """Return what told the data where `made` was not written yet: the name, and the content of a file."""
    path = Path(recipe.data)
    return _digest(recipe, data=recipe.data, content=hash_files(path) if path.is_file() else None)


def _content(data: str) -> str:
    """Return a hash of a file or of a folder's data, wherever it lies; `-` and a data set of the Hub go by their names."""
    return hash_files(path) if data != "-" and (path := find_source(data)).exists() else data


def _made(room: Path) -> str:
    """Return a hash of the data set and the held-out rows: a step that was run by hand has made others."""
    files = [room / name for name in ("dataset.jsonl", "heldout.jsonl")]
    return " ".join(hash_files(each)[:16] for each in files if each.exists())


def _train(recipe: RecipeConfig, out: Path) -> None:
    train(out / "curate" / "dataset.jsonl", recipe.train.model, out, part(recipe.train, TrainConfig), revision=recipe.train.revision)


def _evaluate(recipe: RecipeConfig, out: Path) -> None:
    start = out / "train" / "start"
    base = str(start) if start.is_dir() else _at(recipe.train.model, recipe.train.revision)
    models = {"base": base, "sft": str(out / "train" / "final")}
    if recipe.evaluate.teacher and recipe.teacher and recipe.curate.distill:
        models["teacher"] = _at(recipe.teacher, recipe.curate.distill.revision)
    if recipe.evaluate.loss:
        loss(out / "curate" / "heldout.jsonl", models, out, recipe.evaluate.loss)
    if recipe.evaluate.tasks:
        tasks = part(recipe.evaluate.tasks, TasksConfig)
        trained = tasks.train_data or str(out / "curate" / "dataset.jsonl")  # what of a task was trained on is told apart
        evaluate_tasks(models, recipe.evaluate.tasks.names, out, replace(tasks, train_data=trained))
    compare(models, _questions(recipe, out), out, part(recipe.evaluate.compare, CompareConfig))


def _at(model: str, revision: str | None) -> str:
    return f"{model}@{revision}" if revision else model


def _questions(recipe: RecipeConfig, out: Path) -> str | Path | None:
    """Return the questions of the comparison: the recipe's, then some of the held-out prompts, in one file where there are both."""
    step = recipe.evaluate.compare
    if not step.heldout_prompts:
        return step.questions
    asked = [each.messages for each in read_questions(step.questions, CompareConfig())]
    held = read_examples(out / "curate" / "heldout.jsonl")
    prompts = {json.dumps(split_prompt(each)[0]): split_prompt(each)[0] for each in held}
    path = out / "evaluate" / "questions.jsonl"
    lines = [
        json.dumps({"messages": messages}, ensure_ascii=False) for messages in [*asked, *list(prompts.values())[: step.heldout_prompts]]
    ]
    write_text(path, "\n".join(lines) + "\n")
    return path


def _longest(path: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Return the time that each step took in the call that did most of it: one that finds it done takes none."""
    before: dict[str, float] = read_json(path) if path.exists() else {}
    return {**before, **{step: round(max(value, before.get(step, 0.0)), 1) for step, value in seconds.items()}}
