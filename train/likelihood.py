"""How likely a model finds the answers of rows: the loss that it is trained and compared by."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .data import Row


def answer_loss(model: Any, rows: Sequence[Row]) -> float:
    """Return -log P(answer | prompt) per token over rows, in nats, in eval mode."""
    count = sum(int(row.trained[1:].sum()) for row in rows)
    return sum(row_losses(model, rows)) / count if count else math.nan


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Row]) -> list[float]:
    """Return -log P(answer | prompt) of each row, summed over its tokens, in nats, in eval mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = []
    for row in rows:
        ids = torch.tensor([row.ids], device=device)
        labels = torch.tensor(row.labels[1:], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")))
    model.train(training)
    return found
