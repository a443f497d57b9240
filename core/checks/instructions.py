"""Whether an answer follows written instructions: the 25 types of IFEval, strict and loose, decided by rules alone.

Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911: what each type means is theirs;
where the paper leaves a detail open it is decided as their published checker does, so that numbers compare. Nothing is downloaded:
words and sentences are found here, languages by langdetect, which is seeded for each text.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, unknown_name

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]
LETTERS_OF_LANGUAGE = 4_000  # of a long answer so many tell its language

_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "inc", "ltd", "corp", "co", "dept", "gen", "col", "lt", "sgt", "rep", "sen",
    "gov", "capt", "rev", "hon", "fig", "no", "vol", "op", "ed", "pp", "cf", "al", "e.g", "i.e", "u.s", "u.k", "u.n", "a.m", "p.m",
    "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "ave", "blvd", "bros", "messrs", "ph.d", "m.d",
    "b.a", "m.a", "d.c", "approx",
))  # fmt: skip
_TITLES = frozenset(("mr", "mrs", "ms", "dr", "prof", "st", "vs"))
# before these an abbreviation of several letters does end a sentence: they begin sentences
_STARTERS = frozenset((
    "the", "a", "an", "this", "that", "these", "those", "it", "he", "she", "we", "they", "i", "you", "in", "on", "at", "by", "for",
    "with", "as", "if", "when", "while", "after", "before", "but", "and", "however", "what", "there", "here", "his", "her", "its",
    "their", "our", "my", "most", "many", "some", "all", "no",
))  # fmt: skip
_CLOSING = ")]}\"'”’»*_"
_OPENING = "([{\"'“‘*_#-"
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\.\.\.|n't\b|'(?:ll|re|ve|s|m|d)\b|[^\W_](?:[\w.'/&+@-]*\w)?\.?|[^\w\s]", re.IGNORECASE)
_CONTRACTION = re.compile(r"(?i)(?<=\w)(?=n't$|'(?:ll|re|ve|s|m|d)$)")


def count_words(text: str) -> int:
    """Count words: runs of letters, digits and underscores."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Count sentences: they end at . ? or ! before white space, but not at an abbreviation, an initial or a number in a list."""
    words = text.split()
    ends = sum(_ends_sentence(word, following) for word, following in itertools.pairwise(words))
    return ends + bool(words)


def _ends_sentence(word: str, following: str) -> bool:
    inner = word.rstrip(_CLOSING)
    closing, bare = word[len(inner) :], inner.rstrip(".?!")
    mark, begins = inner[len(bare) :], following.lstrip(_OPENING)
    if not mark:
        return False
    if mark != ".":
        return not (set(mark) == {"."} and following[:1].islower())  # three dots before a small letter go on, as in "well... yes"
    plain = bare.lstrip(_OPENING).lower()
    if begins[:1].islower() or (closing.startswith((")", "]")) and not begins[:1].isupper()):
        return False
    if re.fullmatch(r"[a-z]", plain):  # an initial
        return plain == "i" and begins.lower().rstrip(".,") in _STARTERS
    if plain in _ABBREVIATIONS or re.fullmatch(r"(?:[a-z]\.)+[a-z]", plain):
        return begins.lower().rstrip(".,!?'") in _STARTERS and plain not in _TITLES
    return True


def capital_words(text: str) -> int:
    """Count the words in capital letters, a contraction as two: DON'T is DO and N'T."""
    pieces = (piece for token in _TOKEN.findall(text) for piece in _CONTRACTION.split(token))
    return sum(piece.isupper() for piece in pieces)


def detect_language(text: str) -> str | None:
    """Return the language of a text as langdetect names it (en, zh-cn); None where it finds none. The same text gives the same answer."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text[:LETTERS_OF_LANGUAGE]))
    except LangDetectException:
        return None


def _holds(count: int, relation: Any, wanted: Any) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"an instruction's relation is {relation!r}; expected 'less than' or 'at least'")
    return count < int(wanted) if relation == "less than" else count >= int(wanted)


def _keywords(text: str, given: Arguments) -> bool:
    return all(re.search(each, text, re.IGNORECASE) for each in given["keywords"])


def _keyword_frequency(text: str, given: Arguments) -> bool:
    return _holds(len(re.findall(given["keyword"], text, re.IGNORECASE)), given["relation"], given["frequency"])


def _forbidden_words(text: str, given: Arguments) -> bool:
    return not any(re.search(rf"\b{each}\b", text, re.IGNORECASE) for each in given["forbidden_words"])


def _letter_frequency(text: str, given: Arguments) -> bool:
    return _holds(text.lower().count(given["letter"].lower()), given["let_relation"], given["let_frequency"])


def _language(text: str, given: Arguments) -> bool:
    return detect_language(text) in (given["language"], None)


def _num_sentences(text: str, given: Arguments) -> bool:
    return _holds(count_sentences(text), given["relation"], given["num_sentences"])


def _num_words(text: str, given: Arguments) -> bool:
    return _holds(count_words(text), given["relation"], given["num_words"])


def _num_paragraphs(text: str, given: Arguments) -> bool:
    """Paragraphs stand between lines of three stars; the first and the last may be empty, no other."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not each.strip() for each in parts[1:-1]):
        return False
    return sum(bool(each.strip()) for each in parts) == int(given["num_paragraphs"])


def _nth_paragraph(text: str, given: Arguments) -> bool:
    """Paragraphs stand between empty lines here; empty ones do not count, and yet take a place."""
    parts, nth = re.split(r"\n\n", text), int(given["nth_paragraph"])
    count = sum(bool(each.strip()) for each in parts)
    if nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    return count == int(given["num_paragraphs"]) and first == str(given["first_word"]).lower()


def _placeholders(text: str, given: Arguments) -> bool:
    """Count [ to the next ] on its line; by hand, because a pattern would take a square of the time on a line of [ alone."""
    count = 0
    for line in text.split("\n"):
        end = -1
        while (begin := line.find("[", end + 1)) >= 0 and (end := line.find("]", begin)) >= 0:
            count += 1
    return count >= int(given["num_placeholders"])


def _postscript(text: str, given: Arguments) -> bool:
    marker = str(given["postscript_marker"]).strip()
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(forms.get(marker, marker.lower()), text.lower()) is not None


def _bullets(text: str, given: Arguments) -> bool:
    """Count lines that begin with a dash, or with one star; a star alone on its line is a bullet whose text is the next line."""
    lines, count, place = [each.lstrip() for each in text.split("\n")], 0, 0
    while place < len(lines):
        line, place = lines[place], place + 1
        if line.startswith("-"):
            count += 1
        elif line == "*" and place < len(lines):
            count, place = count + 1, place + 1
        elif line.startswith("*") and line[1:2] not in ("", "*"):
            count += 1
    return count == int(given["num_bullets"])


def _constrained(text: str, given: Arguments) -> bool:
    return any(each in text for each in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _highlights(text: str, given: Arguments) -> bool:
    single = [each for each in re.findall(r"\*[^\n\*]*\*", text) if each.strip("*").strip()]
    double = [each for each in re.findall(r"\*\*[^\n\*]*\*\*", text) if each.removeprefix("**").removesuffix("**").strip()]
    return len(single) + len(double) >= int(given["num_highlights"])


def _sections(text: str, given: Arguments) -> bool:
    splitter = str(given["section_spliter"]).strip()
    return len(re.split(rf"\s?{splitter}\s?\d+\s?", text)) - 1 >= int(given["num_sections"])


def _json(text: str, given: Arguments) -> bool:
    inner = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Arguments) -> bool:
    for line in text.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 2 and line[begin : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str, given: Arguments) -> bool:
    parts = text.split("******")
    if any(not each.strip() for each in parts[1:-1]):
        return False
    said = [each.strip() for each in parts if each.strip()]
    return len(said) == 2 and said[0] != said[1]


def _repeats_prompt(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


def _ends_with(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(given["end_phrase"]).strip().lower())


def _quoted(text: str, given: Arguments) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


def _capital_words(text: str, given: Arguments) -> bool:
    return _holds(capital_words(text), given["capital_relation"], given["capital_frequency"])


def _capital(text: str, given: Arguments) -> bool:
    return text.isupper() and detect_language(text) in ("en", None)


def _lowercase(text: str, given: Arguments) -> bool:
    return text.islower() and detect_language(text) in ("en", None)


def _no_comma(text: str, given: Arguments) -> bool:
    return "," not in text


INSTRUCTIONS: dict[str, tuple[Check, tuple[str, ...]]] = {  # the check, and the arguments that it needs
    "keywords:existence": (_keywords, ("keywords",)),
    "keywords:frequency": (_keyword_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_forbidden_words, ("forbidden_words",)),
    "keywords:letter_frequency": (_letter_frequency, ("letter", "let_frequency", "let_relation")),
    "language:response_language": (_language, ("language",)),
    "length_constraints:number_sentences": (_num_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": (_num_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": (_num_words, ("num_words", "relation")),
    "length_constraints:nth_paragraph_first_word": (_nth_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (_constrained, ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two_responses, ()),
    "combination:repeat_prompt": (_repeats_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": (_ends_with, ("end_phrase",)),
    "startend:quotation": (_quoted, ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (_capital, ()),
    "change_case:english_lowercase": (_lowercase, ()),
    "punctuation:no_comma": (_no_comma, ()),
}


@dataclass(frozen=True, slots=True)
class Followed:
    """Which instructions an answer follows, in their order. Loose forgives a first or a last line, and stars."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def check_instructions(answer: str, names: Sequence[str], arguments: Sequence[Arguments]) -> Followed:
    """Check an answer against instructions, named as in INSTRUCTIONS, with their arguments. An empty answer follows none.

    Raises UserError for an instruction that is unknown, or lacks an argument.
    """
    checks = []
    for name, given in zip(names, arguments, strict=True):
        if name not in INSTRUCTIONS:
            raise unknown_name("instruction", name, INSTRUCTIONS)
        check, needed = INSTRUCTIONS[name]
        missing = [each for each in needed if given.get(each) is None]
        if missing:
            raise UserError(f"instruction {name}: found no {', '.join(missing)}; expected {', '.join(needed)}")
        checks.append((check, given))
    variants = _loosened(answer)
    return Followed(
        strict=tuple(bool(answer.strip()) and check(answer, given) for check, given in checks),
        loose=tuple(any(each.strip() and check(each, given) for each in variants) for check, given in checks),
    )


def _loosened(answer: str) -> list[str]:
    lines = answer.split("\n")
    parts = [answer, *("\n".join(each).strip() for each in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*parts, *(each.replace("*", "") for each in parts)]))
