"""AdamW on bfloat16: what PyTorch's does in float32, and on average the same where that is rounded."""

import copy
from pathlib import Path

import pytest
import torch
from sftkit.train import rounding
from sftkit.train.memory import Live
from sftkit.train.rounding import RoundedAdamW, rounded
from sftkit.train.trainer import Trainer
from transformers import TrainingArguments


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_value_is_rounded_to_its_neighbours_so_that_their_mean_is_it() -> None:
    step = 2.0**-7  # between 1 and the next bfloat16
    for value in (1 + step / 4, -(1 + 3 * step / 4), 1 + step / 1000, 3e-39):
        drawn = rounded(torch.full((400_000,), value), generator()).double()
        exact = torch.tensor(value).double()  # as float32 has it
        below, above = drawn.unique().tolist()
        assert below < exact < above
        spread = (above - below) / 2 / 400_000**0.5
        assert float(drawn.mean()) == pytest.approx(float(exact), abs=5 * spread)


def test_what_is_a_bfloat16_and_what_is_not_finite_stays() -> None:
    weird = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # not-a-numbers with all bits set, as GPUs make them
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 2.0**-133])
    torch.testing.assert_close(rounded(values, generator()), values.to(torch.bfloat16), equal_nan=True, rtol=0, atol=0)
    assert rounded(weird, generator()).isnan().all()


@pytest.mark.parametrize("piece", [1 << 22, 25, 7])
def test_float32_weights_are_updated_as_by_pytorch(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PIECE", piece)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator())) for shape in ((3, 5), (4,), (), (5, 4, 3), (2,))]
    ours[3].data = ours[3].data.transpose(0, 2)
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [
        kind([{"params": some[:1], "weight_decay": 0.1}, {"params": some[1:], "weight_decay": 0.0}], **settings)
        for kind, some in ((RoundedAdamW, ours), (torch.optim.AdamW, theirs))
    ]
    random = generator()
    for _ in range(5):
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):  # the last one has no gradient
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        for each in optimizers:
            each.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_small_steps_and_the_decay_of_the_second_moment_arrive() -> None:
    lost, kept = (torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16)) for _ in range(2))
    exact = torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.AdamW([lost], lr=2e-5, weight_decay=0.0), RoundedAdamW([kept], lr=2e-5)]
    optimizers.append(torch.optim.AdamW([exact], lr=2e-5, weight_decay=0.0))
    for update in range(100):
        for weight in (lost, kept, exact):
            weight.grad = torch.full_like(weight, 1.0 if update < 50 else 0.1)
        for each in optimizers:
            each.step()
    assert lost.eq(1).all()
    assert float(kept.double().mean()) == pytest.approx(float(exact), abs=2e-5)
    squares = [
        float(each.state[weight]["exp_avg_sq"].double().mean()) for each, weight in zip(optimizers, (lost, kept, exact), strict=True)
    ]
    assert squares[1] == pytest.approx(squares[2], rel=0.01)
    assert squares[0] > 1.02 * squares[2]


def test_a_state_is_gone_on_from_and_pytorchs_too() -> None:
    def learn(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, updates: range) -> None:
        for update in updates:
            weight.grad = torch.full_like(weight, 0.5 + update)
            optimizer.step()

    begun = torch.linspace(0.5, 2, 1000).to(torch.bfloat16)
    whole = torch.nn.Parameter(begun.clone())
    learn(RoundedAdamW([whole]), whole, range(6))
    first = torch.nn.Parameter(begun.clone())
    before = RoundedAdamW([first])
    learn(before, first, range(3))
    second = torch.nn.Parameter(first.detach().clone())
    after = RoundedAdamW([second])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    learn(after, second, range(3, 6))
    assert torch.equal(second, whole)

    former = torch.optim.AdamW([first], fused=True)  # as runs were begun with
    learn(former, first, range(3))
    third = RoundedAdamW([second])
    third.load_state_dict(former.state_dict())
    learn(third, second, range(3, 4))
    assert third.state[second]["step"] == 4


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ({"base": (torch.bfloat16, True)}, RoundedAdamW),
        ({"base": (torch.float32, True)}, torch.optim.AdamW),
        ({"base": (torch.bfloat16, False), "adapter": (torch.float32, True)}, torch.optim.AdamW),
        ({"base": (torch.uint8, False), "adapter": (torch.bfloat16, True)}, RoundedAdamW),  # TRL's adapter on four bits
    ],
)
def test_weights_that_are_trained_in_bfloat16_are_rounded(weights: dict, kind: type, tmp_path: Path) -> None:
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(2).to(dtype), train) for name, (dtype, train) in weights.items()})
    found, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-5), model)
    assert (found, settings["lr"], settings["betas"]) == (kind, 3e-5, (0.9, 0.999))
    assert Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), use_cpu=True))[0] is torch.optim.AdamW


def test_an_updates_memory_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PIECE", 1 << 14)
    for shapes in ([(1 << 16,)], [(64, 32)] * 40, [(1 << 16,), *[(64, 32)] * 40]):
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        for each in weights:
            each.grad = torch.ones_like(each)
        optimizer = RoundedAdamW(weights)
        optimizer.step()
        moments = [optimizer.state[each][name] for each in weights for name in ("exp_avg", "exp_avg_sq")]
        live = Live()
        live.ignore([*weights, *(each.grad for each in weights), *moments])
        with live:
            optimizer.step()
        assert live.peak <= rounding.BESIDE * rounding.PIECE + 64 * 512
