"""Text from data and models as it may be shown in a terminal: control characters are written out, never sent."""

import unicodedata


def visible(text: str) -> str:
    """Return a text whose control characters (escape sequences, returns, marks that turn the direction) are written out."""
    return "".join(
        f"\\x{ord(letter):02x}" if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"
        else f"\\u{ord(letter):04x}" if letter in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"
        else letter
        for letter in text
    )  # fmt: skip


def shortened(text: str, length: int = 60) -> str:
    """Return the beginning of a text on one line, with control characters written out."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def counted(number: int, thing: str) -> str:
    """Write a number of things, given by the word for one of them: 1 row, 1,200 rows."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
