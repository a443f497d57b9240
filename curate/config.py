"""The settings of curation's steps, apart from the steps so that the command line's help needs none of their libraries."""

from dataclasses import dataclass, field, fields

from ..core.config import setting
from ..core.engines.base import EngineConfig, Sampling
from ..core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Sampling):
    """What is asked of which teacher. All but k, the limits and the engine is fixed once the run folder has begun."""

    teacher: str = field(metadata={"help": "The model that answers: a folder, a Hub id, a .gguf file, a catalogue name, a server's model."})
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    k: int = setting(1, "Samples for each prompt. More than last time generates only the new ones.")
    system: str | None = setting(None, "System message, put before every prompt that has none.")
    thinking: bool = setting(False, "Render the prompt so that a thinking teacher thinks.")
    limit: int | None = setting(None, "Only the first prompts of the file.")
    budget_tokens: int | None = setting(None, "Most tokens generated in this run folder, all calls together; what is left over is said.")
    max_failed: float = setting(0.01, "Share of failed samples above which the command ends with exit code 3.")
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"help": "How the teacher is run."})

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_new_tokens", 1), ("limit", 1), ("budget_tokens", self.max_new_tokens), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                why = " (one answer can take max_new_tokens)" if name == "budget_tokens" else ""
                raise UserError(f"{name}: expected {least} or more{why}, found {value}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: expected 0 (greedy) or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a share above 0 and up to 1, found {self.top_p}")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed: expected a share between 0 and 1, as 0.01, found {self.max_failed}")
        if self.temperature == 0 and self.k > 1:
            raise UserError(f"k is {self.k} at temperature 0: all samples of a prompt would be the same; raise the temperature or give k 1")

    @property
    def sampling(self) -> Sampling:
        """What decides an answer, without the rest."""
        return Sampling(**{each.name: getattr(self, each.name) for each in fields(Sampling)})
