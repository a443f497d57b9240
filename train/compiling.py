"""Whether code can be compiled here: PyTorch asks for Triton, a C compiler and Python's headers, of which images lack one or the other."""

import logging
from functools import cache

import torch

log = logging.getLogger(__name__)

COMPILED_STEPS = 300  # a run that is shorter does not earn the minute that compiling takes


@cache
def can_compile(device: str) -> bool:
    """Say whether PyTorch compiles code for a device, forward and back, by trying, once. That it does not is said aloud."""

    def work(numbers: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(2 * numbers).sum()

    try:
        compiled = torch.compile(work, dynamic=False)
        compiled(torch.ones(256, device=device, requires_grad=True)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever is missing, the same is computed without, which is said
        told = " ".join(str(error).split())[:300]
        log.warning("code cannot be compiled here, so that training is slower: %s: %s", type(error).__name__, told)
        return False
    return True
