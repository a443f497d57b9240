"""The held-out loss of parts of the data: of each source, and of each turn of the conversations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.example import Example
from ..core.likelihood import HeldOut, Likelihood
from ..core.statistics import Estimate, bootstrap_ratio, bootstrap_ratio_difference

MOST_SOURCES = 20
MOST_TURNS = 8  # the last of these holds all that follow


@dataclass(frozen=True, slots=True)
class Pieces:
    """Rows, or single turns of them, each in one part of the data."""

    kind: str  # source or turn
    parts: list[str]  # the part of each piece
    prompts: list[str]
    num_bytes: NDArray[np.float64]
    nats: dict[str, NDArray[np.float64]]  # -ln p of each piece, by model
    tokens: dict[str, NDArray[np.float64]]

    @property
    def names(self) -> list[str]:
        """Return the parts; none where one is all, or where there are too many to show."""
        names = sorted(set(self.parts))
        return names if 1 < len(names) <= MOST_SOURCES else []

    def losses(self, model: str, drawn: Mapping[str, Any]) -> dict[str, Estimate]:
        """Return a model's loss in each part, with its 95 % interval."""
        found = {}
        for name, places, own in self._each(drawn):
            found[name] = bootstrap_ratio(self.nats[model][places], self.tokens[model][places], **own)
        return found

    def differences(self, model: str, baseline: str, drawn: Mapping[str, Any]) -> dict[str, Estimate]:
        """Return a model minus another in each part, paired: the loss, or bits per byte where they count different tokens."""
        same = bool((self.tokens[model] == self.tokens[baseline]).all())
        found = {}
        for name, places, own in self._each(drawn):
            if same:
                ratios = [(self.nats[each][places], self.tokens[each][places]) for each in (baseline, model)]
                found[name] = bootstrap_ratio_difference(*ratios, **own)
            else:
                change = (self.nats[model] - self.nats[baseline])[places] / math.log(2)
                found[name] = bootstrap_ratio(change, self.num_bytes[places], **own)
        return found

    def _each(self, drawn: Mapping[str, Any]) -> list[tuple[str, list[int], dict[str, Any]]]:
        found = []
        for name in self.names:
            places = [place for place, part in enumerate(self.parts) if part == name]
            found.append((name, places, {**drawn, "clusters": [self.prompts[place] for place in places]}))
        return found


def by_source(rows: Sequence[HeldOut], scored: Mapping[str, Sequence[Likelihood]]) -> Pieces:
    """Return the rows as pieces of their sources."""
    return Pieces(
        kind="source",
        parts=[source_name(row.example) for row in rows],
        prompts=[row.prompt_id for row in rows],
        num_bytes=np.array([row.num_bytes for row in rows], dtype=np.float64),
        nats={name: -np.array([each.sum_logprob for each in column], dtype=np.float64) for name, column in scored.items()},
        tokens={name: np.array([each.num_tokens for each in column], dtype=np.float64) for name, column in scored.items()},
    )


def by_turn(rows: Sequence[HeldOut], scored: Mapping[str, Sequence[Likelihood]]) -> Pieces:
    """Return the turns of the rows' answers as pieces, the first of each conversation in one part, the second in the next."""
    turns = [(row, turn) for row in rows for turn in range(len(row.turn_bytes))]
    return Pieces(
        kind="turn",
        parts=[f"{min(turn + 1, MOST_TURNS)}{'+' * (turn + 1 >= MOST_TURNS)}" for _, turn in turns],
        prompts=[row.prompt_id for row, _ in turns],
        num_bytes=np.array([row.turn_bytes[turn] for row, turn in turns], dtype=np.float64),
        nats={name: -np.array([value for each in column for value in each.turn_logprobs or ()]) for name, column in scored.items()},
        tokens={name: np.array([float(value) for each in column for value in each.turn_tokens or ()]) for name, column in scored.items()},
    )


def source_name(example: Example) -> str:
    """Return where a row comes from: what its column source or dataset says, else the file that it stands in."""
    named = next((example.meta[column] for column in ("source", "dataset") if isinstance(example.meta.get(column), str)), None)
    return str(named or Path(example.source.rpartition(":")[0]).name)
