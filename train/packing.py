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
ROUND = 128  # padded shapes are multiples of this: what matrix units like


class Packs(Dataset[dict[str, Any]]):
    """The forward passes of an epoch. Item i is one pack: whole rows, one after another, as the tensors of one forward pass.

    An update of the optimizer has `batch_size` rows, drawn by seed and epoch alone. They are spread over `parts` packs of at most
    `batch_tokens` tokens (a longer row is a pack of its own), so what an update learns from does not depend on the memory. With
    `padded` a pack is filled up to a multiple of ROUND tokens, which matrix units like. The pack that comes first is as large as any:
    what does not fit fails at once, not in the night.
    """

    def __init__(
        self, rows: Sequence[Row], *, batch_size: int, batch_tokens: int, seed: int, pad: int,
        epochs: int = 1, workers: int = 1, padded: bool = False,
    ) -> None:  # fmt: skip
        self._ids: list[Ids] = [np.asarray(row.ids, dtype=np.int32) for row in rows]
        # position t is scored on token t + 1: the first token of a row is never learned
        self._scored: list[Ids] = [np.flatnonzero(np.asarray(row.mask[1:], dtype=bool)).astype(np.int32) for row in rows]
        self._lengths = [len(row.ids) for row in rows]
        self._seed, self._pad, self._size = seed, pad, batch_size
        self.longest = max(self._lengths)
        self._capacity = max(batch_tokens, self.longest)
        updates = [update for epoch in range(epochs) for update in self._updates(epoch)]
        least = max(-(-sum(self._lengths[row] for row in update) // self._capacity) for update in updates)
        self.parts = next(parts for parts in range(least, max(map(len, updates)) + 1) if all(self._fits(each, parts) for each in updates))
        self.parts = -(-self.parts // workers) * workers
        self._round = ROUND if padded else 1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose packs are given."""
        self._packs = [pack for update in self._updates(epoch) for pack in self._spread(update, self.parts)]

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return collate([self._ids[row] for row in self._packs[index]], [self._scored[row] for row in self._packs[index]],
                       pad=self._pad, longest=self.longest, multiple=self._round)  # fmt: skip

    def rows(self) -> list[list[int]]:
        """Return the places of the rows in each pack of this epoch."""
        return self._packs

    def _updates(self, epoch: int) -> list[list[int]]:
        shuffled = sorted(range(len(self._lengths)), key=lambda row: _draw(self._seed, epoch, row))
        updates = [shuffled[start : start + self._size] for start in range(0, len(shuffled), self._size)]
        largest = max(range(len(updates)), key=lambda place: self._tokens(updates[place]))
        if largest and len(updates[largest]) == self._size:
            updates.insert(0, updates.pop(largest))
        return updates

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


def collate(ids: Sequence[Ids], scored: Sequence[Ids], *, pad: int, longest: int, multiple: int = 1) -> dict[str, Any]:
    """Return one forward pass over rows put end to end.

    `input_ids` and `position_ids` are [1, width]; `cu_seq_lens_q` the places where rows begin, and the end, int32; `score_at` the
    positions whose next token is learned and `targets` those tokens, [scored]. Up to a `multiple` the width is filled with rows of pad
    tokens, which nothing learns from, and `targets` with -100. `max_length_q` is `longest`, the same for every pack. `num_tokens` and
    `num_targets` count without what is filled.
    """
    lengths = [len(each) for each in ids]
    num_tokens, num_targets = sum(lengths), sum(map(len, scored))
    width = _up(max(num_tokens, 2), multiple)
    filling = width - num_tokens
    lengths += [longest] * (filling // longest) + ([filling % longest] if filling % longest else [])
    starts = np.cumsum([0, *lengths])
    flat = np.concatenate([*ids, np.full(filling, pad, dtype=np.int32)]).astype(np.int64)
    at = np.zeros(_up(max(num_targets, 1), multiple), dtype=np.int64)
    targets = np.full(len(at), -100, dtype=np.int64)
    if num_targets:
        at[:num_targets] = np.concatenate([each + start for each, start in zip(scored, starts, strict=False)])
        targets[:num_targets] = flat[at[:num_targets] + 1]
    bounds = torch.from_numpy(starts.astype(np.int32))
    return {
        "input_ids": torch.from_numpy(flat)[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "score_at": torch.from_numpy(at),
        "targets": torch.from_numpy(targets),
        "num_tokens": num_tokens,
        "num_targets": num_targets,
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _draw(seed: int, epoch: int, row: int) -> bytes:
    return hashlib.sha256(f"{seed}/{epoch}/{row}".encode()).digest()[:8]
