"""What flex_attention is told of rows end to end, for the benchmarks that hold ours against it."""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


def blocks_of_rows(bounds: torch.Tensor, width: int) -> BlockMask:
    """Return which blocks of keys each block of queries needs, of rows end to end: those from where its first row begins to itself."""
    count = width // BLOCK
    lengths = bounds.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths, output_size=width)
    places = torch.arange(count, device=bounds.device)
    first = bounds[row[places * BLOCK]] // BLOCK
    needed = (places - first + 1).to(torch.int32)[None, None]
    which = ((first[:, None] + places) % count).to(torch.int32)[None, None]

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (row[query] == row[key]) & (query >= key)

    return BlockMask.from_kv_blocks(needed, which, BLOCK_SIZE=BLOCK, mask_mod=sees)
