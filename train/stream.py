"""What goes from layer to layer: bfloat16 where layers compute in bfloat16, under float32 weights, too.

Autocast leaves the embedding of float32 weights alone, and whatever is added to float32 is float32. So each norm and each sum of the
residual stream would move 4 bytes a number, forward and back, of which the layers gave 2. With the embedding's output taken to bfloat16
the stream is what it is in inference, and in a model of bfloat16 weights; weights, gradients and optimizer stay float32, norms and the
loss compute in it. float16 does not reach as far as the streams of some models do, and stays out of it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def stream_format(device: str) -> torch.dtype | None:
    """Return what the residual stream is taken to on this kind of device, under autocast as it is now; None: it stays as it is."""
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    return torch.bfloat16 if half else None


def narrow_stream(compute: Callable[[Any, dict[str, Any]], T]) -> Callable[[Any, dict[str, Any]], T]:
    """Let a model's embedding give the stream's format while `compute(model, batch)` runs.

    Where learned places are added to it (GPT-2), the stream is float32 again, and as slow as before.
    """

    @wraps(compute)
    def streaming(model: Any, batch: dict[str, Any]) -> T:
        kind = stream_format(batch["input_ids"].device.type)
        if kind is None:
            return compute(model, batch)
        handle = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.to(kind))
        try:
            return compute(model, batch)
        finally:
            handle.remove()

    return streaming
