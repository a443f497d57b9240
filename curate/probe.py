"""What the first answers of a teacher show before the rest is paid for: whether they end, and in the format that is wanted."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.checks.schema import check_schema
from ..core.errors import UserError
from ..core.patterns import Pattern, SlowPattern
from ..core.text import counted, shortened
from .config import DistillConfig, format_pattern

log = logging.getLogger(__name__)

ENOUGH = 0.9  # below it there is a warning
FEWEST = 20  # answers from which on a share says something


@dataclass(slots=True)
class Probe:
    """Answers looked at: how many ended, were cut, and hold the wanted format, or where a JSON schema is given, follow that."""

    config: DistillConfig
    answers: int = 0
    cut: int = 0
    matched: int = 0
    sound: list[tuple[str, str, str]] = field(default_factory=list)  # (prompt, answer, finish_reason), three at most
    faulty: list[tuple[str, str, str]] = field(default_factory=list)  # cut, or without the format
    too_slow: str = ""  # why the format is looked for no longer, where its pattern took too long

    def add(self, prompt: str, answer: str, finish_reason: str) -> None:
        """Look at an answer."""
        matched = self._matches(answer)
        self.answers += 1
        self.cut += finish_reason == "length"
        self.matched += matched is True
        shown = self.faulty if finish_reason == "length" or matched is False else self.sound
        if len(shown) < 3:
            shown.append((prompt, answer, finish_reason))

    def _matches(self, answer: str) -> bool | None:
        """Say whether an answer is as wanted; None where nothing is wanted, or the pattern of its format has taken too long once."""
        pattern, schema = format_pattern(self.config.want_format), self.config.json_schema
        follows = None if schema is None else check_schema(answer, json.loads(schema)) is None
        if pattern is None or self.too_slow:
            return follows
        try:
            return pattern.search(answer) is not None and follows is not False
        except SlowPattern as error:
            self.too_slow = f"want_format {error}"
            return follows

    @property
    def stopped_share(self) -> float:
        """Return the share that ended by itself."""
        return 1 - self.cut / self.answers

    @property
    def matched_share(self) -> float | None:
        """Return the share that is as wanted; None where nothing is wanted, or the pattern of its format takes too long."""
        return None if not self.wanted or self.too_slow else self.matched / self.answers

    @property
    def wanted(self) -> str:
        """Return what is wanted of an answer, for people; empty where nothing is."""
        given = self.config.want_format
        return " and ".join(
            [
                *([] if given is None else [f"in the wanted format {given!r}"]),
                *([] if self.config.json_schema is None else ["as the JSON schema says"]),
            ]
        )

    def examples(self) -> list[tuple[str, str, str]]:
        """Return three answers, those first that are not as wanted."""
        return [*self.faulty, *self.sound][:3]

    def shares(self) -> str:
        """Say the shares in a line."""
        parts = [
            f"{self.stopped_share:.1%} stopped by themselves, {self.cut / self.answers:.1%} cut at {self.config.max_new_tokens} tokens"
        ]
        if self.matched_share is not None:
            parts.append(f"{self.matched_share:.1%} {self.wanted}")
        return f"of {counted(self.answers, 'answer')} " + ", ".join(parts)

    def faults(self, least: float = ENOUGH) -> list[str]:
        """Return what is wrong with the answers, and what helps, a line each."""
        found = []
        if self.stopped_share < least:
            also = "" if self.config.retry_truncated else ", or take retry_truncated"
            found.append(f"only {self.stopped_share:.1%} of the answers stopped by themselves: raise max_new_tokens{also}")
        if self.too_slow:
            found.append(self.too_slow)
        found += self.unlike(least)
        return found

    def unlike(self, least: float = ENOUGH) -> list[str]:
        """Return that the answers are not as wanted, and what helps, in a line; none where enough are, or nothing is wanted."""
        if self.matched_share is not None and self.matched_share < least:
            cure = "ask for it in the system message, best with an example, or want the format that this teacher has"
            if self.config.json_schema is not None:
                cure = "cut ones seldom are, and some servers do not hold answers to one; `score --with json_schema:schema=FILE` finds them"
            return [f"only {self.matched_share:.1%} of the answers are {self.wanted}: {cure}"]
        return []

    def warn(self) -> None:
        """Log the shares, and with three examples what is wrong."""
        log.info("%s", self.shares())
        faults = self.faults()
        for fault in faults:
            log.warning("warning: %s", fault)
        if faults:
            log.warning("%s", tell(self.examples()))

    def stop(self) -> None:
        """Raise UserError where less than the share `stop_below` is as wanted."""
        assert self.config.stop_below is not None
        faults = self.faults(self.config.stop_below)
        if faults:
            log.warning("%s", tell(self.examples()))
            raise UserError(
                f"stopped after a probe, as stop_below {self.config.stop_below:g} asks: {'; '.join(faults)}. Its answers are kept"
            )


def warn_unlike(config: DistillConfig, answers: Iterable[tuple[str, str]]) -> None:
    """Warn where too few of these are as wanted, each a text and its finish_reason."""
    found = Probe(config)
    for text, reason in answers if found.wanted else ():
        found.add("", text, reason)
    for fault in found.unlike() if found.answers else ():
        log.warning("warning: %s (%s looked at)", fault, counted(found.answers, "answer"))


def num_matched(pattern: Pattern | None, texts: Iterable[str]) -> int | None:
    """Return how many texts hold a pattern. None where there is none, or it takes too long: the samples do not depend on it."""
    try:
        return None if pattern is None else sum(pattern.search(text) is not None for text in texts)
    except SlowPattern as error:
        log.warning("warning: the answers in the wanted format were not counted: want_format %s", error)
        return None


def tell(examples: Sequence[tuple[str, str, str]]) -> str:
    """Write prompts and answers for people."""
    return "\n".join(
        f"\nprompt: {shortened(prompt, 200)}\nanswer: {shortened(answer, 200)}{' (cut)' if reason == 'length' else ''}"
        for prompt, answer, reason in examples
    )
