"""The settings of evaluations, apart from the code so that the command line's help needs none of its libraries."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.config import setting
from ..core.engines.base import EngineConfig
from ..core.errors import UserError

MODEL_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """How the models are asked. Answers are greedy: what a model says is then a fact about it, not about luck."""

    system: str | None = setting(None, "System message, put before every question that has none.")
    max_new_tokens: int = setting(100, "Longest answer, in tokens; a longer one is cut and did not stop.")
    limit: int | None = setting(None, "Only the first questions of the file.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the models are run."})

    def __post_init__(self) -> None:
        _at_least_one(self, "max_new_tokens", "limit")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the held-out loss is taken, and how its intervals are."""

    text: bool = setting(False, "Score the texts themselves as they stand, without a template: what a model keeps of a language at large.")
    limit: int | None = setting(None, "Only the first rows of the file.")
    resamples: int = setting(10_000, "Resamples of the prompts that the 95 % intervals are taken from.")
    seed: int = setting(0, "Decides the resamples.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the models are run."})

    def __post_init__(self) -> None:
        _at_least_one(self, "limit")
        _check_draws(self.resamples, self.seed)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges stored answers, by what, and on which labelled pairs it shows what it is worth."""

    judge: str = field(metadata={"help": "The model that judges: a folder, a Hub id, a catalogue name, a server's model."})
    rubric: str = setting(
        "helpfulness", "What is better: helpfulness, correctness, instructions, quality, a text file, or the rubric itself in words."
    )
    parse: bool = setting(False, "Read what the judge writes, as from a server, instead of its probabilities.")
    references: str | None = setting(None, "Data file with right answers, which the judge is shown: it needs them for maths and code.")
    calibrate: str = setting("llmbar", "Labelled pairs that it judges too: llmbar, a file (input, output_1, output_2, label), or none.")
    calibrate_limit: int | None = setting(20, "Only the first labelled pairs of each subset.")
    limit: int | None = setting(None, "Only the first questions.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the judge is run."})

    def __post_init__(self) -> None:
        _at_least_one(self, "calibrate_limit", "limit")


ASK = ("auto", "chat", "completion", "both")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """How tasks are asked and compared."""

    limit: int | None = setting(None, "Only the first questions of each task.")
    ask: str = setting(
        "auto", "As a chat, as a text to go on from, or both; auto is chat, and both for a model without its own template.", choices=ASK
    )
    shots: int = setting(5, "Worked examples before a question that is asked as a text, where the task has some.")
    samples: int = setting(1, "Answers to each question: 1 is greedy, more are drawn and give pass@k and maj@k.")
    temperature: float = setting(0.8, "Of the answers, where there are several.")
    top_p: float = setting(0.95, "Of the answers, where there are several.")
    max_new_tokens: int | None = setting(None, "Longest answer, in tokens; each task's own when not given.")
    train_data: str | None = setting(None, "What a model was trained on: scores are given without the questions that are in it, too.")
    judge: str | None = setting(None, "Model that grades the answers of mt_bench, and of rows whose scoring is judge.")
    rubric: str = setting("helpfulness", "What the judge grades by: a name as for `evaluate judge`, a text file, or the rubric in words.")
    unsafe: bool = setting(False, "Run the programs in answers without a sandbox. They can do whatever you can.")
    workers: int = setting(2, "Programs that run at once.")
    lm_eval_tasks: str | None = setting(None, "Folder of your own tasks for lm-eval, beside those that it has.")
    resamples: int = setting(10_000, "Resamples that the 95 % intervals of scores are taken from.")
    seed: int = setting(0, "Decides the resamples, and the answers where there are several.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the models are run."})
    judge_engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the judge is run."})

    def __post_init__(self) -> None:
        _at_least_one(self, "limit", "samples", "max_new_tokens", "workers")
        if self.shots < 0:
            raise UserError(f"shots: expected 0 or more, found {self.shots}")
        if self.samples > 1 and self.temperature <= 0:
            raise UserError(f"temperature: {self.samples} samples need one above 0, or they are all the same; found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a share above 0 and up to 1, found {self.top_p:g}")
        _check_draws(self.resamples, self.seed)


def _check_draws(resamples: int, seed: int) -> None:
    if resamples < 1000:
        raise UserError(f"resamples: expected 1000 or more, found {resamples}: the ends of a 95 % interval need them")
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, found {seed}")


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: expected 1 or more, found {value}")


def parse_models(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=REF`, one for each model, in their order. Raises UserError for another form, or a name given twice."""
    models: dict[str, str] = {}
    for text in texts:
        name, equals, reference = text.partition("=")
        if not equals or not reference or not MODEL_NAME.fullmatch(name):
            raise UserError(f"--model {text!r}: expected NAME=REF, as base={text if not equals and text else 'MODEL'}; a NAME is one word")
        if name in models:
            raise UserError(f"--model {text!r}: the name {name!r} was given before, for {models[name]}; each model needs its own")
        models[name] = reference
    if not models:
        raise UserError("no model was given: expected --model NAME=REF, as --model base=MODEL")
    return models
