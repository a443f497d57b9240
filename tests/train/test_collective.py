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
