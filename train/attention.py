"""Attention over rows put end to end, each seeing itself alone, without further wheels: our kernels for short rows, PyTorch's for long.

transformers offers this through packages and kernels that have to be fetched; PyTorch has had `torch.nn.attention.varlen` since
2.10, and nothing but this function stands between the two. Where rows are short, most of what that does is waste: `row_attention`.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from ..core.chat import Chat
from .data import Row
from .head import log_likelihoods, scored_states
from .packing import Packs

try:
    from . import row_attention
except ImportError:  # no Triton: PyTorch without CUDA, or not on Linux
    row_attention = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME = "sftkit_packed"
# By heads of at most so many numbers, the length up to which tiles are cut from the pack; longer rows fill those that PyTorch gives each.
SHORT = {64: 2048, 128: 1024, 256: 512}
BEHIND = 4  # tokens behind a row in which it shows whether a state, or a short convolution, went over its border
CLOSE = 0.02  # of a tensor's length: how far sound kernels may be from float32; 16-bit rounding alone takes them 0.005 away

_answers: dict[tuple[Any, ...], Any] = {}  # of what is tried once


def use_packed_attention(model: Any, typical: int | None = None) -> None:
    """Make a model attend within rows. No mask is built: transformers makes none for a function that it has no mask for.

    `typical` is how long the row of a typical token is: the mean over tokens, by which the kernels' work grows.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not attends_packed(model):
        model.own_attention = model.config._attn_implementation
    model.typical_length = typical or getattr(model, "typical_length", None)
    ALL_ATTENTION_FUNCTIONS.register(NAME, partial(packed_attention, typical=model.typical_length))
    model.set_attn_implementation(NAME)


def attends_packed(model: Any) -> bool:
    """Say whether a model attends within rows now."""
    return bool(model.config._attn_implementation == NAME)


def use_own_attention(model: Any) -> None:
    """Give a model the attention back that it had."""
    if attends_packed(model):
        model.set_attn_implementation(model.own_attention)


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, typical: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend causally within each row of a pack. query [1, heads, T, d], key and value [1, kv heads, T, d] → [1, T, heads, d].

    Without `cu_seq_lens_q` the whole is one row. Softcapped attention (Gemma 2) and old cards go row by row.
    """
    total = query.shape[2]
    if cu_seq_lens_q is not None and softcap is None and _has_kernel(query, value):
        query, key, longest = query.to(value.dtype), key.to(value.dtype), max_length_q or total
        window = sliding_window if sliding_window is not None and sliding_window < longest else None
        if _is_short(typical or longest, query.shape[-1]) and _takes_tiles(query, key, value, window):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return row_attention.attend_rows(query, key, value, cu_seq_lens_q, scale, window or 0), None
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        return _varlen(q, k, v, cu_seq_lens_q, longest, scaling, window)[None], None
    return _row_by_row(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap), None


@torch.compiler.disable  # code would be compiled for the rows' own lengths, eight times for nothing
def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None, scaling: float | None, window: int | None,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    places = [0, query.shape[2]] if bounds is None else bounds.tolist()
    rows = [_one_row(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling, window, softcap) for a, b in pairwise(places) if b > a]
    return torch.cat(rows, dim=2).transpose(1, 2)


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    card = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return card and query.shape[-1] <= 256 and value.dtype in (torch.bfloat16, torch.float16)


def _is_short(length: int, size: int) -> bool:
    return any(size <= most and length <= limit for most, limit in SHORT.items())


def _takes_tiles(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    if row_attention is None or not row_attention.fits(query, key, value):
        return False
    return tiles_are_sound(value.dtype, value.device, query.shape[1], key.shape[1], query.shape[-1], window is not None)


def tried_once(work: Callable[..., T]) -> Callable[..., T]:
    """Let a function run once for the same arguments, in a thread of its own; compiled code takes its answer as a constant.

    The caller's thread may record a forward pass, or compute activations a second time.
    """

    @torch.compiler.assume_constant_result
    @wraps(work)
    def ask(*told: Any) -> T:
        if (work, told) not in _answers:
            with ThreadPoolExecutor(1) as thread:
                _answers[work, told] = thread.submit(work, *told).result()
        return _answers[work, told]

    return ask


@tried_once
def tiles_are_sound(dtype: torch.dtype, device: torch.device, heads: int, groups: int, size: int, windowed: bool) -> bool:
    """Say whether our kernels compute on this card, with this Triton, what plain attention does, forward and back: by trying, once."""
    places, window, scale = [0, 1, 131, 134, 234, 320, 320], 50 if windowed else 0, size**-0.5
    bounds = torch.tensor(places, dtype=torch.int32, device=device)
    rng = torch.Generator(device).manual_seed(0)
    made = [torch.randn(1, 320, each, size, generator=rng, device=device, dtype=dtype) for each in (heads, groups, groups, heads)]
    with torch.enable_grad():
        query, key, value = (each.transpose(1, 2).requires_grad_() for each in made[:3])
        plain = [each.detach().float().requires_grad_() for each in (query, key, value)]
        cuts = [[each[:, :, a:b] for each in plain] for a, b in pairwise(places) if b > a]
        rows = [_one_row(q, k, v, scale, window or None, None) for q, k, v in cuts]
        wanted = torch.cat(rows, dim=2).transpose(1, 2)
        expected = [wanted, *torch.autograd.grad(wanted, plain, made[3].float())]
        try:
            out = row_attention.attend_rows(query, key, value, bounds, scale, window)
            found = [out, *torch.autograd.grad(out, [query, key, value], made[3])]
            pairs = zip(found, expected, strict=True)
            off = [float(((one.float() - other).norm() / other.norm()).detach()) for one, other in pairs]
            sound = all(each <= CLOSE for each in off)  # which what is no number is not
            told = "" if sound else "off plain attention by " + ", ".join(f"{each:.1%}" for each in off)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  whatever keeps a kernel from running, PyTorch's own is there; it is said aloud
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if told:
        log.warning("%s: the kernels for short rows do not work here (%s); PyTorch's are used, which are slower", device, told)
    return not told


def _one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> torch.Tensor:
    length = query.shape[2]
    mask = None
    if (window is not None and length > window) or softcap is not None:
        place = torch.arange(length, device=query.device)
        back = place[:, None] - place[None, :]
        mask = (back >= 0) & (back < (window or length))
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    assert mask is not None
    if grouped:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None, window: int | None
) -> torch.Tensor:
    """Call PyTorch's kernel, whose arguments were renamed between 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    known = _VARLEN_ARGUMENTS
    told: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known and scale is not None:
        told["scale"] = scale
    elif scale is not None and scale != query.shape[-1] ** -0.5:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        told["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1] and not groups_heads(query.dtype, query.device):
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    out: torch.Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest, **told)  # type: ignore[assignment]
    return out


@tried_once
def groups_heads(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether the kernel takes fewer heads of keys than of queries where it has no word for it (2.11), forward and back: by trying."""
    from torch.nn.attention.varlen import varlen_attn

    with torch.random.fork_rng(devices=[device]):
        torch.manual_seed(0)
        query = torch.randn(96, 4, 64, dtype=dtype, device=device, requires_grad=True)
        key, value = (torch.randn(96, 2, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        bounds = torch.tensor([0, 33, 96], dtype=torch.int32, device=device)
        found = []
        for repeats in (1, 2):
            k, v = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
            try:
                out: Any = varlen_attn(query, k, v, bounds, bounds, 63, 63, window_size=(-1, 0))
                found.append([out, *torch.autograd.grad(out.float().square().sum(), [query, key, value])])
            except (RuntimeError, ValueError):
                return False
    return all(torch.allclose(one, other, rtol=0.05, atol=0.05) for one, other in zip(*found, strict=True))


def _varlen_arguments() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN_ARGUMENTS = _varlen_arguments()


@torch.no_grad()
def keeps_rows_apart(model: Any, rows: Sequence[Row], chat: Chat) -> bool:
    """Say whether a model computes the same for rows end to end as for each alone: some carry a state from token to token, or attend
    in ways that a kernel for variable lengths does not know. Those are trained row by row, which is said aloud.
    """
    few = [
        Row(row.key, row.tokens, np.ones(len(row), dtype=np.bool_)) for row in sorted(rows, key=lambda row: (len(row) < 8, len(row)))[:3]
    ]
    first = max(range(len(few)), key=lambda place: (len(few[place]), -place))  # where it stands in the pack
    turned = [Row(row.key, row.tokens[::-1], row.trained) if place == first else row for place, row in enumerate(few)]
    told: dict[str, Any] = {"batch_size": len(few), "batch_tokens": 1 << 30, "seed": 0, "pad": chat.pad_id}
    training = model.training
    model.eval()
    found, reason = [], ""
    try:
        found.append(_log_likelihoods(model, Packs(few, alone=True, **told)))
        use_packed_attention(model)
        found += [_log_likelihoods(model, Packs(each, **told)) for each in (few, turned)]
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        if len(found) == 0 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:160]
    finally:
        use_own_attention(model)
        model.train(training)
    if not found[0].isfinite().all():
        return True  # of a broken model nothing can be said, and training says so
    if not reason:
        # 16-bit logits of two kernels differ by a digit here and there, which is an eighth where they are 16 to 32: on an H200 by 0.03 nats
        # a token of 2 to 5 (SmolLM2-135M in bfloat16), and by nothing behind another row; a row that sees its neighbour, by 0.6 and 2
        allowed = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05
        scale = max(1.0, -float(found[0].mean()))
        off = float((found[1] - found[0]).abs().mean())  # token by token: in a sum what is too much hides what is too little
        behind = len(few[first]) - 1
        seen = float((found[2] - found[1])[behind : behind + BEHIND].abs().max()) if len(few) > 1 else 0.0
        if max(off, seen) <= allowed * scale:
            return True
        reason = f"log-probabilities off by {off:.2g} nats a token, and by {seen:.2g} behind another row"
    log.warning("%s does not keep rows apart that stand end to end (%s): each row is a forward pass of its own, which is slower",
                type(model).__name__, reason)  # fmt: skip
    return False


def _log_likelihoods(model: Any, packs: Packs) -> torch.Tensor:
    """Return log p of each token that is learned, float32 [N], in the order of the packs."""
    device, parts = next(model.parameters()).device, []
    for place in range(len(packs)):
        batch = {name: each.to(device) if hasattr(each, "to") else each for name, each in packs[place].items()}
        scored, head = scored_states(model, batch)
        parts.append(log_likelihoods(scored, head, batch["targets"])[: batch["num_targets"]].cpu())
    return torch.cat(parts)
