"""The settings of curation's steps, apart from the steps so that the command line's help needs none of their libraries.

Those of the steps that decide stand in decide_config.py.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.checks.schema import check_schema
from ..core.config import part, setting
from ..core.engines.base import EngineConfig, Sampling
from ..core.errors import UserError
from ..core.patterns import Pattern
from .decide_config import BestConfig, DecontaminateConfig, DedupConfig, FilterConfig, HeldoutConfig, SelectConfig

REASONING = ("apart", "inline")
FORMATS = {"####": r"####\s*[-+$]?[\d.]", "boxed": r"\\boxed\s*\{"}


def format_pattern(wanted: str | None) -> Pattern | None:
    """Return what is searched for in an answer that should have a format. Raises UserError for what is no regular expression."""
    known = f"want_format (by name known: {', '.join(FORMATS)}): "
    return None if wanted is None else Pattern(known, FORMATS.get(wanted, wanted), re.MULTILINE)


def read_schema(given: str) -> str:
    """Return a JSON schema, given as its text or as a file, in a canonical form. Raises UserError for what is none."""
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"json_schema {given}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UserError(f"json_schema {given[:60]}: is no JSON ({error})") from None
    if not isinstance(schema, dict):
        raise UserError(f'json_schema {given[:60]}: expected an object, as {{"type": "object"}}, found {type(schema).__name__}')
    check_schema("", schema)
    return json.dumps(schema, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Sampling):
    """What is asked of which teacher. All but k, the limits and the engine is fixed once the run folder has begun."""

    teacher: str = field(metadata={"help": "The model that answers: a folder, a Hub id, a .gguf file, a catalogue name, a server's model."})
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model; of a served one a name for what it is.")
    k: int = setting(1, "Samples for each prompt. More than last time generates only the new ones.")
    system: str | None = setting(None, "System message, put before every prompt that has none.")
    thinking: bool = setting(False, "Render the prompt so that a thinking teacher thinks.")
    limit: int | None = setting(None, "Only the first prompts of the file.")
    logprobs: bool = setting(
        False,
        "Store each answer's log-probability, which the score logprob reads; vLLM and servers are a tenth to a third slower with it."
        " (The transformers engine has it for nothing.) Samples that are there stay as they are.",
    )
    retry_truncated: bool = setting(False, "Ask once more for each cut answer, with twice the tokens; the longer one then counts.")
    budget_tokens: int | None = setting(None, "Most tokens generated into this run folder, over all calls.")
    budget_hours: float | None = setting(
        None, "Longest time of asking in one call, in hours; what is under way then has a minute, or a twentieth of it, to finish."
    )
    budget_cost: float | None = setting(None, "Most that this run folder may cost, over all calls, by the prices below.")
    price_input: float = setting(0.0, "Price of a million tokens of prompts; the currency is yours.")
    price_output: float = setting(0.0, "Price of a million tokens of answers.")
    price_hour: float = setting(0.0, "Price of an hour of generating, as of a rented GPU; counted in each call from its start.")
    max_failed: float = setting(0.01, "Share of failed samples above which the command ends with exit code 3.")
    reasoning: str = setting(
        "apart",
        "A thinking teacher's thoughts: apart, in the store alone, or inline, before the answer in the data set.",
        choices=REASONING,
    )
    want_format: str | None = setting(
        None, "What every answer should hold: '####' and a number, boxed (\\boxed{…}), or a regular expression."
    )
    stop_below: float | None = setting(
        None, "First ask 50 prompts; stop unless this share of the answers ended by themselves and hold the wanted format or schema."
    )
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the teacher is run."})

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_new_tokens", 1), ("limit", 1), ("budget_tokens", self.max_new_tokens), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                why = " (one answer can take max_new_tokens)" if name == "budget_tokens" else ""
                raise UserError(f"{name}: expected {least} or more{why}, found {value}")
        if self.budget_hours is not None and not self.budget_hours > 0:
            raise UserError(f"budget_hours: expected more than 0, found {self.budget_hours:g}")
        for name in ("price_input", "price_output", "price_hour"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 or more, found {getattr(self, name):g}")
        if self.budget_cost is not None and not (self.budget_cost > 0 and self.priced):
            raise UserError(
                "budget_cost: expected more than 0, and a price: price_input and price_output (a million tokens), or price_hour"
            )
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: expected 0 (greedy) or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a share above 0 and up to 1, found {self.top_p}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed: expected a share between 0 and 1, as 0.01, found {self.max_failed}")
        if self.stop_below is not None and not 0 <= self.stop_below <= 1:
            raise UserError(f"stop_below: expected a share between 0 and 1, as 0.9, found {self.stop_below:g}")
        format_pattern(self.want_format)
        if self.json_schema is not None:  # its content decides, wherever it lies
            object.__setattr__(self, "json_schema", read_schema(self.json_schema))
        if self.temperature == 0 and self.k > 1:
            raise UserError(f"k is {self.k} at temperature 0: all samples of a prompt would be the same; raise the temperature or give k 1")

    @property
    def priced(self) -> bool:
        """Say whether anything has a price."""
        return self.price_input > 0 or self.price_output > 0 or self.price_hour > 0

    def cost(self, written: float, read: float, seconds: float = 0.0) -> float:
        """Return what tokens of answers, tokens of prompts and the time cost."""
        return (written * self.price_output + read * self.price_input) / 1e6 + seconds / 3600 * self.price_hour

    def hours(self, written: float, read: float) -> float | None:
        """Return the hours that the budgets leave a call, after tokens of answers and of prompts that have cost already; None without."""
        paid = self.budget_cost is not None and self.price_hour > 0
        left = max(0.0, (self.budget_cost or 0.0) - self.cost(written, read)) / self.price_hour if paid else None
        return min((each for each in (self.budget_hours, left) if each is not None), default=None)

    @property
    def sampling(self) -> Sampling:
        """What decides an answer, without the rest."""
        return part(self, Sampling)


METHODS = {  # the ROUGE-L from which on a prompt counts as another's copy: a deepened one shares much with its parent
    "self-instruct": 0.7,
    "magpie": 0.7,
    "evol": 0.9,
    "documents": 0.7,
    "converse": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class GrowConfig(Sampling):
    """How new prompts are had from a teacher."""

    teacher: str = field(
        metadata={"help": "The model that writes prompts: a folder, a Hub id, a .gguf file, a catalogue name, a server's model."}
    )
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    method: str = setting("self-instruct", "Where prompts come from; the list above says what each does.", choices=tuple(METHODS))
    count: int = setting(100, "Prompts to have in the end. More than last time goes on from there.")
    per_ask: int = setting(8, "Prompts to ask for at once (self-instruct, documents).")
    rounds: int | None = setting(
        None, "Most rounds; for evol the times that a prompt is deepened, for converse the user turns added (1 when not given)."
    )
    similarity: float | None = setting(None, "ROUGE-L with a seed or another prompt from which on one is left out; 0.7, for evol 0.9.")
    min_words: int = setting(3, "Fewest words of a prompt.")
    max_words: int = setting(150, "Most words of a prompt.")
    chunk_words: int = setting(300, "Words of a passage that is asked about (documents).")
    system: str | None = setting(None, "System message for the teacher; for magpie the one that its users would have set.")
    thinking: bool = setting(False, "Render the request so that a thinking teacher thinks.")
    limit: int | None = setting(None, "Only the first seeds of the file.")
    budget_tokens: int | None = setting(None, "Most tokens generated into this run folder, over all calls.")
    max_failed: float = setting(0.01, "Share of failed requests above which the command ends with exit code 3.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the teacher is run."})

    @property
    def threshold(self) -> float:
        """Return the ROUGE-L from which on a prompt is a duplicate."""
        return METHODS[self.method] if self.similarity is None else self.similarity

    def __post_init__(self) -> None:
        for name in ("count", "per_ask", "rounds", "min_words", "max_words", "chunk_words", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected 1 or more, found {value}")
        if self.min_words > self.max_words:
            raise UserError(f"max_words: expected min_words ({self.min_words}) or more, found {self.max_words}: no prompt would be kept")
        if not 0 < self.threshold <= 1:
            raise UserError(f"similarity: expected a ROUGE-L above 0 and up to 1, found {self.similarity}")


@dataclass(frozen=True, kw_only=True)
class RankConfig(Sampling):
    """Which teachers are compared, on what, and what counts as an accepted answer."""

    teachers: dict[str, str] = field(
        metadata={"help": "Teachers by name: a folder, a Hub id, a .gguf file, a catalogue name, or MODEL@http://… at a server."}
    )
    prompts: int = setting(200, "Prompts that all of them answer, evenly spaced over the file.")
    k: int = setting(1, "Answers to each.")
    scorers: dict[str, dict[str, Any] | None] = field(
        default_factory=dict, metadata={"help": "Scores by name, as for `score`: what can accept an answer."}
    )
    accept: str | None = setting(
        None,
        "Which answers count: NAME (1 or more), NAME>=x, NAME<=x, NAME>x, NAME<x; else the first scorer's; else all that ended.",
    )
    student: str | None = setting(None, "Model that is to learn from them: its log-probability of each accepted answer is compared.")
    prices: dict[str, list[float]] = field(
        default_factory=dict, metadata={"help": "By teacher: the prices of a million tokens of prompts and of answers."}
    )
    system: str | None = setting(None, "System message, put before every prompt that has none.")
    thinking: bool = setting(False, "Render the prompt so that a thinking teacher thinks.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the teachers are run."})

    @property
    def gate(self) -> str | None:
        """Return the condition of an accepted answer; None where all that ended with words are."""
        return self.accept or next(iter(self.scorers), None)

    def __post_init__(self) -> None:
        if not self.teachers:
            raise UserError("teacher-rank: give teachers, as --teacher small=MODEL --teacher large=OTHER")
        for name in ("prompts", "k"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        for name, price in self.prices.items():
            if len(price) != 2 or min(price) < 0:
                raise UserError(f"price of {name}: expected two numbers, of prompts and of answers, found {price}")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How the rows of a data file are taken in."""

    samples: tuple[str, ...] = setting(
        (), "Column that holds one candidate answer, a text or {solution: …} / {text: …}; one for each sample."
    )
    prompt_column: str | None = setting(None, "Column of the prompt, where it has no usual name.")
    answer_column: str | None = setting(None, "Column of the answer, where it has no usual name.")
    reference_column: str | None = setting(None, "Column of the reference answer, where it has no usual name.")
    format: str | None = setting(None, "Format of the rows; found by itself when not given.")
    limit: int | None = setting(None, "Only the first rows.")
    max_failed: float = setting(
        0.0, "Share of rows that cannot be read above which the command ends with exit code 3; with 0 it ends at the first, taking none in."
    )

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit: expected 1 or more, found {self.limit}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed: expected a share between 0 and 1, as 0.01, found {self.max_failed}")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which scores to attach."""

    scorers: dict[str, dict[str, Any] | None] = field(
        default_factory=dict,
        metadata={
            "help": "Scores by name: the options of the scorer of that name, or of the one under `scorer:`; {numeric: {rule: strict}}."
        },
    )


EXPORTS = ("trl-messages", "prompt-completion", "preference", "alpaca", "sharegpt", "openai", "llama-factory", "parquet")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """In which format a data set is written, and how pairs are made."""

    format: str = setting("trl-messages", "What is written; the list above says for whom.", choices=EXPORTS)
    by: tuple[str, ...] = setting((), "Preference: score by which a sample is better, highest first (`-NAME` lowest); else that of `best`.")
    rejected: str = setting("worst", "Preference: which lower sample of a prompt is rejected.", choices=("worst", "next", "random"))
    min_margin: float = setting(0.0, "Preference: least difference of the scores of a pair.")
    seed: int = setting(0, "Seed of `random`.")
    push_to_hub: str | None = setting(None, "Data set of the Hub that the folder is uploaded to, made private if new: ORGANISATION/NAME.")

    def __post_init__(self) -> None:
        if self.min_margin < 0:
            raise UserError(f"min_margin: expected 0 or more, found {self.min_margin}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The steps of a build, in their order; a step that is not given is skipped."""

    distill: DistillConfig | None = field(default=None, metadata={"help": "Ask a teacher; else the rows are taken in as they are."})
    intake: ImportConfig | None = field(default=None, metadata={"help": "How rows are taken in, without `distill`."})
    score: ScoreConfig | None = field(default=None, metadata={"help": "Attach scores."})
    best: BestConfig | None = field(default=None, metadata={"help": "Choose among the samples of each prompt."})
    filter: FilterConfig | None = field(default=None, metadata={"help": "Reject rows by rules."})
    decontaminate: DecontaminateConfig | None = field(
        default_factory=DecontaminateConfig, metadata={"help": "Remove rows that hold an item of a benchmark; null leaves them in."}
    )
    dedup: DedupConfig | None = field(default_factory=DedupConfig, metadata={"help": "Remove duplicates."})
    heldout: HeldoutConfig | None = field(default=None, metadata={"help": "Set prompts aside for evaluation."})
    select: SelectConfig | None = field(default=None, metadata={"help": "Take the rows that fit a budget."})

    def __post_init__(self) -> None:
        if self.distill and self.intake:
            raise UserError("build: rows are distilled or taken in; give one of the sections distill and intake")
