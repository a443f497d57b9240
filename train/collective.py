"""Numbers that all processes of a run have to agree on."""

from datetime import timedelta
from functools import cache
from typing import Any

import torch

PATIENCE = timedelta(hours=1)  # with which the processes wait for one that writes a checkpoint, or answers prompts


def over_processes(*numbers: float) -> tuple[float, ...]:
    """Return the sum of each number over all processes. The machines' processors do it: no GPU is waited for."""
    if not torch.distributed.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=_processors())
    return tuple(total.tolist())


@cache
def _processors() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
