"""The order of the rows: every row once, the same for a seed and epoch, the longest first."""

import pytest
from sftkit.train.trainer import EpochOrder

LENGTHS = [(number * 37) % 101 + 1 for number in range(203)]


def test_every_row_comes_once_in_an_order_of_seed_and_epoch() -> None:
    order = EpochOrder(LENGTHS, 8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(203))
    assert list(EpochOrder(LENGTHS, 8, seed=3)) == first
    order.set_epoch(1)
    second = list(order)
    assert sorted(second) == list(range(203))
    assert second != first
    assert list(EpochOrder(LENGTHS, 8, seed=4)) != first
    order.set_epoch(0)
    assert list(order) == first


def test_updates_are_full_but_for_the_last_and_hold_rows_of_like_length() -> None:
    updates = EpochOrder(LENGTHS, 8, seed=0).updates()
    assert [len(update) for update in updates] == [8] * 25 + [3]
    assert list(EpochOrder(LENGTHS, 8, seed=0)) == [row for update in updates for row in update]
    padded = sum(len(update) * max(LENGTHS[row] for row in update) for update in updates)
    assert padded < 1.2 * sum(LENGTHS)
    assert max(LENGTHS[row] for row in updates[0]) == max(LENGTHS[row] for update in updates[:-1] for row in update)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_few_rows(rows: int) -> None:
    assert sorted(EpochOrder(LENGTHS[:rows], 8, seed=0)) == list(range(rows))
