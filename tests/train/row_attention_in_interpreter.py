"""Attention by tiles of the pack in Triton's interpreter, on a CPU: forward and back it is what plain attention gives each row alone.

The interpreter has to be asked for before Triton is imported: `test_row_attention.py` runs this file in a process that does.
"""

import logging
from itertools import accumulate, pairwise

import pytest
import torch
from sftkit.train import attention, row_attention
from sftkit.train.attention import _one_row, packed_attention
from sftkit.train.row_attention import Tiles, attend_rows
from triton.runtime import interpreter

patch_tensor = interpreter._patch_lang_tensor


def scalars_are_places(tensor, scope) -> None:
    """Let numbers bound a loop: Triton 3.6 makes an int of an array with one element, which NumPy 2.4 refuses."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = scalars_are_places

SMALL = ((16, 16, 4, 1),) * 3
UNEVEN = ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1))


def made(heads: int, groups: int, size: int, lengths: list[int], dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    """Return query, key and value [1, heads, T, size]: as one projection's parts, as three, or with heads apart."""
    total = sum(lengths)
    torch.manual_seed(heads * 1000 + groups * 100 + size + total)
    if layout == "one projection":
        parts = torch.randn(1, total, heads + 2 * groups, size).to(dtype).split([heads, groups, groups], dim=2)
        found = [each.transpose(1, 2) for each in parts]
    elif layout == "tokens first":
        found = [torch.randn(1, total, each, size).to(dtype).transpose(1, 2) for each in (heads, groups, groups)]
    elif layout == "numbers apart":
        found = [torch.randn(1, each, size, total).to(dtype).transpose(2, 3) for each in (heads, groups, groups)]
    else:
        found = [torch.randn(1, each, total, size).to(dtype) for each in (heads, groups, groups)]
    return [each.detach().requires_grad_() for each in found]


def off(lengths: list[int], inputs: list[torch.Tensor], empty: int, scale: float, window: int | None, same: bool = False) -> list[float]:
    """Return how far output and gradients are from plain attention over each row, in shares of their length, or of one."""
    places = [*accumulate(lengths, initial=0), *[sum(lengths)] * empty]
    out = attend_rows(*inputs, torch.tensor(places, dtype=torch.int32), scale, window or 0)
    assert out.shape == inputs[0].transpose(1, 2).shape
    assert out.is_contiguous()
    grad = torch.randn(1, 1, 1, 1, dtype=out.dtype).expand(out.shape) if same else torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    plain = [each.detach().float().requires_grad_() for each in inputs]
    rows = [_one_row(*(each[:, :, a:b] for each in plain), scale, window, None) for a, b in pairwise(places) if b > a]
    wanted = torch.cat(rows, dim=2).transpose(1, 2)
    expected = [wanted, *torch.autograd.grad(wanted, plain, grad.float())]
    pairs = zip(found, expected, strict=True)
    return [float((one.float() - other).norm().detach() / max(other.norm().detach(), 1.0)) for one, other in pairs]


@pytest.mark.parametrize(
    ("heads", "groups", "size", "lengths", "empty", "window", "layout", "tiles"),
    [
        (2, 2, 16, [1, 1, 1], 0, None, "tokens first", SMALL),
        (3, 1, 16, [1, 5, 20, 2, 40, 3], 0, None, "one projection", SMALL),  # tiles over many rows, rows over several tiles
        (3, 1, 16, [1, 5, 20, 2, 40, 3], 0, None, "one projection", UNEVEN),
        (2, 1, 16, [16, 16, 32], 4, None, "tokens first", SMALL),  # rows that end where tiles do
        (7, 1, 16, [18, 1, 14], 2, None, "heads first", UNEVEN),
        (2, 1, 32, [5, 50, 33], 0, 20, "one projection", SMALL),
        (2, 1, 32, [5, 50, 33], 0, 20, "one projection", UNEVEN),
        (4, 1, 16, [3, 37], 1, 1, "tokens first", SMALL),  # a window of a query's own key
        (1, 1, 16, [70], 0, 40, "heads first", UNEVEN),
        (2, 1, 64, [10, 90, 1], 0, None, "numbers apart", None),  # which is copied
        (3, 3, 128, [20, 79], 1, 70, "one projection", None),
        (1, 1, 256, [20, 29], 1, None, "tokens first", None),
    ],
)
def test_each_row_is_attended_to_alone(heads, groups, size, lengths, empty, window, layout, tiles, monkeypatch) -> None:
    if tiles:
        monkeypatch.setattr(row_attention, "TILES", {256: tuple(Tiles(*each) for each in tiles)})
    inputs = made(heads, groups, size, lengths, torch.float32, layout)
    assert max(off(lengths, inputs, empty, size**-0.5, window)) < 1e-5


def test_sixteen_bits_round_and_no_more() -> None:
    lengths = [1, 30, 64, 9]
    inputs = made(4, 2, 32, lengths, torch.float16, "one projection")
    assert max(off(lengths, inputs, 1, 32**-0.5, None)) < 2e-3


def test_scores_of_any_size_are_scaled() -> None:
    lengths = [40, 7]
    for scale in (2.0, 0.01):
        assert max(off(lengths, made(2, 1, 16, lengths, torch.float32, "tokens first"), 0, scale, None)) < 1e-5


def test_a_gradient_that_is_one_number_everywhere_is_taken() -> None:
    lengths = [40, 7]
    assert max(off(lengths, made(2, 1, 16, lengths, torch.float32, "tokens first"), 0, 0.25, None, same=True)) < 1e-5


def test_gradients_have_the_layout_of_what_they_belong_to() -> None:
    for layout in ("tokens first", "heads first"):
        inputs = made(4, 2, 16, [20, 12], torch.float16, layout)
        out = attend_rows(*inputs, torch.tensor([0, 20, 32], dtype=torch.int32), 0.25)
        for grad, each in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
            assert grad.stride() == each.stride()


def test_compiled_code_takes_it_whole_and_copies_nothing() -> None:
    """What inductor makes of it: the two operations, and no copy of query, key, value or their gradients for another layout."""
    bounds = torch.tensor([0, 20, 32], dtype=torch.int32)
    graphs = []

    def look(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def layer(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parts = torch.nn.functional.linear(hidden, weight).view(1, 32, 8, 16).split([4, 2, 2], dim=2)
        query, key, value = (each.transpose(1, 2) for each in parts)
        return attend_rows(query * 2, key, value, bounds, 0.25).reshape(1, 32, 64)

    hidden, weight = torch.randn(1, 32, 48), torch.randn(128, 48)
    results = []
    for form in (layer, torch.compile(layer, fullgraph=True, dynamic=False, backend=_aot(look))):
        one, other = (each.clone().requires_grad_() for each in (hidden, weight))
        out = form(one, other)
        results.append([out, *torch.autograd.grad(out.square().sum(), [one, other])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
    forward, backward = graphs
    assert sum("sftkit.attend_rows." in each for each in forward) == 1
    assert sum("sftkit.attend_rows_backward" in each for each in backward) == 1
    assert not [each for each in forward if "clone" in each]


def _aot(look):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)


def test_pytorch_finds_nothing_wrong_with_the_operation() -> None:
    inputs = made(4, 2, 16, [20, 12], torch.float32, "one projection")
    bounds = torch.tensor([0, 20, 32], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(row_attention._attend, (*inputs, bounds, 0.25, 8), test_utils=checks)


@pytest.mark.parametrize("window", [None, 9])
def test_short_rows_are_given_to_it_and_long_ones_to_pytorch(monkeypatch, window) -> None:
    lengths = [30, 2, 16]
    inputs = made(4, 2, 16, lengths, torch.float16, "one projection")
    bounds = torch.tensor([0, 30, 32, 48], dtype=torch.int32)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen", lambda query, *_: torch.zeros_like(query))
    attention._answers.clear()
    found, _ = packed_attention(None, *inputs, cu_seq_lens_q=bounds, max_length_q=30, sliding_window=window, scaling=0.3)
    rows = [_one_row(*(each[:, :, a:b].float() for each in inputs), 0.3, window, None) for a, b in pairwise(bounds.tolist())]
    torch.testing.assert_close(found.float(), torch.cat(rows, dim=2).transpose(1, 2), rtol=1e-2, atol=2e-3)
    assert list(attention._answers.values()) == [True]
    for length, short in ((2048, True), (2049, False)):
        for told in ({"max_length_q": length}, {"max_length_q": 30 if length > 2048 else 9999, "typical": length}):
            other, _ = packed_attention(None, *inputs, cu_seq_lens_q=bounds, sliding_window=window, **told)
            assert bool(other.any()) is short


@pytest.mark.parametrize("fault", ["wrong", "not a number", "raises"])
def test_kernels_that_are_wrong_on_a_card_are_not_trained_with(monkeypatch, caplog, fault) -> None:
    inputs = made(2, 1, 16, [30, 2], torch.float16, "tokens first")
    bounds = torch.tensor([0, 30, 32], dtype=torch.int32)
    sound = row_attention.attend_rows

    def faulty(*arguments):
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        return sound(*arguments) * (1.05 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(row_attention, "attend_rows", faulty)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen", lambda query, *_: torch.zeros_like(query))
    attention._answers.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, _ = packed_attention(None, *inputs, cu_seq_lens_q=bounds, max_length_q=30)
            assert not found.any()
    attention._answers.clear()
    assert len(caplog.messages) == 1
    assert {"wrong": "5.0%", "not a number": "nan%", "raises": "shared memory"}[fault] in caplog.messages[0]
