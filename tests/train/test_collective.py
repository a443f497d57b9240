"""What processes add up, without processes: the second one's gradients are those of the first, doubled."""

import pytest
import torch
from sftkit.train import collective


def test_gradients_are_averaged_in_pieces_and_one_that_another_process_has_alone_is_a_zero_here(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> None:
        sent.append(tensor.clone())
        tensor.mul_(3)

    monkeypatch.setattr(torch.distributed, "all_reduce", add)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(collective, "over_processes", lambda *have: (2.0, 2.0, 1.0, 2.0, 2.0, 0.0))
    monkeypatch.setattr(collective, "SENT", 10)
    shapes = [(2, 3), (3,), (1,), (4, 5), (2, 2), (7,)]
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16 if shape == (2, 2) else torch.float32)) for shape in shapes]
    grads = [torch.arange(1.0, 1 + each.numel()).view(each.shape).to(each.dtype) for each in weights]
    for place in (0, 1, 3, 4):
        weights[place].grad = grads[place].clone()
    weights[3].grad = grads[3].t().contiguous().t()  # not in the order of its memory
    collective.average_gradients(weights)
    assert [each.numel() for each in sent] == [10, 20, 4]  # by format, as many as go at once, larger ones alone
    for place in (0, 1, 3, 4):
        assert torch.equal(weights[place].grad, 1.5 * grads[place]), place
    assert torch.equal(weights[2].grad, torch.zeros(1))
    assert weights[5].grad is None  # no process learned it: the optimizer leaves it alone


@pytest.mark.parametrize("most", [1.0, 1e9, float("inf")])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(most: float) -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((300, 400), (7,), (5,), (0,))]
    for each in (weights[0], weights[1], weights[3]):
        each.grad = torch.randn(each.shape, generator=random)
    weights[0].grad = weights[0].grad.t().contiguous().t()
    before = [each.grad.clone() for each in weights if each.grad is not None]
    exact = float(torch.cat([each.flatten() for each in before]).double().norm())
    found = collective.clip_gradients(weights, most)
    assert float(found) == torch.tensor(exact).float()
    assert found.dtype == torch.float32
    for grad, own in zip((each.grad for each in weights if each.grad is not None), before, strict=True):
        torch.testing.assert_close(grad, own * min(1.0, most / exact))


def test_without_a_gradient_there_is_nothing_to_clip() -> None:
    assert float(collective.clip_gradients([torch.nn.Parameter(torch.zeros(3))], 1.0)) == 0
