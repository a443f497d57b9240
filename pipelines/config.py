"""The settings of a recipe: one section for each room, as the rooms' own commands have them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.config import load_config, read_yaml, setting
from ..core.errors import UserError, unknown_name
from ..curate.config import BuildConfig
from ..evaluate.config import CompareConfig, LossConfig, TasksConfig
from ..train.config import TrainConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class CompareStep(CompareConfig):
    """The comparison of a recipe: its settings and its questions."""

    questions: str | None = setting(None, "File of questions; three built-in ones when not given.")
    heldout_prompts: int = setting(0, "So many of the held-out prompts are asked as well.")


@dataclass(frozen=True, kw_only=True)
class TasksStep(TasksConfig):
    """The tasks of a recipe and how they are asked."""

    names: tuple[str, ...] = setting((), "Tasks, as for `sftkit evaluate tasks --tasks`: gsm8k, ifeval, humaneval, mmlu, FILE.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise UserError("evaluate.tasks: expected names, as names: [gsm8k, ifeval]")


@dataclass(frozen=True, kw_only=True)
class EvaluateStep:
    """What is measured before and after."""

    teacher: bool = setting(True, "Ask the teacher too, as the mark that the student is trained towards.")
    loss: LossConfig | None = field(default=None, metadata={"help": "Held-out loss; needs curate: {heldout: …}."})
    tasks: TasksStep | None = field(default=None, metadata={"help": "Tasks whose answers rules can judge; names: [gsm8k, …]."})
    compare: CompareStep = field(default_factory=CompareStep, metadata={"help": "Answers side by side."})


@dataclass(frozen=True, kw_only=True)
class TrainStep(TrainConfig):
    """The training of a recipe: its settings and the model it begins with."""

    model: str = field(metadata={"help": "The student: a folder, a Hub id, a .gguf file, a catalogue name."})
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """From prompts or rows to a model and a report."""

    about: str = setting("", "What this recipe shows; the report begins with it.")
    data: str = field(
        metadata={"help": "Prompts, where the recipe distills, else rows; a relative path is looked for beside the recipe first."}
    )
    curate: BuildConfig = field(metadata={"help": "The steps of `sftkit curate build`."})
    train: TrainStep = field(metadata={"help": "The settings of `sftkit train sft`, and `model`."})
    evaluate: EvaluateStep = field(default_factory=EvaluateStep, metadata={"help": "What is measured."})

    def __post_init__(self) -> None:
        if (self.evaluate.loss or self.evaluate.compare.heldout_prompts) and not self.curate.heldout:
            raise UserError("evaluate: needs rows that are not trained on; give curate: {heldout: {prompts: 100}}")

    @property
    def teacher(self) -> str | None:
        """Return the teacher's reference where its answers were distilled by a model on this machine."""
        distill = self.curate.distill
        return None if distill is None or distill.engine.engine == "openai" or distill.engine.base_url else distill.teacher


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """How a selection is held against its controls."""

    seeds: int = setting(3, "Trainings of each data set, with seeds of their own: they show how much is the training's luck.")
    equal_tokens: bool = setting(True, "Every data set trains for as many tokens as the selection, not for as many epochs.")
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "Settings of `sftkit train sft`; its seed is the first."})
    loss: LossConfig = field(default_factory=LossConfig, metadata={"help": "How the held-out loss is taken."})

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds: expected 1 or more, found {self.seeds}")


def known_recipes() -> dict[str, Path]:
    """Return the recipes that come with sftkit, by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str, *, full: bool = False) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with sftkit; with `full` that one's larger form.

    Raises UserError for what is neither, and for a recipe that has no larger form.
    """
    recipes = known_recipes()
    if full:
        if f"{name}-full" not in recipes:
            having = ", ".join(each.removesuffix("-full") for each in recipes if each.endswith("-full"))
            raise UserError(f"--full: {name} has no larger form, {having} has; leave out --full")
        return recipes[f"{name}-full"]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in recipes:
        return recipes[name]
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: no such file; recipes that come with sftkit are {', '.join(recipes)}")
    raise unknown_name("recipe", name, recipes)


def load_recipe(path: Path) -> RecipeConfig:
    """Read a recipe. Raises UserError, naming the file and the path of keys, for whatever is wrong in it."""
    values: dict[str, Any] = read_yaml(path)
    for section in (values, values.get("evaluate", {}).get("compare", {}) if isinstance(values.get("evaluate"), dict) else {}):
        for name in ("data", "questions"):
            text = section.get(name) if isinstance(section, dict) else None
            if isinstance(text, str) and text.strip() not in ("", "-") and (path.parent / text).exists():
                section[name] = str((path.parent / text).resolve())
    return load_config(RecipeConfig, values, str(path))
