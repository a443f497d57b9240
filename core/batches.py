"""Run many texts through a model in batches: longest first, within a budget of tokens, in halves where memory runs out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

WINDOW = 1 << 14  # texts that are sorted by length together
CPU_TOKENS = 4096  # of a batch on a CPU, which gains nothing from more, and loses what is under way when it is killed

T = TypeVar("T")
R = TypeVar("R")


class BatchRunner:
    """Makes batches of like length, so that little is padded, and remembers how many tokens fitted into memory."""

    def __init__(self, batch_tokens: int, device: str) -> None:
        """`batch_tokens` bounds the padded tokens of a batch; one text alone may be longer."""
        self.batch_tokens = min(batch_tokens, CPU_TOKENS) if device == "cpu" else batch_tokens

    def run(
        self, items: Iterable[T], length: Callable[[T], int], compute: Callable[[list[T]], Iterable[R]], failed: Callable[[T, str], R]
    ) -> Iterator[R]:
        """Yield the results of all items, longest first within a window.

        `compute` takes a batch and returns one result for each of its items; `failed` makes the result of an item that
        does not fit into memory even alone.
        """
        waiting = iter(items)
        while window := sorted(islice(waiting, WINDOW), key=length, reverse=True):
            start = 0
            while start < len(window):
                size = max(1, self.batch_tokens // max(length(window[start]), 1))
                yield from self._halving(window[start : start + size], compute, failed)
                start += size

    def _halving(self, batch: list[T], compute: Callable[[list[T]], Iterable[R]], failed: Callable[[T, str], R]) -> Iterator[R]:
        try:
            results = list(compute(batch))
        except torch.OutOfMemoryError:
            results = None  # what the failed batch held is free once its error is handled: the halves run outside
        if results is not None:
            assert len(results) == len(batch)
            yield from results
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            yield failed(batch[0], "out of memory, even alone in its batch")
            return
        self.batch_tokens = max(1, self.batch_tokens // 2)
        log.info("out of memory with %d texts at once: going on with batches of %s tokens", len(batch), f"{self.batch_tokens:,}")
        middle = (len(batch) + 1) // 2
        yield from self._halving(batch[:middle], compute, failed)
        yield from self._halving(batch[middle:], compute, failed)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, [rows, longest], padded on one side."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for line, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[line, place] = torch.tensor(sequence)
        mask[line, place] = 1
    return ids, mask
