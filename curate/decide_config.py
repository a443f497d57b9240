"""The settings of the steps that decide what is kept, and of the vectors that some of them compare."""

import re
from dataclasses import dataclass, field
from typing import Any

from ..core.config import setting
from ..core.engines.base import EXECUTORS
from ..core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """How one answer (or `keep` of them) is chosen for each prompt."""

    by: tuple[str, ...] = setting((), "Score to choose by, highest first; `-NAME` lowest first; `random`. Several: the first decides.")
    majority: bool = setting(False, "First keep the answer that most samples of the prompt agree on, then choose among those by --by.")
    answers: str = setting("numeric", "The score whose detail is the answer that is voted on.")
    min_share: float = setting(0.0, "Share of the votes the majority answer needs, else none of the prompt's samples is kept.")
    gate: tuple[str, ...] = setting((), "Only samples that pass are eligible: NAME (1 or more), NAME>=x, NAME<=x, NAME>x, NAME<x.")
    keep: int = setting(1, "Samples kept for each prompt, at most.")
    keep_all: bool = setting(False, "Keep every eligible sample: with --gate all that are correct.")
    min_pass_rate: float | None = setting(None, "Smallest share of a prompt's samples that pass the gates, else none of them is kept.")
    max_pass_rate: float | None = setting(None, "Largest such share: above it a prompt is too easy.")
    min_margin: float | None = setting(
        None, "How far the best must be above the median of the prompt's eligible samples, by the first --by."
    )
    controls: bool = setting(False, "Also write random samples of the same prompts, and of the same lengths, to curate/controls/.")
    seed: int = setting(0, "Seed of `random` and of controls.")

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep: expected 1 or more, found {self.keep}")
        if not self.by and not self.majority and not self.keep_all:
            raise UserError("say how to choose: --by SCORE (highest first), --by random, --majority, or --gate SCORE --keep-all")
        for name in ("min_pass_rate", "max_pass_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}: expected a share between 0 and 1, found {value}")
            if value is not None and not self.gate:
                raise UserError(f"{name}: say what passes, as --gate numeric")
        if self.min_margin is not None and not self.by:
            raise UserError("min_margin: say by which score, as --by logprob")
        if not 0 <= self.min_share <= 1:
            raise UserError(f"min_share: expected a share between 0 and 1, found {self.min_share}")
        for text in self.gate:
            parse_gate(text)


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on a score."""

    name: str
    relation: str
    threshold: float

    def passes(self, value: Any) -> Any:
        """Say whether a value, or each of a column, meets the condition."""
        relations = {">=": value >= self.threshold, "<=": value <= self.threshold, ">": value > self.threshold, "<": value < self.threshold}
        return relations[self.relation]


def parse_gate(text: str) -> Gate:
    """Read NAME or NAME>=x. NAME alone means 1 or more."""
    match = re.fullmatch(r"\s*([\w.+-]+?)\s*(?:(>=|<=|>|<)\s*([-+.\deE]+)\s*)?", text)
    try:
        if match:
            return Gate(match[1], match[2] or ">=", float(match[3] or 1))
    except ValueError:
        pass
    raise UserError(f"gate {text!r}: expected NAME, NAME>=x, NAME<=x, NAME>x or NAME<x")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The rules, in the order in which they are asked. They judge the answer; of a row without one, its prompt."""

    truncated: bool = setting(True, "Reject answers that were cut at the longest length.")
    min_tokens: int | None = setting(None, "Fewest tokens, where the teacher counted them (else `score --with num_tokens:model=…`).")
    max_tokens: int | None = setting(None, "Most tokens.")
    empty: bool = setting(True, "Reject rows without text.")
    min_chars: int | None = setting(None, "Fewest characters.")
    max_chars: int | None = setting(None, "Most characters.")
    min_words: int | None = setting(None, "Fewest words; a character of Chinese or Japanese is a word.")
    max_words: int | None = setting(None, "Most words.")
    include: tuple[str, ...] = setting((), "Regular expression that the text must match; several: one of them.")
    exclude: tuple[str, ...] = setting((), "Regular expression that the text must not match.")
    languages: tuple[str, ...] = setting((), "Language to keep, as en. A heuristic by script and, in the Latin script, function words.")
    min_language_share: float = setting(0.5, "Smallest share of the words in the scripts of those languages; code in fences aside.")
    refusal: bool = setting(True, "Reject refusals and disclaimers (as an AI, I cannot), by English and Chinese phrases.")
    repetition: bool = setting(True, "Reject texts that repeat themselves, by the two shares below.")
    max_duplicate_ngrams: float = setting(0.5, "Largest share of 10-word windows that stood in the text before.")
    max_top_ngram: float = setting(0.5, "Largest share of the words in one 2-, 3- or 4-gram, in texts of 50 words or more.")
    min_score: dict[str, float] = field(default_factory=dict, metadata={"help": "Lowest value of a score, as {numeric: 1}."})
    max_score: dict[str, float] = field(default_factory=dict, metadata={"help": "Highest value of a score."})
    where: tuple[str, ...] = setting((), "Condition that a row must meet, as 'num_tokens < 800 and ifd < 1', or 'NAME: CONDITION'.")
    presets: tuple[str, ...] = setting(
        (), "Named condition: correct, whole, prompt-helps (ifd < 1), alpagasus (judge >= 4.5 of 5), short-tokens."
    )
    keep_unscored: bool = setting(False, "Keep rows of which a condition says nothing, as a value is missing; else they are rejected so.")
    controls: bool = setting(False, "Also write random rows, and random rows of the same lengths, to curate/controls/.")
    seed: int = setting(0, "Seed of controls.")

    def __post_init__(self) -> None:
        bounds = {unit: (getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")) for unit in ("tokens", "chars", "words")}
        bounds |= {name: (lowest, self.max_score.get(name)) for name, lowest in self.min_score.items()}
        for name, (lowest, highest) in bounds.items():
            if lowest is not None and highest is not None and lowest > highest:
                raise UserError(f"filter: no row has {lowest:g} {name} or more and {highest:g} or less; turn the two around")
        for name in ("min_language_share", "max_duplicate_ngrams", "max_top_ngram"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: expected a share between 0 and 1, found {getattr(self, name)}")


TEXTS = ("pair", "prompt")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How texts become vectors."""

    model: str = setting("all-minilm-l6-v2", "A sentence-transformers model: a catalogue name, a folder or a Hub id.")
    max_seq_length: int = setting(256, "Tokens of a text that the embedder reads; the rest of it is not compared.")
    dtype: str = setting(
        "auto", "Number format; auto is bfloat16 where the processor multiplies it itself.", choices=("auto", "bfloat16", "float32")
    )
    batch_tokens: int = setting(2048, "Tokens in one batch on a CPU; a GPU takes 32 times as many.")
    device: str | None = setting(None, "Where the embedder runs: cpu, cuda; found by itself when not given, on a Ray cluster cpu.")
    replicas: str | int | None = setting(None, "Processes with the embedder, spread over the GPUs; auto: one for each GPU.")
    executor: str = setting("local", "Where such processes run: local, or ray, on the machines of a Ray cluster.", choices=EXECUTORS)
    ray_address: str | None = setting(None, "Address of the Ray cluster, as auto or ray-head:6379; this machine's own when not given.")

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected a whole number above 0, found {getattr(self, name)}")


def _check_memory(memory_gb: float | None) -> None:
    if memory_gb is not None and not 0 < memory_gb < float("inf"):
        raise UserError(f"memory_gb: expected more than 0, found {memory_gb:g}")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """What counts as the same row."""

    exact: bool = setting(True, "Remove rows whose text is the same after NFKC, case folding and collapse of white space.")
    minhash: float | None = setting(None, "Remove rows whose 5-word shingles have this Jaccard similarity with a kept row's, as 0.8.")
    candidates: str = setting(
        "exact", "What proposes near duplicates: exact misses none; lsh takes 25 bands of 10 MinHashes.", choices=("exact", "lsh")
    )
    semantic: float | None = setting(0.95, "Remove rows whose cosine with a kept row is this or more; null skips the embeddings.")
    on: str = setting("pair", "What is compared: prompt and answer, or the prompt alone.", choices=TEXTS)
    by: tuple[str, ...] = setting((), "Score that decides which of two stays, highest first (`-NAME` lowest); else the earlier one stays.")
    against: str | None = setting(None, "A second set, never changed: rows that one of its rows stands for are removed too.")
    memory_gb: float | None = setting(None, "Most memory for comparing vectors, in GB; more is refused before it begins.")
    embed: EmbedConfig = field(default_factory=EmbedConfig, metadata={"help": "How texts become vectors."})

    def __post_init__(self) -> None:
        for name, measure in (("minhash", "a Jaccard similarity"), ("semantic", "a cosine")):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}: expected {measure} above 0 and up to 1, found {value}; a distance of d is given as 1 - d")
        _check_memory(self.memory_gb)
        if not self.exact and self.minhash is None and self.semantic is None:
            raise UserError("dedup: neither exact nor semantic is asked for, nor minhash, so there is nothing to do")


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """What counts as a copy of a benchmark's item."""

    benchmarks: tuple[str, ...] = setting(
        ("gsm8k", "ifeval", "mmlu", "humaneval", "mt-bench"), "Benchmark to look for: one of those that come along, or a data file."
    )
    ngram: int = setting(8, "Words in a row that count as copied: 8 finds more, 13 is the stricter and older measure.")
    min_coverage: float = setting(0.5, "Share of an item's words that copied runs must cover; 0: any copied run will do.")
    on: str = setting("pair", "Where copies are looked for: in every turn, or in all but the answer.", choices=TEXTS)

    def __post_init__(self) -> None:
        if self.ngram < 8:
            raise UserError(f"ngram: expected 8 words or more (13 is the other usual one), found {self.ngram}")
        if not 0 <= self.min_coverage <= 1:
            raise UserError(f"min_coverage: expected a share between 0 and 1, found {self.min_coverage}")
        if not self.benchmarks:
            raise UserError("decontaminate: no benchmark is given; without the section `decontaminate` nothing is looked for")


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """Which prompts are set aside for evaluation."""

    prompts: int = setting(100, "Prompts to set aside, with all their answers.")
    seed: int = setting(0, "Decides which ones, together with their content.")

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise UserError(f"prompts: expected 1 or more, found {self.prompts}")


SELECTORS = {  # what each method needs: "vectors" of the texts, scores to choose "by"
    "k-center": {"vectors"},
    "facility-location": {"vectors"},
    "qdit": {"vectors", "by"},
    "mmr": {"vectors", "by"},
    "dpp": {"vectors"},
    "deita": {"vectors", "by"},
    "stratified": set(),
    "cluster-balanced": {"vectors"},
    "longest": set(),
    "top": {"by"},
    "random": set(),
}
STRATA = ("source", "length", "cluster")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which rows are taken, and how many."""

    method: str = setting("k-center", "How rows are ranked; the list above says what each does.", choices=tuple(SELECTORS))
    budget: int | None = setting(None, "Rows to take.")
    budget_tokens: int | None = setting(None, "Tokens of answers to take: the longest beginning of the ranking that fits.")
    on: str = setting("pair", "What is compared: prompt and answer, or the prompt alone.", choices=TEXTS)
    by: tuple[str, ...] = setting((), "Score that says which rows are better, highest first (`-NAME` lowest). Several: the first decides.")
    quality_weight: float = setting(0.5, "Weight of the score in qdit, mmr and dpp, from 0 (difference alone) to 1 (score alone).")
    epsilon: float | None = setting(
        None, "facility-location and qdit look at a random few for each pick and lose about this share: for a million rows on a GPU."
    )
    fast: bool = setting(
        False, "facility-location and qdit count the rows nearest to each exactly, and what is far by a sample: many times faster."
    )
    memory_gb: float | None = setting(None, "Most memory for comparing vectors, in GB: what fits is planned, or refused before it begins.")
    max_cosine: float = setting(0.9, "Cosine with a taken row from which deita leaves a row out.")
    strata: tuple[str, ...] = setting(STRATA, "What stratified gives shares by.", choices=STRATA)
    clusters: int | None = setting(None, "Clusters of stratified and cluster-balanced; when not given the root of the number of rows.")
    controls: bool = setting(False, "Also write random rows, and random rows of the same lengths, to curate/controls/.")
    seed: int = setting(0, "Seed of what is drawn: random, controls, clusters, the order within them.")
    embed: EmbedConfig = field(default_factory=EmbedConfig, metadata={"help": "How texts become vectors."})

    @property
    def needs_vectors(self) -> bool:
        """Say whether texts are embedded."""
        return "vectors" in SELECTORS[self.method] or (self.method == "stratified" and "cluster" in self.strata)

    def __post_init__(self) -> None:
        if self.budget is None and self.budget_tokens is None:
            raise UserError("select: give --budget ROWS or --budget-tokens TOKENS")
        for name in ("budget", "budget_tokens", "clusters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"seed: expected 0 or more, found {self.seed}")
        if "by" in SELECTORS[self.method] and not self.by:
            raise UserError(f"select: {self.method} needs a score to choose by: give --by SCORE")
        if not 0 <= self.quality_weight <= 1:
            raise UserError(f"quality_weight: expected a share between 0 and 1, found {self.quality_weight}")
        if self.epsilon is not None and not 0 < self.epsilon < 1:
            raise UserError(f"epsilon: expected a share between 0 and 1, as 0.1, found {self.epsilon:g}")
        _check_memory(self.memory_gb)
        if self.epsilon is not None and self.fast:
            raise UserError("select: epsilon and fast are two ways to be faster; give one of them")
        if not 0 < self.max_cosine <= 1:
            raise UserError(f"max_cosine: expected a cosine above 0 and up to 1, found {self.max_cosine}")
        if not self.strata:
            raise UserError(f"strata: expected some of {', '.join(STRATA)}")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How much of each source is taken."""

    shares: dict[str, float] = field(default_factory=dict, metadata={"help": "Share of each source, as {a: 3, b: 1}; 0 leaves one out."})
    temperature: float = setting(1.0, "Without shares: sources count by their size to the power 1/temperature; 1 as they are, more: alike.")
    budget: int | None = setting(None, "Rows to take; when not given, as many as the smallest source allows.")
    budget_tokens: int | None = setting(None, "Tokens of answers to take.")
    repeat: int = setting(1, "Times that a row may be taken, at most; 1: no row is repeated.")
    seed: int = setting(0, "Decides which rows of a source are taken, together with their ids.")

    def __post_init__(self) -> None:
        for name in ("budget", "budget_tokens", "repeat"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.budget is not None and self.budget_tokens is not None:
            raise UserError("mix: give a budget in rows or in tokens, not both")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature: expected more than 0, found {self.temperature}")
        wrong = [part for part, share in self.shares.items() if share < 0]
        if wrong or (self.shares and not sum(self.shares.values())):
            raise UserError(f"shares: expected numbers of 0 or more, one of them above; found {self.shares}")
