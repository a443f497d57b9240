"""What answers look like, right or wrong: where they stop, repeat, are empty or in another language."""

from sftkit.evaluate.compare import Answer
from sftkit.evaluate.health import health, repeats


def test_health_names_what_is_wrong() -> None:
    english = "Please tell me, in a few words, what a thread is and how it differs from a process."
    answers = [
        Answer(
            text="A thread is a part of a process that runs by itself and shares its memory with the others.",
            finish_reason="stop",
            num_tokens=20,
        ),
        Answer(
            text="Ein Faden ist ein Teil eines Prozesses, der für sich läuft und den Speicher mit den anderen teilt.",
            finish_reason="stop",
            num_tokens=20,
        ),
        Answer(text="and then " * 40, finish_reason="length", num_tokens=80),
        Answer(text=" ", finish_reason="stop", num_tokens=0),
    ]
    found = health([english] * 4, answers)
    assert (found.stop_rate, found.truncated, found.repetitive, found.empty, found.mean_tokens) == (0.75, 0.25, 0.25, 0.25, 30.0)
    assert found.other_language is not None
    assert 1 / 3 <= found.other_language <= 2 / 3
    assert repeats("好的" * 50)
    assert not repeats("short " * 10)
    assert repeats("x" * 100_000)
