"""What a distillation holds and what a call added to it, for people."""

from dataclasses import dataclass
from pathlib import Path

from ..core.progress import duration


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a distillation holds now, and what this call added."""

    run: Path
    prompts: int
    rejected: dict[str, int]  # prompts that were not sent, by rule
    samples: int
    cut: int  # of the samples: reached max_new_tokens
    empty: int  # of the samples: ended without a word
    cure: str  # what helps those that were cut
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
        lines = [f"{self.run}: {self.samples:,} of {asked:,} samples of {self.prompts:,} prompts, {self.tokens:,} tokens{cut}"]
        if self.new_samples:
            rate = f"{self.new_tokens / self.seconds:,.0f} tokens/s"
            busy = "" if self.gpu_busy is None else f", GPU busy {self.gpu_busy:.0%} of the time"
            lines.append(f"new: {self.new_samples:,} samples, {self.new_tokens:,} tokens in {duration(self.seconds)} ({rate}{busy})")
        else:
            lines.append("new: none, everything that was asked for is there" if asked == self.samples else "new: none")
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.4f}")
        if self.cut:
            lines.append(f"left out: {self.cut:,} cut answers (truncated); {self.cure}")
        if self.empty:
            lines.append(f"left out: {self.empty:,} answers without a word (empty_answer)")
        if self.rejected:
            lines.append("prompts not asked: " + ", ".join(f"{count:,} {rule}" for rule, count in self.rejected.items()))
        if self.failed:
            lines.append("failed: " + ", ".join(f"{count:,} {error}" for error, count in self.failed.items()))
        if self.over_budget:
            lines.append(f"not asked for: {self.over_budget:,} samples, a budget is used up; a larger one goes on from here")
        return "\n".join([*lines, f"data set: {self.run / 'curate' / 'dataset.jsonl'}"])
