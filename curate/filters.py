"""Reject rows by named rules: length, cut, empty, refusing, repeating, in another language, by pattern, by score, by any condition."""

import functools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import polars as pl

from ..core.config import to_mapping
from ..core.errors import unknown_name
from ..core.ngrams import CHINESE_WORD, WORD
from ..core.ngrams import PLAIN as PLAIN_WORDS
from ..core.patterns import Pattern
from ..core.progress import Progress
from ..core.run import Run
from .controls import clear_controls, write_controls_of
from .decide_config import FilterConfig
from .decided import Outcome, decision_table, record
from .expressions import Condition, Kind, parse_condition
from .repeats import JUDGED, TOPS, WINDOW, duplicate_ngrams, may_repeat, top_ngram
from .rows import KEY, input_rows
from .score import SCORERS, known_scores, read_score
from .scored import READ_OFF, columns_for, score_values
from .scorers import count_words
from .text_scores import REFUSAL_CHARS, REFUSAL_SIGNS, REFUSALS

LATIN = ("LATIN",)
SCRIPTS = {  # the scripts a language is written in, by the names that Unicode gives their letters
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ko": ("HANGUL", "CJK"), "th": ("THAI",),
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "bg": ("CYRILLIC",), "el": ("GREEK",), "he": ("HEBREW",),
    "ar": ("ARABIC",), "fa": ("ARABIC",), "ur": ("ARABIC",), "hi": ("DEVANAGARI",), "bn": ("BENGALI",), "ta": ("TAMIL",),
    "en": LATIN, "de": LATIN, "fr": LATIN, "es": LATIN, "it": LATIN, "pt": LATIN, "nl": LATIN, "pl": LATIN,
    "tr": LATIN, "id": LATIN, "vi": LATIN,
}  # fmt: skip
FUNCTION_WORDS = {  # what tells the languages of the Latin script apart, in texts long enough to hold some
    "en": "the of and to in is that it for with as was are this be on by or you from",
    "de": "der die und das ist nicht ein eine zu den mit von sich auf für im auch es dem wie",
    "fr": "le la les et des est une un que dans pour qui pas sur avec plus du au ce par",
    "es": "el la los que y en un una es se por con para las del como más pero su al",
    "it": "il che di la un una per non sono con del della è le si gli nel anche più come",
    "pt": "o que e do da em um uma para com não os se na por mais as dos como ao",
    "nl": "de het een en van ik te dat die in niet zijn is op aan met voor er maar om",
    "pl": "się nie na jest to w z że do jak ale po od co przez być tak już dla oraz",
    "tr": "ve bir bu için ile da de çok olarak daha gibi olan ama en ne kadar sonra var mi o",
    "id": "yang dan di dengan untuk dari ini itu dalam pada tidak adalah ke akan atau juga oleh sebagai ada dapat",
    "vi": "và của là có không được cho một các với trong người này những để khi đã cũng từ như",
}
LANGUAGE_WORDS = 20  # fewer words of the Latin script are not judged further than by script

DETAIL = ".detail"  # after the name of a score: what the scorer said beside the value, or why there is none
TEXT_COLUMNS = ("source", "prompt", "response", "reference", "finish_reason")  # that a condition may name, beside the scores


Finding = tuple[str, float | None, float | None]  # rule, score, threshold


@dataclass(frozen=True, slots=True)
class TextRule:
    """What is wrong with a text, or None. Asked only of the texts that `suspect` leaves, and it leaves each one that is at fault."""

    judge: Callable[[str], Finding | None]
    suspect: pl.Expr | None = None  # over the column "text"


def filter_rows(run: Run, config: FilterConfig) -> Outcome:
    """Reject the rows that break a rule, as the stage "filter". The first rule broken names the rejection.

    A row of which a condition says neither yes nor no, as a value is missing, is rejected as unscored:CONDITION, or kept
    with `keep_unscored`; a note counts them.
    """
    conditions = read_conditions(run, config)
    bounds = [(name, "min", bound) for name, bound in config.min_score.items()]
    bounds += [(name, "max", bound) for name, bound in config.max_score.items()]
    tokens = ["num_tokens"] if config.min_tokens is not None or config.max_tokens is not None else []
    scores = [*tokens, *(name for name, _, _ in bounds)]
    named = [name for condition in conditions for name in condition.names]
    kinds = condition_kinds(run)
    scores = list(dict.fromkeys([*scores, *(name for name in named if kinds.get(name) == "number" and name != "sample_index")]))
    details = [name.removesuffix(DETAIL) for name in named if name in kinds and name.endswith(DETAIL)]
    wanted = [*KEY, "response", "finish_reason", *columns_for(run, [*scores, *details]), *(n for n in named if n in TEXT_COLUMNS)]
    wanted += ["meta"] if any(name.startswith("meta.") for name in named) else []
    rows = input_rows(run, "filter", list(dict.fromkeys(wanted)))
    if "prompt" not in rows.columns and rows["response"].null_count():  # a row without an answer is judged by its prompt
        rows = input_rows(run, "filter", list(dict.fromkeys([*wanted, "prompt"])))
    rules = text_rules(config)
    run.configure("filter", to_mapping(config), free=("*",))

    text = pl.coalesce("response", "prompt") if "prompt" in rows.columns else pl.col("response")
    sieve = _Sieve(rows.with_columns(*_values(run, rows, scores, named)).with_columns(text=text))
    notes = []
    with Progress("filter", total=len(rules) + len(bounds) + len(conditions) + 2, unit="rules") as progress:
        if config.truncated:
            sieve.take(pl.col("finish_reason") == "length", "truncated")
        progress.advance()
        if tokens:
            sieve.between("tokens", pl.col("score num_tokens"), config.min_tokens, config.max_tokens)
        progress.advance()
        for rule in rules:
            sieve.judge(rule)
            progress.advance()
        for name, side, bound in bounds:
            value = pl.col(f"score {name}")
            sieve.take(value.is_null(), "unscored", None, bound)
            sieve.take(value < bound if side == "min" else value > bound, f"{side}:{name}", value, bound)
            progress.advance()
        for condition in conditions:
            notes += sieve.meet(condition, config.keep_unscored)
            progress.advance()
    found = sieve.findings()
    told = {name: pl.col(name) for name in ("score", "threshold")}
    decisions = decision_table(rows.select(KEY).with_columns(found), "filter", pl.col("rule"), **told)
    clear_controls(run, "filter_")
    if config.controls:
        lengths = sieve.lengths
        notes += write_controls_of(run, "filter", decisions, lengths, config.seed, pl.Series([True]).new_from_index(0, len(rows)))
    return record(run, "filter", rows, decisions, notes)


class _Sieve:
    """Rows that no rule has found at fault yet, and what was found of the others."""

    def __init__(self, table: pl.DataFrame) -> None:
        self.left = table.with_row_index("row")
        self.lengths = table["text"].str.len_chars()
        self._found = [pl.DataFrame(schema={"row": pl.UInt32, "rule": pl.String, "score": pl.Float64, "threshold": pl.Float64})]

    def take(self, case: pl.Expr, rule: str, score: pl.Expr | None = None, threshold: float | None = None) -> int:
        """Find the rows of a case at fault; return how many they are."""
        marked = self.left.lazy().with_columns(at_fault=case.fill_null(value=False)).collect(engine="streaming")
        value = pl.lit(None, pl.Float64) if score is None else score.cast(pl.Float64)
        found = marked.filter("at_fault").select("row", rule=pl.lit(rule), score=value, threshold=pl.lit(threshold, pl.Float64))
        self._found.append(found)
        self.left = marked.filter(~pl.col("at_fault")).drop("at_fault")
        return len(found)

    def between(self, unit: str, value: pl.Expr, lowest: float | None, highest: float | None) -> None:
        """Find the rows at fault whose value is too low or too high, or missing."""
        self.take(value.is_null(), "unscored")
        if lowest is not None:
            self.take(value < lowest, f"min_{unit}", value, lowest)
        if highest is not None:
            self.take(value > highest, f"max_{unit}", value, highest)

    def judge(self, rule: TextRule) -> None:
        """Find the rows at fault whose text is."""
        texts = self.left.lazy() if rule.suspect is None else self.left.lazy().filter(rule.suspect)
        suspects = texts.select("row", "text").collect(engine="streaming")
        found = [(row, *finding) for row, text in suspects.iter_rows() if (finding := rule.judge(text))]
        self._found.append(pl.DataFrame(found, schema=self._found[0].schema, orient="row"))
        self.left = self.left.join(self._found[-1], on="row", how="anti", maintain_order="left")

    def meet(self, condition: Condition, keep_unscored: bool) -> list[str]:
        """Find the rows at fault that do not meet a condition; return a note on those of which it says nothing."""
        unknown = self.left.select(condition.truth.is_null().sum()).item()
        value, threshold = condition.compared or (None, None)
        self.take(~condition.truth, condition.name, value, threshold)
        if not unknown:
            return []
        if not keep_unscored:
            self.take(condition.truth.is_null(), f"unscored:{condition.name}")
        did = "kept (keep_unscored)" if keep_unscored else "rejected as unscored; --keep-unscored keeps them"
        return [f"of {unknown:,} rows {condition.name!r} says nothing, as a value is missing: {did}"]

    def findings(self) -> pl.DataFrame:
        """Return rule, score and threshold of all rows, null where nothing was found."""
        found = pl.concat(self._found)
        rows = pl.DataFrame({"row": range(len(self.lengths))}, schema={"row": pl.UInt32})
        return rows.join(found, on="row", how="left", maintain_order="left").drop("row")


def condition_kinds(run: Run) -> dict[str, Kind]:
    """Return what a condition may name: the scores of a run and their details, those read off its rows, and columns of the rows."""
    return {**_kinds(known_scores(run)), **dict.fromkeys((*READ_OFF, "sample_index"), "number"), **dict.fromkeys(TEXT_COLUMNS, "text")}


def _kinds(scores: Iterable[str]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name in scores:
        kinds |= {name: "number", f"{name}{DETAIL}": "text"}
    return kinds


def read_conditions(run: Run, config: FilterConfig, more: Sequence[str] = ()) -> list[Condition]:
    """Return the conditions of a filter, those of its presets first; `more` scores are known beside those of the run.

    Raises UserError for what is no condition.
    """
    kinds = {**condition_kinds(run), **_kinds(more)}
    for name in config.presets:
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
    texts = (*(f"{name}: {PRESETS[name]}" for name in config.presets), *config.where)
    return [parse_condition(text, kinds, SCORERS) for text in texts]


PRESETS = {
    "correct": "numeric >= 1",
    "whole": "finish_reason is None or finish_reason == 'stop'",
    "prompt-helps": "ifd < 1",  # Li et al. 2023 (From Quantity to Quality): from 1 on the prompt makes the answer no likelier
    "alpagasus": "judge >= 4.5",  # Chen et al. 2023: a grade of 4.5 or more out of 5, of a judge with scale=5
    "short-tokens": "num_tokens <= 2048",
}


def _values(run: Run, rows: pl.DataFrame, scores: Sequence[str], named: Sequence[str]) -> list[pl.Series]:
    """Return the columns that rules and conditions read: each score by its name for conditions, and as `score NAME` for the rules.

    `meta.A.B` is the value of B in the object A of meta, or of the key "A.B" of meta itself; within an object a key with a dot is not
    found. Raises UserError for a name of meta that has a value in no row, unless it is a key of meta itself: one that is null in
    every row is known only there, and not within an object.
    """
    columns: dict[str, pl.Series] = {}
    for name in scores:
        values = score_values(run, rows, name)
        columns[f"score {name}"] = values.alias(f"score {name}")
        if name in named:
            columns[name] = values.alias(name)
    for name in named:
        if name == "sample_index":
            columns[name] = rows[name].cast(pl.Float64)
        elif name.endswith(DETAIL) and not name.startswith("meta."):
            columns[name] = read_score(run, rows, name.removesuffix(DETAIL))["detail"].alias(name)
        elif name.startswith("meta."):
            path = name.removeprefix("meta.")
            paths = [f"$.{path}", f"$['{path}']"] if "." in path else [f"$.{path}"]  # within an object, or a key with a dot
            found = pl.coalesce(pl.col("meta").str.json_path_match(each) for each in paths)
            columns[name] = rows.select(found.alias(name)).to_series()
            if columns[name].null_count() == len(rows):
                keys = {f"meta.{key}" for text in rows["meta"].head(1000) for key in json.loads(text or "{}")}
                if name not in keys:
                    raise unknown_name("column", name, keys or ["(meta is empty)"], f"{run.path}: where")
    return list(columns.values())


@functools.cache
def word_pattern() -> str:
    """Return ngrams.WORD as polars takes it: its letters by number, as the two engines differ in what is one."""
    letters = [code for code in range(sys.maxunicode + 1) if chr(code).isalnum() or chr(code) in "_'’-"]
    alone = [code for code in letters if re.fullmatch(CHINESE_WORD, chr(code))]
    together = sorted(set(letters) - set(alone))

    def ranges(codes: Sequence[int]) -> str:
        runs = [[code for _, code in part] for _, part in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
        return "".join(rf"\x{{{run[0]:x}}}-\x{{{run[-1]:x}}}" for run in runs)

    return f"{CHINESE_WORD}|[{ranges(together)}]+"


def text_rules(config: FilterConfig) -> list[TextRule]:
    """Return the rules that need the text alone, in order. Raises UserError for an unknown language or a broken regular expression."""
    for language in config.languages:
        if language not in SCRIPTS:
            raise unknown_name("language", language, SCRIPTS)
    include, exclude = [Pattern("", each) for each in config.include], [Pattern("", each) for each in config.exclude]
    rules: list[TextRule] = []
    text = pl.col("text")
    if config.empty:
        rules.append(TextRule(lambda text: None if text.strip() else ("empty", None, None), ~text.str.contains(r"[^\s\x1c-\x1f]")))
    for unit, lowest, highest, count, quick in (
        ("chars", config.min_chars, config.max_chars, len, text.str.len_chars()),
        ("words", config.min_words, config.max_words, count_words, None),
    ):
        if lowest is not None or highest is not None:
            counted = text.str.count_matches(word_pattern()) if quick is None else quick
            outside = pl.lit(value=False) if lowest is None else counted < lowest
            outside = outside if highest is None else outside | (counted > highest)
            rules.append(TextRule(functools.partial(_between, unit, count, lowest, highest), outside))
    if include:
        rules.append(TextRule(lambda text: None if any(each.search(text) for each in include) else ("include", None, None)))
    if exclude:
        rules.append(TextRule(lambda text: ("exclude", None, None) if any(each.search(text) for each in exclude) else None))
    if config.languages:
        rules.append(TextRule(lambda text: _language_rule(text, config.languages, config.min_language_share)))
    if config.refusal:
        signs = text.str.head(REFUSAL_CHARS).str.contains_any(list(REFUSAL_SIGNS), ascii_case_insensitive=True)
        rules.append(TextRule(lambda text: ("refusal", None, None) if REFUSALS.search(text[:REFUSAL_CHARS]) else None, signs))
    if config.repetition:
        bounds = (config.max_duplicate_ngrams, config.max_top_ngram)
        repeating = text.map_batches(lambda texts: may_repeat(texts, *bounds), return_dtype=pl.Boolean, is_elementwise=True)
        rules.append(TextRule(lambda text: _repetition_rule(text, *bounds), repeating))
    return rules


def script_shares(text: str) -> dict[str, float]:
    """Return the share of each script among the words of a text, code in fences aside, by Unicode's first word for their letters.

    A word is of the script of its first letter; a character of Chinese or Japanese is a word.
    """
    counts: Counter[str] = Counter()
    for word in WORD.findall(_CODE.sub(" ", text)):
        letter = next((each for each in word if each.isalpha()), None)
        if letter:
            counts["LATIN" if letter.isascii() else unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]] += 1
    total = counts.total()
    return {script: count / total for script, count in counts.items()} if total else {}


def _language_rule(text: str, languages: Sequence[str], min_share: float) -> Finding | None:
    shares = script_shares(text)
    wanted = {script for language in languages for script in SCRIPTS[language]}
    share = sum(value for script, value in shares.items() if script in wanted)
    kana = shares.get("HIRAGANA", 0) + shares.get("KATAKANA", 0)
    if shares and (share < min_share or ("ja" not in languages and kana > 0.1)):
        return "language", share, min_share
    judged = all(each in FUNCTION_WORDS for each in languages if SCRIPTS[each] == LATIN)
    if judged and shares.get("LATIN", 0) > 0.5:
        words = re.findall(r"[^\W\d_]+", _CODE.sub(" ", text).lower())
        found = {language: [word for word in words if word in known] for language, known in _FUNCTION_SETS.items()}
        own = max((len(found[language]) for language in languages if language in found), default=0)
        other = max((language for language in found if language not in languages), key=lambda each: len(found[each]), default=None)
        if other and len(words) >= LANGUAGE_WORDS and len(set(found[other])) >= 4 and len(found[other]) > max(1.5 * own, 0.15 * len(words)):
            return "language", own / len(words), len(found[other]) / len(words)
    return None


_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_FUNCTION_SETS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}


def _repetition_rule(text: str, max_duplicate: float, max_top: float) -> Finding | None:
    """Say whether a text repeats itself."""
    words: Sequence[str | bytes] = text.encode().translate(PLAIN_WORDS).split() if text.isascii() else WORD.findall(text.lower())
    share = duplicate_ngrams(words, WINDOW)
    if share > max_duplicate:
        return "repetition:duplicate_ngrams", share, max_duplicate
    if len(words) >= JUDGED:
        share = max(top_ngram(words, n) for n in TOPS)
        if share > max_top:
            return "repetition:top_ngram", share, max_top
    return None


def _between(unit: str, count: Callable[[Any], float], lowest: float | None, highest: float | None, text: str) -> Finding | None:
    value = count(text)
    if lowest is not None and value < lowest:
        return f"min_{unit}", value, lowest
    if highest is not None and value > highest:
        return f"max_{unit}", value, highest
    return None
