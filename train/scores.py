"""The scores of a run, as further columns of its rows: weights and the order of a curriculum come from what curation measured, too."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import UserError
from ..core.example import Example
from ..core.files import read_parquet
from ..core.formats import read_examples
from .config import TrainConfig
from .data import key_of


def read_scored(data: str | Path, config: TrainConfig) -> list[Example]:
    """Read the rows of a data source; where it is a run, with the scores that the settings name and no column has.

    Raises UserError as `read_examples` does, and for a run that has neither column nor score of a name.
    """
    examples = read_examples(data)
    for name in _asked(config):
        if not any(name in each.meta for each in examples):
            examples = _joined(examples, Path(data).expanduser(), name)
    return examples


def score_files(data: str | Path, config: TrainConfig) -> list[Path]:
    """Return the files of a run's scores that the settings name, as far as there are such."""
    return [place for name in _asked(config) if (place := _place(Path(data).expanduser(), name)).exists()]


def _asked(config: TrainConfig) -> list[str]:
    names = (config.weight_by, config.curriculum and config.curriculum.removeprefix("-"))
    return [each for each in names if each and re.fullmatch(r"[\w.@:+-]+", each)]  # a name, and no path


def _place(run: Path, name: str) -> Path:
    return run / "curate" / "scores" / f"{name}.parquet"


def _joined(examples: Sequence[Example], run: Path, name: str) -> list[Example]:
    """Return a run's rows with a score as a column."""
    place = _place(run, name)
    if not place.exists():
        known = sorted(each.stem for each in place.parent.glob("*.parquet"))
        if known:
            raise UserError(f"{run}: its rows have no column {name!r} and no such score; scores are {', '.join(known)}")
        return list(examples)
    table = read_parquet(place, ["example_id", "sample_index", "value"])
    values = {(row, index): value for row, index, value in table.iter_rows()}
    return [replace(each, meta={**each.meta, name: values.get(key_of(each))}) for each in examples]
