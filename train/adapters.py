"""LoRA's narrow products without passes over memory of their own: beside a product of a full matrix they cost the memory's time.

PEFT takes each layer's input through float32, writes the adapter's product out, scales it and adds it, and does so for every layer,
though the layers before attention read one input, and those before a gate another. Here such layers are one function: the input is
read once for all their narrow products, these are added inside the wide ones' outputs, and gradients of the narrow matrices, sums
over tens of thousands of tokens, are made in pieces, which a GPU's units share. The same to rounding. This file can go when PEFT does it.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from .config import TrainConfig

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read one input, by their names in transformers
PIECES = 32


def adapter_config(config: TrainConfig, model: Any = None) -> Any:
    """Return the adapter that a run trains, as PEFT wants it. In a `model` with state-space layers, out_proj is left out."""
    layers = () if model is None else (dict(layer.named_parameters(recurse=False)) for layer in model.modules())
    state_space = any("A_log" in own and "D" in own for own in layers)  # Mamba 2 reads it past an adapter, PEFT refuses it in Mamba
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        exclude_modules=["out_proj"] if state_space else None,
        task_type="CAUSAL_LM",
    )


class Products(torch.autograd.Function):
    """x Wᵢᵀ + bᵢ + s (x Aᵢᵀ) Bᵢᵀ for n layers with one input, W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, scale: float, *parts: Any) -> Any:
        """x [N, in]; then n each of W [out, in], b [out] or None, A [r, in], B [out, r] → n times [N, out]. A, B may be float32."""
        weights, biases, downs, ups = (list(parts[place * count : (place + 1) * count]) for place in range(4))
        down = torch.cat([each.to(x.dtype) for each in downs])
        narrow_ups = [each.to(x.dtype) for each in ups]
        narrow, *outs = products(x, weights, biases, down, narrow_ups, scale)
        ctx.save_for_backward(x, down, narrow, *weights, *narrow_ups)
        ctx.count, ctx.scale = count, scale
        ctx.kinds = [each.dtype for each in (*downs, *ups)]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Return the gradients of x, A and B."""
        x, down, narrow, *rest = ctx.saved_tensors
        weights, ups, count = rest[: ctx.count], rest[ctx.count :], ctx.count
        needed = ctx.needs_input_grad[0]
        grad_x, grad_down, *grad_ups = products_backward(list(grads), x, narrow, weights, down, ups, ctx.scale, needed)
        made = [grad.to(kind) for grad, kind in zip([*grad_down.chunk(count), *grad_ups], ctx.kinds, strict=True)]
        return grad_x if needed else None, None, None, *[None] * (2 * count), *made


# As operators, which compiled code takes as they are: written out there, each sum below would be a product into a copy of its first term,
# 7 % of a step's time for copies (Qwen3-0.6B on an H200).
@torch.library.custom_op("sftkit::products", mutates_args=())
def products(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], down: torch.Tensor, ups: list[torch.Tensor],
    scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """Return x Aᵀ of all layers, [N, n r], then each layer's output, all in x's format. `down` has all layers' A, one below the other."""
    narrow = x @ down.T
    outs = [x @ weight.T if bias is None else torch.addmm(bias, x, weight.T) for weight, bias in zip(weights, biases, strict=True)]
    for out, own, up in zip(outs, narrow.chunk(len(ups), 1), ups, strict=True):
        out.addmm_(own, up.T, alpha=scale)
    return [narrow, *outs]


@products.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], down: torch.Tensor, ups: list[torch.Tensor],
    scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    return [x.new_empty(len(x), len(each)) for each in (down, *weights)]


@torch.library.custom_op("sftkit::products_backward", mutates_args=())
def products_backward(
    grads: list[torch.Tensor], x: torch.Tensor, narrow: torch.Tensor, weights: list[torch.Tensor], down: torch.Tensor,
    ups: list[torch.Tensor], scale: float, of_input: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the gradients of x (empty unless `of_input`), of all A and of each B, the last two in float32."""
    inner = torch.empty_like(narrow)
    for grad, up, own in zip(grads, ups, inner.chunk(len(ups), 1), strict=True):
        torch.addmm(own, grad, up, beta=0, alpha=scale, out=own)
    grad_x = inner @ down if of_input else x.new_empty(0)
    if of_input:
        for grad, weight in zip(grads, weights, strict=True):
            grad_x.addmm_(grad, weight)
    grad_ups = [_over_tokens(grad, own).mul_(scale) for grad, own in zip(grads, narrow.chunk(len(ups), 1), strict=True)]
    return [grad_x, _over_tokens(inner, x), *grad_ups]


@products_backward.register_fake
def _(
    grads: list[torch.Tensor], x: torch.Tensor, narrow: torch.Tensor, weights: list[torch.Tensor], down: torch.Tensor,
    ups: list[torch.Tensor], scale: float, of_input: bool,
) -> list[torch.Tensor]:  # fmt: skip
    grad_x = torch.empty_like(x) if of_input else x.new_empty(0)
    return [grad_x, *(torch.empty_like(each, dtype=torch.float32) for each in (down, *ups))]


def _over_tokens(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return leftᵀ right, [N, a] and [N, b] → [a, b] in float32: in pieces of the tokens, added up in float32."""
    pieces = PIECES if len(left) % PIECES == 0 else 1
    one, other = (each.unflatten(0, (pieces, len(left) // pieces)) for each in (left, right))
    return torch.bmm(one.transpose(1, 2), other).sum(0, dtype=torch.float32)


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's layer, computed by `Products`. Anything but training one plain adapter goes PEFT's way."""

    sharing: "list[FusedLinear]"  # this layer and those after it that read the same input
    pending: list[Any]  # shared by these: the input, then the outputs that were made ahead

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., in] → [..., out]."""
        half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if args or kwargs or not self.training or self.disable_adapters or self.merged or self.base_layer.weight.dtype != half:
            return super().forward(x, *args, **kwargs)
        if self.pending and self.pending[0] is x and len(self.pending) == len(self.sharing) + 1:
            out = self.pending.pop(1)
            if len(self.pending) == 1:
                self.pending.clear()
            return out
        self.pending.clear()
        name = self.active_adapters[0]
        parts: list[list[Any]] = [[], [], [], []]
        for layer in self.sharing:
            tensors = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A[name].weight, layer.lora_B[name].weight
            for part, tensor in zip(parts, tensors, strict=True):
                part.append(tensor)
        flat = x.reshape(-1, x.shape[-1]).to(half)
        outs = Products.apply(flat, len(self.sharing), self.scaling[name], *parts[0], *parts[1], *parts[2], *parts[3])
        first, *others = (each.reshape(*x.shape[:-1], -1) for each in outs)
        if others:
            self.pending.extend([x, *others])
        return first


def fuse_adapters(model: Any) -> int:
    """Let a model's plain LoRA layers compute by `Products`; return how many. Dropout, 4 bits and other adapters stay PEFT's."""
    found = 0
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if _plain(child)}
        groups = [names for names in SHARING if all(name in children for name in names) and _alike([children[name] for name in names])]
        grouped = {name for names in groups for name in names}
        for names in [*groups, *((name,) for name in children if name not in grouped)]:
            layers, pending = [children[name] for name in names], list[Any]()
            for place, layer in enumerate(layers):
                layer.__class__ = FusedLinear
                layer.__dict__ |= {"sharing": layers[place:], "pending": pending}  # past Module's own, which would make them children
            found += len(layers)
    return found


def part_adapters(model: Any) -> None:
    """Give PEFT's layers back their own way."""
    for layer in model.modules():
        if type(layer) is FusedLinear:
            del layer.__dict__["sharing"], layer.__dict__["pending"]
            layer.__class__ = Linear


def _plain(layer: Any) -> bool:
    """Say whether a layer has one adapter of the plain kind on a plain matrix."""
    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.fan_in_fan_out:
        return False
    if any(each.requires_grad for each in layer.base_layer.parameters()):  # LoraConfig's bias: `Products` makes no gradient for it
        return False
    return isinstance(layer.lora_dropout[name], torch.nn.Identity) and layer.lora_A[name].bias is None and layer.lora_B[name].bias is None


def _alike(layers: list[Any]) -> bool:
    """Say whether layers have adapters of one rank and scale on inputs of one width."""
    name = layers[0].active_adapters[0]
    return len({(each.in_features, each.r.get(name), each.scaling.get(name)) for each in layers}) == 1
