"""AdamW on bfloat16 weights that loses no small step: what lies between two numbers of 8 bits is rounded to either, at random.

A step of 2e-5 is less than half the distance of most weights to the next bfloat16: rounded to the nearest it is lost, at every update.
So is the decay of the second moment, a thousandth of it, which would only ever grow. Rounded up as often as the value lies up, both come
out right on average. Gupta et al. 2015, arXiv 1502.02551; for bfloat16 training Zamirai et al. 2020, arXiv 2010.06192. The optimizer is
Loshchilov and Hutter's, arXiv 1711.05101.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .collective import held_here

PIECE = 1 << 22  # weights that are updated at once: so much stands in float32, several times


class RoundedAdamW(torch.optim.Optimizer):
    """PyTorch's AdamW, computed in float32; weights and moments are kept in the weights' format, float32 ones as PyTorch keeps them.

    What is drawn depends on the update and on a weight's place alone: runs that go on after a kill, and processes that hold the same
    weights, round alike.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._random: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for weight in group["params"]:
                place += 1
                if weight.grad is not None:
                    self._update(weight, place, group)
        return loss

    def _update(self, weight: torch.nn.Parameter, place: int, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        state["step"] = step = int(state["step"]) + 1  # PyTorch's is a tensor
        (mean_decay, square_decay), rate = group["betas"], float(group["lr"])
        first, second = 1 - mean_decay**step, math.sqrt(1 - square_decay**step)
        kinds: list[Any] = [weight, state["exp_avg"], state["exp_avg_sq"], weight.grad]
        held = [held_here(each) for each in kinds]
        random = self._random.setdefault(held[0].device, torch.Generator(held[0].device))
        random.manual_seed(step * 1_000_003 + place)  # a processor's generator reads 32 bits of it
        for kept, mean_kept, square_kept, grad_kept in zip(*_pieces(held), strict=True):
            own, mean, square, grad = (each.float() for each in (kept, mean_kept, square_kept, grad_kept))
            mean.lerp_(grad, 1 - mean_decay)
            square.mul_(square_decay).addcmul_(grad, grad, value=1 - square_decay)
            own.mul_(1 - rate * group["weight_decay"])
            own.addcdiv_(mean, square.sqrt().div_(second).add_(group["eps"]), value=-rate / first)
            if kept.dtype is torch.bfloat16:
                kept.copy_(rounded(own, random))
                mean_kept.copy_(mean)
                square_kept.copy_(rounded(square, random))


def _pieces(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Return views of pieces of tensors of one shape, as small as their places in memory allow."""
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
