"""Where an answer ends by its text: before the first of some given texts in it, which no engine's tokens need to know."""

from collections.abc import Callable, Sequence


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of the stops begins; None where there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


class StopTexts:
    """Looks at answers token by token. Only a token that may complete a stop costs a look at the whole text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._pieces: dict[int, str] = {}

    def ended(self, ids: Sequence[int], stops: Sequence[str]) -> str | None:
        """Return the text before a stop that is there since the last of the ids; None where there is none."""
        piece = self._pieces.get(ids[-1])
        if piece is None:
            piece = self._pieces[ids[-1]] = self._decode([ids[-1]])
        # a blank may be lost when a token is decoded alone, and a character may be in several tokens
        if not any(stop[-1] in piece or stop[-1] == " " for stop in stops) and "\ufffd" not in piece:
            return None
        text = self._decode(ids)
        place = first_stop(text, stops)
        return None if place is None else text[:place]
