"""What a distillation holds and what a call added to it, for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.progress import duration
from ..core.text import counted

BUDGET = "budget"  # the rule of samples that were not asked for, because a budget was used up


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a distillation holds now, and what this call added."""

    run: Path
    prompts: int
    rejected: dict[str, int]  # prompts that were not sent, by rule
    samples: int
    cut: int  # of the samples: reached max_new_tokens
    empty: int  # of the samples: ended without a word
    again: Mapping[str, int] | None  # of those cut, by what kept them from being asked once more; None where that is not wanted
    matched: int | None  # of the samples: hold the wanted format; None where none is wanted, or its pattern takes too long
    tokens: int
    failed: dict[str, int]  # samples, by error
    over_budget: int
    cost: float | None  # of all tokens of this folder, and of the time of this call, by the prices that are set
    new_samples: int
    new_tokens: int
    seconds: float  # of generation, in this call
    gpu_busy: float | None  # share of that time in which the GPU computed; None where there is none, or it does not tell

    def summary(self) -> str:
        """Write it for people."""
        asked = self.samples + sum(self.failed.values()) + self.over_budget
        cut = f", {self.cut / self.samples:.1%} of them cut at the longest length" if self.samples else ""
        if self.samples and self.matched is not None:
            cut += f", {self.matched / self.samples:.1%} in the wanted format"
        wanted = f"{counted(asked, 'sample')} of {counted(self.prompts, 'prompt')}"
        lines = [f"{self.run}: {self.samples:,} of {wanted}, {counted(self.tokens, 'token')}{cut}"]
        if self.new_samples:
            new = f"{counted(self.new_samples, 'sample')}, {counted(self.new_tokens, 'token')}"
            rate = f"{self.new_tokens / self.seconds:,.0f} tokens/s"
            busy = "" if self.gpu_busy is None else f", GPU busy {self.gpu_busy:.0%} of the time"
            lines.append(f"new: {new} in {duration(self.seconds)} ({rate}{busy})")
        else:
            lines.append("new: none, everything that was asked for is there" if asked == self.samples and not self.again else "new: none")
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.4f}")
        if self.cut:
            lines.append(f"left out: {counted(self.cut, 'cut answer')} (truncated); {self._cure()}")
        if self.empty:
            lines.append(f"left out: {counted(self.empty, 'answer')} without a word (empty_answer)")
        if self.rejected:
            lines.append("prompts not asked: " + ", ".join(f"{count:,} {rule}" for rule, count in self.rejected.items()))
        if self.failed:
            lines.append("failed: " + ", ".join(f"{count:,} {error}" for error, count in self.failed.items()))
        if self.over_budget:
            lines.append(f"not asked for: {counted(self.over_budget, 'sample')}, a budget is used up; a larger one goes on from here")
        return "\n".join([*lines, f"data set: {self.run / 'curate' / 'dataset.jsonl'}"])

    def _cure(self) -> str:
        """Return what helps the answers that were cut."""
        if self.again is None:
            return "retry_truncated asks for them once more, with twice the tokens"
        errors = {why: count for why, count in self.again.items() if why != BUDGET}
        told = ["a larger max_new_tokens may end them, in another folder"] if sum(self.again.values()) < self.cut else []
        if waiting := self.again.get(BUDGET):
            told.append(f"{waiting:,} of them were not asked for once more, as a budget is used up; a larger one goes on from here")
        if errors:
            told.append(f"{sum(errors.values()):,} of them failed when asked for once more, as with: {next(iter(errors))}")
        return "; ".join(told)
