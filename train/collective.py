"""Numbers that all processes of a run have to agree on, and gradients that they add up."""

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(hours=1)  # with which the processes wait for one that writes a checkpoint, or answers prompts
SENT = 1 << 25  # numbers that are sent at once: enough to fill a link, and little memory


def over_processes(*numbers: float) -> tuple[float, ...]:
    """Return the sum of each number over all processes. The machines' processors do it: no GPU is waited for."""
    if not torch.distributed.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(total, group=_processors())
    return tuple(total.tolist())


def whole_on_each(weights: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return those that are trained and stand whole on each process (FSDP2 takes the others apart, and adds up their gradients itself)."""
    return [each for each in weights if each.requires_grad and not isinstance(each, DTensor)]


def held_here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a tensor; PyTorch computes with no list that has shares and whole tensors in it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def begin_alike(weights: Sequence[torch.nn.Parameter]) -> None:
    """Give all processes the first one's weights."""
    for each in weights:
        torch.distributed.broadcast(each.data, 0)


def average_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Put the mean over all processes into each gradient; one that another process has alone is a zero here.

    DistributedDataParallel begins while an update's last pass still computes, but by hooks on the host, with which no pass can be recorded.
    """
    found = over_processes(*(each.grad is not None for each in weights))
    learned = [each for each, count in zip(weights, found, strict=True) if count]
    for each in learned:
        each.grad = torch.zeros_like(each) if each.grad is None else each.grad
    for grads in _together([each.grad for each in learned]):
        sent = grads[0] if len(grads) == 1 and grads[0].is_contiguous() else torch.cat([each.reshape(-1) for each in grads])
        torch.distributed.all_reduce(sent)
        sent /= torch.distributed.get_world_size()
        if sent is not grads[0]:
            parts = sent.split([each.numel() for each in grads])
            torch._foreach_copy_(grads, [part.view(each.shape) for part, each in zip(parts, grads, strict=True)])


def clip_gradients(weights: Iterable[torch.nn.Parameter], most: float) -> torch.Tensor:
    """Scale gradients down where the norm of all of them is over `most`; return what it was, float32 [], on their device.

    Its squares are added up in 64 bits: rounded to 32, their order is not seen in it, which depends on how processes share the weights.
    """
    grads = [each.grad for each in weights if each.grad is not None]
    shares = [held_here(each) for each in grads if isinstance(each, DTensor)]
    whole = [each for each in grads if not isinstance(each, DTensor)]
    apart = [_squares(kind) for kind in (shares, whole) if kind]
    if shares:
        torch.distributed.all_reduce(apart[0])
    norm = torch.stack(apart).sum().sqrt().float() if apart else torch.zeros(())
    if grads and most < math.inf:
        torch._foreach_mul_(shares + whole, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].device.type == "cpu":  # which makes a copy in 64 bits: of what its caches hold, it takes a fifth of the time
        tensors = [piece for each in tensors for piece in each.reshape(-1).split(1 << 15)]
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().sum()


def sent_at_once(weights: Sequence[torch.Tensor]) -> int:
    """Return the bytes of the largest copy that `average_gradients` makes of such weights' gradients."""
    groups = (each for each in _together(weights) if len(each) > 1)
    return max((sum(each.numel() for each in group) * group[0].element_size() for group in groups), default=0)


def _together(grads: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Yield gradients of one format, as many as are sent at once."""
    group: list[torch.Tensor] = []
    held = 0  # numbers in it: counted as it grows, for an adapter has a thousand small tensors
    for grad in grads:
        if group and (grad.dtype != group[0].dtype or held + grad.numel() > SENT):
            yield group
            group, held = [], 0
        group.append(grad)
        held += grad.numel()
    if group:
        yield group


@cache
def _processors() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
