"""AdamW on bfloat16 weights that loses no small step: what lies between two numbers of 8 bits is rounded to either, at random.

A step of 2e-5 is less than half the distance of most weights to the next bfloat16: rounded to the nearest it is lost, at every update.
So is the decay of the second moment, a thousandth of it, which would only ever grow. Rounded up as often as the value lies up, both come
out right on average. Gupta et al. 2015, arXiv 1502.02551; for bfloat16 training Zamirai et al. 2020, arXiv 2010.06192. The optimizer is
Loshchilov and Hutter's, arXiv 1711.05101.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .collective import held_here

PIECE = 1 << 22  # weights that are updated at once
BESIDE = 32  # bytes that each of them takes meanwhile, at most

Piece = tuple[torch.Tensor, ...]  # of a weight, its mean and square of gradients, and its gradient


class RoundedAdamW(torch.optim.Optimizer):
    """PyTorch's AdamW, computed in float32; weights and moments are kept in the weights' format, bfloat16 or float32.

    What is drawn depends on the update and on which weights there are: a run that goes on after a kill rounds as it would have, and so
    do processes that hold the same weights. Shares of a weight are rounded each by numbers of their own.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, step, share, together) in enumerate(self._together()):
            random = torch.Generator(together[0][0].device).manual_seed(step * 1_000_003 + share * 97_003 + number)  # 32 bits are read
            _update(group, step, together, random)
        return loss

    def _together(self) -> Iterator[tuple[dict[str, Any], int, int, list[Piece]]]:
        """Yield weights with their moments and gradients, as many as are updated at once, with their group, update and share's number."""
        for group in self.param_groups:
            some: list[Piece] = []
            held, before = 0, (0, 0, torch.float32)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                state["step"] = step = int(state["step"]) + 1  # PyTorch's is a tensor
                now = (step, torch.distributed.get_rank() if isinstance(weight, DTensor) else 0, weight.dtype)
                for piece in zip(*_pieces([weight, state["exp_avg"], state["exp_avg_sq"], weight.grad]), strict=True):
                    if some and (now != before or held + piece[0].numel() > PIECE):
                        yield group, *before[:2], some
                        some, held = [], 0
                    some.append(piece)
                    held += piece[0].numel()
                    before = now
            if some:
                yield group, *before[:2], some


def _update(group: dict[str, Any], step: int, together: list[Piece], random: torch.Generator) -> None:
    (mean_decay, square_decay), rate = group["betas"], float(group["lr"])
    first, second = 1 - mean_decay**step, math.sqrt(1 - square_decay**step)
    kinds = [list(tensors) for tensors in zip(*together, strict=True)]
    weight, mean, square, grad = (
        (each[0] if len(each) == 1 else torch.cat([tensor.reshape(-1) for tensor in each])).float() for each in kinds
    )
    mean.lerp_(grad, 1 - mean_decay)
    square.mul_(square_decay).addcmul_(grad, grad, value=1 - square_decay)
    weight.mul_(1 - rate * group["weight_decay"])
    weight.addcdiv_(mean, square.sqrt().div_(second).add_(group["eps"]), value=-rate / first)
    if kinds[0][0].dtype is not torch.float32:
        assert kinds[0][0].dtype is torch.bfloat16
        weight, square = rounded(weight, random), rounded(square, random)
    for kept, made in zip(kinds, (weight, mean, square), strict=False):
        parts = made.split([each.numel() for each in kept]) if len(kept) > 1 else [made]
        torch._foreach_copy_(kept, [part.view(each.shape) for part, each in zip(parts, kept, strict=True)])


def _pieces(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Return views of pieces of tensors of one shape, as small as their places in memory allow."""
    tensors = [held_here(each) for each in tensors]
    if all(each.is_contiguous() for each in tensors):
        return [each.view(-1).split(PIECE) for each in tensors]
    rows = max(1, PIECE * len(tensors[0]) // tensors[0].numel())
    return [each.split(rows) for each in tensors]


def rounded(values: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Round float32 to one of the two bfloat16 around each: to either with the probability that makes the value itself the mean.

    What is not finite stays so.
    """
    bits = torch.randint(1 << 16, values.shape, generator=random, device=values.device, dtype=torch.int32)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)
