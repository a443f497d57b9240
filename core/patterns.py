"""Regular expressions that a user gives: read in one way everywhere, and never searched for without end."""

from typing import Any

from .errors import UserError

SECONDS = 10.0  # that a pattern may be searched for in one text: a sound one takes none, some would backtrack for years


class SlowPattern(UserError):
    """A pattern was searched for in one text for longer than SECONDS."""


class Pattern:
    """A user's regular expression. Raises UserError, which begins with `where`, for what is none."""

    def __init__(self, where: str, pattern: str, flags: int = 0) -> None:
        import regex  # the one that can be told when to stop; its flags are those of re

        self.text = pattern
        try:
            self._compiled: Any = regex.compile(pattern, flags)
        except (regex.error, ValueError, OverflowError) as error:  # flags that exclude each other are a ValueError
            raise UserError(f"{where}{pattern!r} is not a regular expression: {error}") from None
        except RecursionError:
            raise UserError(f"{where}a pattern of {len(pattern):,} characters is nested too deeply") from None
        self.groups: int = self._compiled.groups

    def search(self, text: str) -> Any:
        """Return the first match, as re.search does, or None. Raises SlowPattern."""
        try:
            return self._compiled.search(text, timeout=SECONDS)
        except TimeoutError:
            raise SlowPattern(
                f"{self.text!r}: took longer than {SECONDS:g} s to search for in a text of {len(text):,} characters; "
                "write it without repeats within repeats, as (a+)+"
            ) from None
