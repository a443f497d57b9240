"""Find the final number of a worked answer, and compare numbers exactly (GSM8K style)."""

import re
from fractions import Fraction
from typing import Literal

Rule = Literal["strict", "flexible"]

LAST = 10_000  # characters: a final number stands near the end, and some patterns take the square of a text's length
MAX_DIGITS = 100  # a longer run of digits comes from a model that loops; it is no answer

_WIDE = str.maketrans("０１２３４５６７８９，．％＄－−＝：／", "0123456789,.%$--=:/")
_LATEX = [
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),  # 1\frac{1}{2} is one and a half
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}|\\[,!;: ](?=\d{3})"), ","),  # thousands, as LaTeX writes them
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[()\[\]]"), " "),  # formula brackets
]
_NUMBER = re.compile(
    r"(?P<before>(?<![\w.])-\s?)?[$€£¥]?\s?(?P<after>(?<![\w.$])-)?"  # -$5 and $-5; the minus of 10-15 is none
    r"(?<![A-Za-z_])(?<![0-9][.,])(?<![0-9])"  # nor the 2 of CO2, nor the middle of a number
    r"(?=\.?[0-9])(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?P<tail>\.[0-9]+)?(?P<exponent>[eE][-+]?[0-9]{1,2}(?![0-9]))?"
    r"(?:\s?/\s?(?P<below>[0-9]+)(?![0-9]*[./][0-9]))?"
)
_MIXED = re.compile(r"(?<![\w.,/])(-?)([0-9]+)\s+([0-9]+)\s?/\s?([0-9]+)")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_HEADING = re.compile(r"\W*[0-9]+[.)]\s+[A-Za-z]")  # "#### 2. Add them up" is a heading of Markdown
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_FILLER = r"(?:\W|approximately|about|therefore|thus|simply|just|only|now|equal to|x\b|[A-Za-z]\s*=)*"
_ANSWER_IS = re.compile(
    r"(?:\banswers?\b(?:\s+(?:to|for|of)\b[^.\n]{0,80}?)?\W{0,4}(?:\bis\b|\bare\b|=|:)|答案\W{0,4}(?:是|为|為|:|=)|^\W{0,4}A\s*:)(?P<rest>[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_STARTS_WITH_NUMBER = re.compile(rf"{_FILLER}[$€£¥]?-?\.?[0-9]", re.IGNORECASE)


def extract_number(text: str, rule: Rule = "flexible") -> Fraction | None:
    """Return the final number of a text, exact; None where there is none.

    The first of these that is found, each at its last place: `#### x`, `\\boxed{x}`, "the answer is x" (also `A: x` on a line
    of its own, and 答案是 x); rule flexible goes on to the last number of the text, strict does not. Of an equation the part
    after the last "=" counts. Commas, currency and percent signs are ignored (50% is 50); fractions stay fractions.
    """
    plain = _plain(text)
    for marked in (_after_hashes(plain), _in_box(plain), _after_answer_is(plain)):
        if marked is not None:
            return _first_number(marked.rsplit("=", 1)[-1])
    if rule == "strict":
        return None
    found = list(_NUMBER.finditer(plain))
    return _value(found[-1]) if found else None


def extract_marked(text: str, mark: Literal["hashes", "boxed"]) -> Fraction | None:
    """Return the number after the last `####`, or in the last `\\boxed{}`, and nowhere else; None where there is none."""
    plain = _plain(text)
    marked = _after_hashes(plain) if mark == "hashes" else _in_box(plain)
    return None if marked is None else _first_number(marked.rsplit("=", 1)[-1])


def canonical(number: Fraction) -> str:
    """Write a number in one way: 18, -2.5, 1/3."""
    below = number.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    if below != 1 or number.denominator == 1:
        return str(number)
    places = 0
    while (number * 10**places).denominator != 1:
        places += 1
    digits = str(abs(number * 10**places).numerator).rjust(places + 1, "0")
    return f"{'-' * (number < 0)}{digits[:-places]}.{digits[-places:]}"


def _plain(text: str) -> str:
    plain = text[-LAST:].translate(_WIDE)
    for pattern, written in _LATEX:
        plain = pattern.sub(written, plain)
    return plain


def _after_hashes(text: str) -> str | None:
    lines = [line for line in _HASHES.findall(text) if not _HEADING.match(line) and _STARTS_WITH_NUMBER.match(line.rsplit("=", 1)[-1])]
    return lines[-1] if lines else None


def _in_box(text: str) -> str | None:
    closed, opened = {}, []  # where each brace that is opened is closed
    for place, letter in enumerate(text):
        if letter == "{":
            opened.append(place)
        elif letter == "}" and opened:
            closed[opened.pop()] = place
    content = None
    for match in _BOXED.finditer(text):
        inside = text[match.end() : closed.get(match.end() - 1, len(text))]
        if re.search(r"[0-9]", inside):
            content = inside
    return content


def _after_answer_is(text: str) -> str | None:
    rest = None
    for match in _ANSWER_IS.finditer(text):
        sentence = re.split(r"(?<=[^0-9])\.\s|\.$|[;。；]", match["rest"])[0]
        after = sentence.rsplit("=", 1)[-1]
        if _STARTS_WITH_NUMBER.match(after):
            rest = after
    return rest


def _first_number(text: str) -> Fraction | None:
    match, mixed = _NUMBER.search(text), _MIXED.search(text)
    if match and mixed and match.start() <= mixed.start() <= match.end() and len(mixed[0]) < MAX_DIGITS and int(mixed[4]):
        size = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -size if mixed[1] else size
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Fraction | None:
    whole, tail, below = (match["whole"] or "0").replace(",", ""), match["tail"] or "", match["below"] or "1"
    if len(whole) + len(tail) + len(below) > MAX_DIGITS or not int(below):
        return None
    size = Fraction(f"{whole}{tail}{match['exponent'] or ''}") / int(below)
    return -size if match["before"] or match["after"] else size
