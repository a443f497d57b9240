"""The loss straight from the hidden states: -log p of the learned tokens, in pieces, so that the logits of a pack never stand in memory.

Logits and their gradient are made in the same pass, as in Liger's fused linear cross entropy (Hsu et al. 2024, arXiv 2410.10989): three
matrix products a token instead of the four of a loss that computes its logits again on the way back.
"""

from itertools import pairwise
from typing import Any

import torch

from ..core.head import head_of
from .stream import narrow_stream

ELEMENTS = 1 << 27  # of logits held at once: 256 MB in 16 bits; up to four times that where `piece_rows` says so


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden · weightᵀ)[target] over positions; a target of -100 counts nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float,
        scale: float,
        compiled: bool = False,
        shares: torch.Tensor | None = None,
        dft: bool = False,
    ) -> torch.Tensor:
        """hidden [N, H], weight [V, H], bias [V], targets [N] → a float32 scalar. softcap 0 is none; scale multiplies the logits.

        `shares` [N] weigh the positions. With `dft` each is also weighed by its own probability, taken as a constant: dynamic
        fine-tuning (Wu et al. 2025, arXiv 2508.05629, equation 8).
        """
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        pieces = -(-len(hidden) // piece_rows(weight.shape[0], weight.shape[1], compiled and need_weight))
        size = -(-len(hidden) // pieces)  # pieces of one size: their code is compiled once or twice
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        losses = _compiled_losses if compiled and hidden.is_cuda else _losses
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                part, wanted = hidden[start : start + size], targets[start : start + size]
                logits = part @ matrix.T
                if bias is not None:
                    logits = logits + bias.to(logits.dtype)
                part_of = None if shares is None else shares[start : start + size]
                loss, grad = losses(logits, wanted, softcap, scale, part_of, dft)
                total += loss
                if grad_hidden is not None:
                    grad_hidden[start : start + size] = grad @ matrix
                if grad_weight is not None:
                    grad_weight += grad.T @ part
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.formats = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        """Scale the gradients that the forward pass made."""
        grads = [
            None if grad is None else (grad * outer[0].to(grad.dtype)).to(kind)
            for grad, kind in zip(ctx.saved_tensors, ctx.formats, strict=True)
        ]
        return *grads, *[None] * 6


def piece_rows(vocabulary: int, width: int, adds_up: bool) -> int:
    """Return how many positions a piece has. `adds_up`: each adds its part to the weight's gradient, in compiled code.

    Adding moves 12 bytes a weight, whatever the piece; the products take 6 operations a weight and position. On a card of 165 operations
    a byte that is as much time as the products of 330 positions: a third where a piece has 900, a tenth where it has 3,500.
    """
    least = max(1, ELEMENTS // vocabulary)
    return max(least, min(4 * width, 4 * least)) if adds_up else least


def _losses(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float, scale: float, shares: torch.Tensor | None = None, dft: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses and the gradient by the raw logits."""
    scores = logits.float() * scale
    bent = torch.tanh(scores / softcap) if softcap else None
    if bent is not None:
        scores = bent * softcap
    valid = targets >= 0
    wanted = targets.clamp(min=0)[:, None]
    norm = scores.logsumexp(-1, keepdim=True)
    likelihood = (scores.gather(1, wanted) - norm)[:, 0]
    factor = valid.float() if shares is None else valid * shares
    if dft:
        factor = factor * likelihood.exp()
    loss = -(likelihood * factor).sum()
    places = torch.arange(scores.shape[-1], device=scores.device)
    grad = ((scores - norm).exp() - (places == wanted).float()) * factor[:, None]
    if bent is not None:
        grad = grad * (1 - bent * bent)
    return loss, (grad * scale).to(logits.dtype)


def _losses_in_place(logits: torch.Tensor, *told: Any) -> torch.Tensor:
    """Return the sum of the losses, and write the gradient over the logits: compiled, no more than these stands in memory."""
    loss, grad = _losses(logits, *told)
    logits.copy_(grad)
    return loss


_in_place = torch.compile(_losses_in_place, dynamic=False)


def _compiled_losses(logits: torch.Tensor, *told: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _in_place(logits, *told), logits


def loss_sum(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the sum of -log p over a pack's targets, from the model's backbone and head, or from its logits where rows stand alone.

    `batch` is what `packing.collate` makes; `weights` in it weigh the targets, `dft` and `neftune` say how a token is learned.
    """
    scored, found = scored_states(model, batch)
    return weighted_loss(scored, found, batch, batch.get("weights"), dft=bool(batch.get("dft")))


@narrow_stream
def scored_states(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, float, float] | None]:
    """Return the hidden states [N, H] at a pack's scored positions and the head, as `head_of` does; without one, logits [N, V]."""
    given = _embedded(model, batch) if batch.get("neftune") and model.training else {"input_ids": batch["input_ids"]}
    if batch["alone"]:
        rows = pairwise(batch["cu_seq_lens_q"].tolist())
        plain = type(model).forward  # the instance's own enters autocast, and may stand around this: entered twice, it stays on for good
        cuts = [{name: each[:, a:b] for name, each in given.items()} for a, b in rows if b > a]
        parts = [plain(model, **each, use_cache=False).logits[0] for each in cuts]
        return torch.cat(parts)[batch["score_at"]], None
    inner = {name: batch[name] for name in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    hidden = model.base_model(**given, **inner, attention_mask=None, use_cache=False).last_hidden_state[0]
    scored = hidden[batch["score_at"]]
    if (found := head_of(model)) is None:
        return model.get_output_embeddings()(scored), None
    if torch.is_autocast_enabled(hidden.device.type):
        scored = scored.to(torch.get_autocast_dtype(hidden.device.type))
    return scored, found


def weighted_loss(
    scored: torch.Tensor, found: tuple[Any, float, float] | None, batch: dict[str, Any], shares: torch.Tensor | None, dft: bool = False
) -> torch.Tensor:
    """Return the sum of -log p over a pack's targets, each times its share, from what `scored_states` returns."""
    if found is None:
        losses = torch.nn.functional.cross_entropy(scored.float(), batch["targets"], ignore_index=-100, reduction="none")
        losses = losses * (-losses).exp().detach() if dft else losses
        return (losses if shares is None else losses * shares).sum()
    head, softcap, scale = found
    total: torch.Tensor = LinearCrossEntropy.apply(
        scored, head.weight, head.bias, batch["targets"], softcap, scale, batch["static"], shares, dft
    )
    return total


@torch.no_grad()
def log_likelihoods(scored: torch.Tensor, found: tuple[Any, float, float] | None, targets: torch.Tensor) -> torch.Tensor:
    """Return log p of each target [N], float32, from what `scored_states` returns; 0 where the target is -100."""
    if found is None:
        return -torch.nn.functional.cross_entropy(scored.float(), targets, ignore_index=-100, reduction="none")
    head, softcap, scale = found
    matrix, parts = head.weight.to(scored.dtype), []
    size = max(1, ELEMENTS // 4 // len(matrix))  # float32 copies stand here that compiled code has none of: no more memory than a step
    with torch.autocast(scored.device.type, enabled=False):
        for part, wanted in zip(scored.split(size), targets.split(size), strict=True):
            logits = part @ matrix.T
            logits = (logits if head.bias is None else logits + head.bias.to(logits.dtype)).float() * scale
            logits = torch.tanh(logits / softcap) * softcap if softcap else logits
            parts.append(-torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="none"))
    return torch.cat(parts)


def _embedded(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the embeddings with noise: each number ± alpha / √(length · width) at most, by the row's own length, not the pack's.

    NEFTune (Jain et al. 2023, arXiv 2310.05914).
    """
    embedded = model.get_input_embeddings()(batch["input_ids"])
    lengths = batch["cu_seq_lens_q"].diff()
    of_token = torch.repeat_interleave(lengths, lengths, output_size=embedded.shape[1])
    reach = batch["neftune"] / (of_token * embedded.shape[-1]).float().sqrt()
    noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
    return {"inputs_embeds": (embedded + noise * reach[None, :, None]).to(embedded.dtype)}
