"""Rows put end to end: the forward passes of an epoch, without padding between rows, the same for a seed however they are split."""

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from .data import Row

Ids = npt.NDArray[np.int32]
GROUP = 16  # updates among which rows are dealt by length
ROUND = 128  # static shapes are multiples of this: what matrix units like


class Packs(Dataset[dict[str, Any]]):
    """The forward passes of an epoch. Item i is one pack: whole rows, one after another, as the tensors of one forward pass.

    An update of the optimizer has `batch_size` rows, drawn by seed and epoch alone, short and long ones in like shares. They are spread
    over `parts` packs of at most `batch_tokens` tokens (a longer row is a pack of its own), so what an update learns from does not
    depend on the memory. With `alone` each row is a pack of its own. The pack that comes first is as large as any: what does not fit
    fails at once, not in the night. Rows with scores come in their order instead, the smallest first.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        batch_tokens: int,
        seed: int,
        pad: int,
        epochs: int = 1,
        workers: int = 1,
        alone: bool = False,
    ) -> None:
        self._ids: list[Ids] = [row.tokens for row in rows]
        # position t is scored on token t + 1: the first token of a row is never learned
        self._scored: list[Ids] = [np.flatnonzero(row.trained[1:]).astype(np.int32) for row in rows]
        self._lengths = [len(row) for row in rows]
        self._scores = [row.score for row in rows]
        self._weights = [row.weight for row in rows] if any(row.weight != 1.0 for row in rows) else None
        self._seed, self._pad, self._size, self._epochs = seed, pad, batch_size, epochs
        self.longest = max(self._lengths)
        self._capacity = max(batch_tokens, self.longest)
        self._shape: tuple[int, int, int] | None = None
        self._alone = alone
        self._drawn: dict[int, list[list[int]]] = {}
        updates = [update for epoch in range(epochs) for update in self._updates(epoch)]
        least = max(-(-sum(self._lengths[row] for row in update) // self._capacity) for update in updates)
        most = max(map(len, updates))
        self.parts = most if alone else next(n for n in range(least, most + 1) if all(self._fits(each, n) for each in updates))
        self.parts = -(-self.parts // workers) * workers
        self.set_epoch(0)

    def largest_shape(self) -> tuple[int, int, int]:
        """Return the most tokens, scored positions and rows that a pack of any epoch has, rounded up for matrix units."""
        packs = [pack for epoch in range(self._epochs) for update in self._updates(epoch) for pack in self._spread(update, self.parts)]
        scored = max(sum(len(self._scored[row]) for row in pack) for pack in packs)
        return _up(max(map(self._tokens, packs))), _up(scored), max(map(len, packs))

    def pad_to(self, shape: tuple[int, int, int], longest: int = 0) -> None:
        """Give all packs one shape, which compiled code needs: the rest is pad tokens that nothing attends to or learns from.

        `longest` is that of all packs which are to look alike to the code, where others have longer rows.
        """
        self.longest = max(self.longest, longest)
        width, scored, rows = shape
        self._shape = width, scored, rows + -(-width // self.longest)  # what is filled in comes in rows of at most `longest`

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose packs are given."""
        self._packs = [pack for update in self._updates(epoch) for pack in self._spread(update, self.parts)]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = collate([self._ids[row] for row in self._packs[index]], [self._scored[row] for row in self._packs[index]],
                       pad=self._pad, longest=self.longest, static=self._shape)  # fmt: skip
        if self._weights is not None:
            each = [np.full(len(self._scored[row]), self._weights[row], dtype=np.float32) for row in self._packs[index]]
            weights = np.zeros(len(batch["targets"]), dtype=np.float32)
            weights[: batch["num_targets"]] = np.concatenate([*each, np.zeros(0, dtype=np.float32)])
            batch |= {"weights": torch.from_numpy(weights), "weight": float(weights.sum(dtype=np.float64))}
        return {**batch, "alone": self._alone}

    def rows(self) -> list[list[int]]:
        """Return the places of the rows in each pack of this epoch."""
        return self._packs

    def update(self, number: int) -> list[int]:
        """Return the places of the rows of an update, counted from 0 over all epochs."""
        epoch, place = divmod(number, len(self._packs) // self.parts)
        return self._updates(epoch)[place]

    def _updates(self, epoch: int) -> list[list[int]]:
        """Draw the rows of each update, once."""
        if epoch not in self._drawn:
            self._drawn[epoch] = self._draw(epoch)
        return self._drawn[epoch]

    def _draw(self, epoch: int) -> list[list[int]]:
        """Shuffle rows, then deal them by length within a group of updates, so that these are nearly of one size."""
        shuffled = sorted(range(len(self._lengths)), key=lambda row: (self._scores[row], draw(self._seed, epoch, row)))
        if any(self._scores):
            return [shuffled[start : start + self._size] for start in range(0, len(shuffled), self._size)]
        whole = len(shuffled) - len(shuffled) % self._size
        updates: list[list[int]] = []
        for start in range(0, whole, GROUP * self._size):
            group = sorted(shuffled[start : min(start + GROUP * self._size, whole)], key=lambda row: -self._lengths[row])
            dealt: list[list[int]] = [[] for _ in range(len(group) // self._size)]
            for place, row in enumerate(group):
                turn, seat = divmod(place, len(dealt))
                dealt[seat if turn % 2 == 0 else -1 - seat].append(row)
            updates += sorted(dealt, key=lambda update: draw(self._seed, epoch, update[0]))
        if updates:
            largest = max(range(len(updates)), key=lambda place: self._tokens(updates[place]))
            updates.insert(0, updates.pop(largest))
        return [*updates, shuffled[whole:]] if whole < len(shuffled) else updates

    def _tokens(self, pack: Sequence[int]) -> int:
        return sum(self._lengths[row] for row in pack)

    def _fits(self, update: Sequence[int], parts: int) -> bool:
        return max(map(self._tokens, self._spread(update, parts))) <= self._capacity

    def _spread(self, update: Sequence[int], parts: int) -> list[list[int]]:
        """Spread rows over packs of nearly the same size: the longest first, each to the emptiest pack (LPT, Graham 1969)."""
        packs: list[list[int]] = [[] for _ in range(parts)]
        heap = [(0, place) for place in range(parts)]
        for row in sorted(update, key=lambda row: (-self._lengths[row], row)):
            load, place = heapq.heappop(heap)
            packs[place].append(row)
            heapq.heappush(heap, (load + self._lengths[row], place))
        return sorted(packs, key=self._tokens, reverse=True)


def collate(
    ids: Sequence[Ids], scored: Sequence[Ids], *, pad: int, longest: int, static: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Return one forward pass over rows put end to end.

    `input_ids` and `position_ids` are [1, width]; `cu_seq_lens_q` the places where rows begin, and the end, int32; `score_at` the
    positions whose next token is learned and `targets` those tokens, [scored]. In static shapes the tails are pads: rows of pad
    tokens, empty rows at the end, positions scored against -100. `num_tokens` and `num_targets` count without them.
    """
    lengths = [len(each) for each in ids]
    num_tokens, num_targets = sum(lengths), sum(map(len, scored))
    width, width_scored, sequences = static or (max(num_tokens, 2), max(num_targets, 1), 0)
    filling = width - num_tokens
    lengths += [longest] * (filling // longest) + ([filling % longest] if filling % longest else [])
    starts = np.cumsum([0, *lengths])
    flat = np.concatenate([*ids, np.full(filling, pad, dtype=np.int32)]).astype(np.int64)
    at = np.concatenate([*(each + start for each, start in zip(scored, starts, strict=False)), np.zeros(0, dtype=np.int64)]).astype(
        np.int64
    )
    targets = np.full(width_scored, -100, dtype=np.int64)
    targets[:num_targets] = flat[at + 1]
    places = np.concatenate([starts, np.full(max(sequences + 1 - len(starts), 0), width)]).astype(np.int32)
    bounds = torch.from_numpy(places)
    return {
        "input_ids": torch.from_numpy(flat)[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest if static else max(lengths),
        "max_length_k": longest if static else max(lengths),
        "score_at": torch.from_numpy(np.concatenate([at, np.zeros(width_scored - num_targets, dtype=np.int64)])),
        "targets": torch.from_numpy(targets),
        "num_tokens": num_tokens,
        "num_targets": num_targets,
        "static": static is not None,
    }


def _up(number: int) -> int:
    return -(-number // ROUND) * ROUND


def draw(seed: int, epoch: int, row: int) -> bytes:
    """Return what rows are sorted by to shuffle them: the same on every machine."""
    return hashlib.sha256(f"{seed}/{epoch}/{row}".encode()).digest()[:8]
