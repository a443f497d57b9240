"""A thinking model's thoughts and its answer apart: `<think>…</think>`, as most of them write it."""

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Return (thoughts, answer) of a generated text; thoughts None where it has none.

    `opened`: the prompt itself ended with `<think>`, as some templates write it. Thoughts that were cut leave an empty answer.
    Only what stands at the beginning is taken: an answer may speak of these tags.
    """
    begun = text.lstrip()
    if begun.startswith(OPEN):
        begun = begun[len(OPEN) :]
    elif not opened:
        return None, text
    thoughts, _, answer = begun.partition(CLOSE)
    return thoughts.strip() or None, answer.lstrip()
