"""Why stored samples are, or are not, what some settings ask for: the fields of the key that differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import load_config
from ..core.errors import UserError
from ..core.run import Run
from ..core.store import SampleStore
from ..core.text import counted
from .config import DistillConfig
from .distill import Teacher


@dataclass(frozen=True, slots=True)
class Explanation:
    """One set of settings in the store, compared with the ones asked for."""

    sampling_key: str
    model: str
    samples: int
    differs: dict[str, tuple[Any, Any]]  # field: (stored, asked)

    @property
    def asked_again(self) -> bool:
        """Say whether these are what `retry_truncated` asks for: twice the tokens, and else the same."""
        stored, asked = self.differs.get("max_new_tokens", (None, None))
        return self.differs.keys() == {"max_new_tokens"} and stored == 2 * asked

    def summary(self) -> str:
        """Write it for people, a line for each field that differs."""
        head = f"{counted(self.samples, 'sample')} of {self.model} (settings {self.sampling_key}): "
        if not self.differs:
            return head + "nothing differs, they would be used"
        if self.asked_again:
            return head + "asked once more for answers that were cut, and used in their place"
        lines = [f"  {field}: stored {stored!r}, asked {asked!r}" for field, (stored, asked) in self.differs.items()]
        return "\n".join([head + "none would be used, they differ in", *lines])


def export(run: Path, path: Path) -> int:
    """Write all samples of a run, those that no settings ask for any more too, to a Parquet file; return how many."""
    store_path = run / "curate" / "samples.sqlite"
    Run.open(run)
    if not store_path.exists():
        raise UserError(f"{run}: holds no samples of a teacher; `sftkit curate distill` makes some")
    with SampleStore(store_path, made=True) as store:
        return store.export(path)


def explain(run: Path, changes: Mapping[str, Any]) -> list[Explanation]:
    """Compare each set of settings in the run's store with the run's own settings after `changes` (settings of DistillConfig).

    The weights and the template of the teacher are looked at as they are now. The store is checked for damage first.
    """
    opened = Run.open(run)
    begun = opened.config().get("distill")
    path = run / "curate" / "samples.sqlite"
    if begun is None and "grow" in opened.config():
        raise UserError(f"{run}: its samples are requests for prompts, which differ in more than their settings; `cache export` has them")
    if begun is None or not path.exists():
        raise UserError(f"{run}: holds no samples of a teacher; `sftkit curate distill` makes some")
    known = {name: value for name, value in begun.items() if name in DistillConfig.__dataclass_fields__}
    engine = {**known.get("engine", {}), **changes.get("engine", {})}
    teacher = Teacher.find(load_config(DistillConfig, {**known, "k": 1, "budget_tokens": None, **changes, "engine": engine}))
    asked = teacher.settings()
    teacher.close()
    with SampleStore(path, made=True) as store:
        store.check()
        return [
            Explanation(
                key,
                name,
                samples,
                {each: (stored.get(each), asked.get(each)) for each in {**asked, **stored} if stored.get(each) != asked.get(each)},
            )
            for key, name, stored, samples in store.settings()
        ]
