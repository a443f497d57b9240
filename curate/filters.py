"""Reject rows by named rules: length, cut, empty, refusing, repeating, in another language, by pattern, by score."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import polars as pl

from ..core.config import to_mapping
from ..core.errors import UserError, unknown_name
from ..core.example import Decision
from ..core.progress import Progress
from ..core.run import Run
from .config import FilterConfig
from .rows import Outcome, input_rows, keys, record
from .score import read_score
from .scorers import WORD, count_words

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

_NOT = r"(?:can(?:no|['’])t|can not|am (?:not able|unable)|['’]m (?:not able|unable)|won['’]t|will not|do(?:n['’]t| not)|am not|['’]m not)"
_DO = (
    r"(?:help|assist|provide|answer|comply|fulfil|create|generate|write|complete|process|access|engage|offer|give|support|discuss"
    r"|do that|do this)"
)
_SORRY = r"(?:(?:i['’]?m|i am)(?: \w+)? (?:sorry|afraid)|my apologies|i apologi[sz]e|sorry)"
REFUSALS = re.compile(
    "|".join(
        [
            rf"^\W*{_SORRY}\b[^.!?\n]{{0,80}}\bi ?{_NOT}\b[^.!?\n]{{0,30}}\b{_DO}",
            rf"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b[^.!?\n]{{0,60}}\bi ?{_NOT}\b",
            rf"^\W*(?:unfortunately,? |sorry,? (?:but )?)?i ?{_NOT}\b(?: to| be able to)? {_DO}(?! but\b)\b",
            r"^[^\n]{0,80}\bi(?: am|['’]m) unable to"
            r" (?:fulfil+|comply with|process|complete|assist with) (?:this|your|that|the) (?:request|task)",
            r"(?:抱歉|对不起|對不起|不好意思)[^。！？\n]{0,24}(?:无法|無法|不能|没有办法|沒有辦法|不便|没法)",
            r"作[为為](?:一[个個名位款种種])?[^。！？\n，,]{0,12}(?:AI|人工智[能慧]|[语語]言模型|助手)[^。！？\n]{0,24}"
            r"(?:无法|無法|不能|没有|沒有|不具备|不具備)",
            r"^\W*我(?:无法|無法|不能)(?:提供|回答|帮助|幫助|满足|滿足|执行|執行|协助|協助|完成|生成)",
        ]
    ),
    re.IGNORECASE,
)
REFUSAL_CHARS = 300  # a refusal stands at the beginning


Finding = tuple[str, float | None, float | None]  # rule, score, threshold


def filter_rows(run: Run, config: FilterConfig) -> Outcome:
    """Reject the rows that break a rule, as the stage "filter". The first rule broken names the rejection."""
    rows = input_rows(run, "filter")
    bounds = [(name, +1, bound, _values(run, rows, name)) for name, bound in config.min_score.items()]
    bounds += [(name, -1, bound, _values(run, rows, name)) for name, bound in config.max_score.items()]
    tokens = _values(run, rows, "num_tokens") if config.min_tokens is not None or config.max_tokens is not None else None
    rules = text_rules(config)
    run.configure("filter", to_mapping(config), free=("*",))
    decisions = []
    columns = rows.select("prompt", "response", "finish_reason").iter_rows()
    with Progress("filter", total=len(rows), unit="rows") as progress:
        for row, ((example_id, index), (prompt, response, finish_reason)) in enumerate(zip(keys(rows), columns, strict=True)):
            text = prompt if response is None else response
            found: Finding | None = None
            if config.truncated and finish_reason == "length":
                found = "truncated", None, None
            if found is None and tokens is not None:
                found = _between("tokens", tokens[row], config.min_tokens, config.max_tokens)
            for rule in rules:
                found = found or rule(text)
            for name, sign, bound, values in bounds:
                found = found or _score_rule(name, sign, bound, values[row])
            decisions.append(Decision(example_id, index, "filter", "rejected" if found else "kept", *(found or ())))
            progress.advance()
    return record(run, "filter", rows, decisions)


def text_rules(config: FilterConfig) -> list[Callable[[str], Finding | None]]:
    """Return the rules that need the text alone, in order. Each returns what it found wrong, or None.

    Raises UserError for an unknown language or a broken regular expression.
    """
    for language in config.languages:
        if language not in SCRIPTS:
            raise unknown_name("language", language, SCRIPTS)
    include, exclude = [_compile(each) for each in config.include], [_compile(each) for each in config.exclude]
    rules: list[Callable[[str], Finding | None]] = []
    if config.empty:
        rules.append(lambda text: None if text.strip() else ("empty", None, None))
    if config.min_chars is not None or config.max_chars is not None:
        rules.append(lambda text: _between("chars", len(text), config.min_chars, config.max_chars))
    if config.min_words is not None or config.max_words is not None:
        rules.append(lambda text: _between("words", count_words(text), config.min_words, config.max_words))
    if include:
        rules.append(lambda text: None if any(each.search(text) for each in include) else ("include", None, None))
    if exclude:
        rules.append(lambda text: ("exclude", None, None) if any(each.search(text) for each in exclude) else None)
    if config.languages:
        rules.append(lambda text: _language_rule(text, config.languages, config.min_language_share))
    if config.refusal:
        rules.append(lambda text: ("refusal", None, None) if REFUSALS.search(text[:REFUSAL_CHARS]) else None)
    if config.repetition:
        rules.append(lambda text: _repetition_rule(text, config.max_duplicate_ngrams, config.max_top_ngram))
    return rules


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}") from None


def duplicate_ngrams(words: Sequence[str], n: int) -> float:
    """Return the share of the windows of n words that stood in the text before; 0 for a text shorter than that."""
    windows = len(words) - n + 1
    if windows < 1:
        return 0.0
    return 1 - len({tuple(words[start : start + n]) for start in range(windows)}) / windows


def top_ngram(words: Sequence[str], n: int) -> float:
    """Return the share of the words that the most frequent n-gram covers where it stands at least twice (Rae et al. 2021, A1.1)."""
    grams = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
    if count < 2:
        return 0.0
    covered, start = 0, 0
    while start <= len(words) - n:  # occurrences that overlap count once
        if tuple(words[start : start + n]) == gram:
            covered, start = covered + n, start + n
        else:
            start += 1
    return covered / len(words)


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
    words = WORD.findall(text.lower())
    share = duplicate_ngrams(words, 10)
    if share > max_duplicate:
        return "repetition:duplicate_ngrams", share, max_duplicate
    if len(words) >= 50:
        share = max(top_ngram(words, n) for n in (2, 3, 4))
        if share > max_top:
            return "repetition:top_ngram", share, max_top
    return None


def _between(unit: str, value: float | None, lowest: float | None, highest: float | None) -> Finding | None:
    if value is None:
        return "unscored", None, None
    if lowest is not None and value < lowest:
        return f"min_{unit}", value, lowest
    if highest is not None and value > highest:
        return f"max_{unit}", value, highest
    return None


def _score_rule(name: str, sign: int, bound: float, value: float | None) -> Finding | None:
    if value is None:
        return "unscored", None, bound
    if (value - bound) * sign < 0:
        return f"{'min' if sign > 0 else 'max'}:{name}", value, bound
    return None


def _values(run: Run, rows: pl.DataFrame, name: str) -> list[float | None]:
    return read_score(run, rows, name)["value"].to_list()
