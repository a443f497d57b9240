"""Causal attention within short rows put end to end, as Triton kernels whose tiles are cut from the pack and not from each row.

A kernel for variable lengths gives each row tiles of its own, as many as the longest row needs, so that rows of a hundred tokens leave
most of its work unused. Here a tile of queries covers as many rows as it happens to; its keys are the tokens from where its first row
begins to its own end, and a query sees the keys from where its own row begins to itself. The gradients of keys and values are summed
over the queries' heads in registers. Each number that comes out is written once, by one program: no zeros to fill in, no atomics, and
the same result every time. Softmax in one pass: Milakov and Gimelshein 2018, arXiv 1805.02867; the gradients from its saved sums: Dao
et al. 2022, arXiv 2205.14135.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

UNBOUNDED = tl.constexpr(2**31 - 1)  # the place of a row that no key belongs to
ROW_TOKENS = 256  # that a program writes the places of at once


class Tiles(NamedTuple):
    """How a kernel is cut: tokens of a tile of queries and of keys, warps of a program, stages that loads run ahead in."""

    queries: int
    keys: int
    warps: int
    stages: int


# For heads of at most so many numbers: attention, the gradient of queries, the gradients of keys and values.
TILES: dict[int, tuple[Tiles, Tiles, Tiles]] = {
    64: (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
    128: (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}


def tiles_for(size: int) -> tuple[Tiles, Tiles, Tiles]:
    """Return how the three kernels are cut for heads of `size` numbers."""
    return next(tiles for largest, tiles in TILES.items() if size <= largest)


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether the kernels take these: heads of 16, 32, 64, 128 or 256 numbers, alike, in a 16-bit format."""
    size = query.shape[-1]
    alike = size == key.shape[-1] == value.shape[-1] and query.shape[0] == 1 and query.shape[1] % key.shape[1] == 0
    return alike and size in (16, 32, 64, 128, 256) and value.dtype in (torch.bfloat16, torch.float16)


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """Attend causally within rows. query [1, heads, T, d], key and value [1, kv heads, T, d] → [1, T, heads, d], contiguous.

    `bounds` is where rows begin, and the end: int32, from 0 to T, never falling. A query sees at most `window` keys, itself among
    them; 0 stands for all. Nothing is copied as long as the last dimension is contiguous, and gradients come in the inputs' layout.
    """
    return _attend(query, key, value, bounds, scale, window)[0]


@triton.jit
def _write_places(bounds, starts, ends, TOKENS: tl.constexpr):
    """Write where each token's row begins and ends: one program a row."""
    row = tl.program_id(0)
    start = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    for first in range(start, end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        tl.store(starts + at, start, mask=at < end)
        tl.store(ends + at, end, mask=at < end)


@triton.jit
def _grid(TOKENS: tl.constexpr, SIZE: tl.constexpr, stride):
    """Return where the numbers of a tile stand, from its first."""
    return tl.arange(0, TOKENS)[:, None] * stride + tl.arange(0, SIZE)[None, :]


@triton.jit
def _attend_tile(
    query, key, value, out, sums, starts, query_head, query_token, key_head, key_token, value_head, value_token, total, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute one head's output of a tile of queries; heads that share keys run side by side. `scale` is for powers of two."""
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    first = tile * QUERIES
    at = first + tl.arange(0, QUERIES)
    inside = at < total
    query += head.to(tl.int64) * query_head + first.to(tl.int64) * query_token
    q = tl.load(query + _grid(QUERIES, SIZE, query_token), mask=inside[:, None], other=0.0)
    start = tl.load(starts + at, mask=inside, other=UNBOUNDED)
    low = tl.load(starts + first)
    if WINDOWED:
        low = tl.maximum(low, first - window + 1)
    high = tl.minimum(first + QUERIES, total)
    key += (head // GROUP).to(tl.int64) * key_head + low.to(tl.int64) * key_token
    value += (head // GROUP).to(tl.int64) * value_head + low.to(tl.int64) * value_token
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    norm = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, SIZE], tl.float32)
    for begin in range(low, high, KEYS):
        key_at = begin + tl.arange(0, KEYS)
        present = (key_at < high)[:, None]
        k = tl.load(key + _grid(KEYS, SIZE, key_token), mask=present, other=0.0)
        v = tl.load(value + _grid(KEYS, SIZE, value_token), mask=present, other=0.0)
        seen = (key_at[None, :] <= at[:, None]) & (key_at[None, :] >= start[:, None])
        if WINDOWED:
            seen = seen & (at[:, None] - key_at[None, :] < window)
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
        shares = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(most - base)
        norm = norm * shrunk + tl.sum(shares, 1)
        mixed = tl.dot(shares.to(v.dtype), v, mixed * shrunk[:, None])
        most = higher
        key += KEYS * key_token
        value += KEYS * value_token
    norm = tl.where(inside, norm, 1.0)
    mixed = mixed / norm[:, None]
    out += (first.to(tl.int64) * HEADS + head) * SIZE
    tl.store(out + _grid(QUERIES, SIZE, HEADS * SIZE), mixed.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(sums + head.to(tl.int64) * total + at, most + tl.log2(norm), mask=inside)


@triton.jit
def _query_gradient_tile(
    query, key, value, out, grad, sums, products, starts, query_grad,
    query_head, query_token, key_head, key_token, value_head, value_token, grad_head, grad_token, made_head, made_token,
    total, window, scale, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute one head's gradient of a tile of queries, and the products of output and gradient, which the keys' gradient needs too."""
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    first = tile * QUERIES
    at = first + tl.arange(0, QUERIES)
    inside = at < total
    far = head.to(tl.int64)
    query += far * query_head + first.to(tl.int64) * query_token
    grad += far * grad_head + first.to(tl.int64) * grad_token
    out += (first.to(tl.int64) * HEADS + head) * SIZE
    query_grad += far * made_head + first.to(tl.int64) * made_token
    q = tl.load(query + _grid(QUERIES, SIZE, query_token), mask=inside[:, None], other=0.0)
    g = tl.load(grad + _grid(QUERIES, SIZE, grad_token), mask=inside[:, None], other=0.0)
    o = tl.load(out + _grid(QUERIES, SIZE, HEADS * SIZE), mask=inside[:, None], other=0.0)
    product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(products + far * total + at, product, mask=inside)
    start = tl.load(starts + at, mask=inside, other=UNBOUNDED)
    whole = tl.load(sums + far * total + at, mask=inside, other=0.0)
    low = tl.load(starts + first)
    if WINDOWED:
        low = tl.maximum(low, first - window + 1)
    high = tl.minimum(first + QUERIES, total)
    key += (head // GROUP).to(tl.int64) * key_head + low.to(tl.int64) * key_token
    value += (head // GROUP).to(tl.int64) * value_head + low.to(tl.int64) * value_token
    made = tl.zeros([QUERIES, SIZE], tl.float32)
    for begin in range(low, high, KEYS):
        key_at = begin + tl.arange(0, KEYS)
        present = (key_at < high)[:, None]
        k = tl.load(key + _grid(KEYS, SIZE, key_token), mask=present, other=0.0)
        v = tl.load(value + _grid(KEYS, SIZE, value_token), mask=present, other=0.0)
        seen = (key_at[None, :] <= at[:, None]) & (key_at[None, :] >= start[:, None])
        if WINDOWED:
            seen = seen & (at[:, None] - key_at[None, :] < window)
        scores = tl.dot(q, tl.trans(k)) * scale
        shares = tl.exp2(tl.where(seen, scores - whole[:, None], float("-inf")))
        bent = shares * (tl.dot(g, tl.trans(v)) - product[:, None])
        made = tl.dot(bent.to(k.dtype), k, made)
        key += KEYS * key_token
        value += KEYS * value_token
    tl.store(query_grad + _grid(QUERIES, SIZE, made_token), (made * factor).to(query_grad.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _key_gradient_tile(
    query, key, value, grad, sums, products, starts, ends, key_grad, value_grad,
    query_head, query_token, key_head, key_token, value_head, value_token, grad_head, grad_token,
    key_made_head, key_made_token, value_made_head, value_made_token, total, window, scale, factor,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WINDOWED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one head of a tile of keys and values, summed over the queries' heads that share it."""
    tile = tl.program_id(0) // KEY_HEADS
    shared = tl.program_id(0) % KEY_HEADS
    first = tile * KEYS
    at = first + tl.arange(0, KEYS)
    inside = (at < total)[:, None]
    far = shared.to(tl.int64)
    key += far * key_head + first.to(tl.int64) * key_token
    value += far * value_head + first.to(tl.int64) * value_token
    k = tl.load(key + _grid(KEYS, SIZE, key_token), mask=inside, other=0.0)
    v = tl.load(value + _grid(KEYS, SIZE, value_token), mask=inside, other=0.0)
    last = tl.minimum(first + KEYS, total) - 1
    high = tl.load(ends + last)
    if WINDOWED:
        high = tl.minimum(high, last + window)
    steps = tl.cdiv(high - first, QUERIES)
    made_key = tl.zeros([KEYS, SIZE], tl.float32)
    made_value = tl.zeros([KEYS, SIZE], tl.float32)
    for step in range(0, GROUP * steps):  # one loop over heads and tiles, so that loads run ahead from head to head
        head = (shared * GROUP + step // steps).to(tl.int64)
        begin = first + (step % steps) * QUERIES
        query_at = begin + tl.arange(0, QUERIES)
        present = query_at < high
        q_at = query + head * query_head + begin.to(tl.int64) * query_token
        g_at = grad + head * grad_head + begin.to(tl.int64) * grad_token
        q = tl.load(q_at + _grid(QUERIES, SIZE, query_token), mask=present[:, None], other=0.0)
        g = tl.load(g_at + _grid(QUERIES, SIZE, grad_token), mask=present[:, None], other=0.0)
        start = tl.load(starts + query_at, mask=present, other=UNBOUNDED)
        whole = tl.load(sums + head * total + query_at, mask=present, other=0.0)
        product = tl.load(products + head * total + query_at, mask=present, other=0.0)
        seen = (at[:, None] <= query_at[None, :]) & (at[:, None] >= start[None, :])
        if WINDOWED:
            seen = seen & (query_at[None, :] - at[:, None] < window)
        scores = tl.dot(k, tl.trans(q)) * scale
        shares = tl.exp2(tl.where(seen, scores - whole[None, :], float("-inf")))
        made_value = tl.dot(shares.to(g.dtype), g, made_value)
        bent = shares * (tl.dot(v, tl.trans(g)) - product[None, :])
        made_key = tl.dot(bent.to(q.dtype), q, made_key)
    key_grad += far * key_made_head + first.to(tl.int64) * key_made_token
    value_grad += far * value_made_head + first.to(tl.int64) * value_made_token
    tl.store(key_grad + _grid(KEYS, SIZE, key_made_token), (made_key * factor).to(key_grad.dtype.element_ty), mask=inside)
    tl.store(value_grad + _grid(KEYS, SIZE, value_made_token), made_value.to(value_grad.dtype.element_ty), mask=inside)


def _on(tensor: torch.Tensor) -> Any:
    """Return the context in which Triton starts kernels on a tensor's card."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


# Exact strides: what inductor makes for these operations it lays out as eager code would, and copies nothing.
@torch.library.custom_op("sftkit::attend_rows", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output, log2 of the summed exponentials [heads, T] float32, and where each token's row begins and ends [2, T] int32."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    _, heads, total, size = query.shape
    out, sums, places = _made(query)
    tiles = tiles_for(size)[0]
    with _on(query):
        _write_places[(len(bounds) - 1,)](bounds, places[0], places[1], ROW_TOKENS)
        _attend_tile[(triton.cdiv(total, tiles.queries) * heads,)](
            query, key, value, out, sums, places[0], *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3],
            total, window, scale * math.log2(math.e), heads, heads // key.shape[1], size, window > 0, tiles.queries, tiles.keys,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, sums, places


def _made(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, heads, total, size = query.shape
    return (
        query.new_empty(1, total, heads, size),
        query.new_empty(heads, total, dtype=torch.float32),
        query.new_empty(2, total, dtype=torch.int32),
    )


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, window: int) -> Any:
    return _made(query)


@torch.library.custom_op("sftkit::attend_rows_backward", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _attend_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    places: torch.Tensor, scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, in their layout."""
    made = _like(query), _like(key), _like(value)
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    _, heads, total, size = query.shape
    groups = key.shape[1]
    products = torch.empty_like(sums)
    _, by_query, by_key = tiles_for(size)
    strides = (*query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3], grad.stride(2), grad.stride(1))
    told = (total, window, scale * math.log2(math.e), scale)
    with _on(query):
        _query_gradient_tile[(triton.cdiv(total, by_query.queries) * heads,)](
            query, key, value, out, grad, sums, products, places[0], made[0], *strides, *made[0].stride()[1:3], *told,
            heads, heads // groups, size, window > 0, by_query.queries, by_query.keys, num_warps=by_query.warps, num_stages=by_query.stages,
        )  # fmt: skip
        _key_gradient_tile[(triton.cdiv(total, by_key.keys) * groups,)](
            query, key, value, grad, sums, products, places[0], places[1], made[1], made[2], *strides,
            *made[1].stride()[1:3], *made[2].stride()[1:3], *told,
            groups, heads // groups, size, window > 0, by_key.queries, by_key.keys, num_warps=by_key.warps, num_stages=by_key.stages,
        )  # fmt: skip
    return made


@_attend_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    places: torch.Tensor, scale: float, window: int,
) -> Any:  # fmt: skip
    return _like(query), _like(key), _like(value)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, _, ctx.scale, ctx.window = inputs
    out, sums, places = output
    ctx.save_for_backward(query, key, value, out, sums, places)
    ctx.mark_non_differentiable(sums, places)
    ctx.set_materialize_grads(False)


def _go_back(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None


_attend.register_autograd(_go_back, setup_context=_keep)
