from __future__ import annotations

import numpy as np
import pytest

from moespac.policy.copies import worth_copying
from moespac.types import Capacity
from tests.policy.small import SHAPE, resident

WORTH = np.zeros(SHAPE.total)
WORTH[:6] = [6, 5, 4, 3, 2, 1]


def test_free_slots_take_the_best_whatever_they_save() -> None:
    now = resident(Capacity(SHAPE.total, 3), host=range(SHAPE.total), accelerator=[1])
    np.testing.assert_array_equal(worth_copying(WORTH, now, price=100.0), [0, 2])


@pytest.mark.parametrize(
    ("price", "copied"), [(0.0, [0, 1]), (2.9, [0, 1]), (3.0, [0]), (4.5, [0]), (5.0, [])]
)
def test_a_swap_must_save_its_price(price: float, copied: list[int]) -> None:
    """Expert 0 would replace 5 (6 - 1 seconds), 1 would replace 4 (5 - 2), 2 would replace itself."""
    now = resident(Capacity(SHAPE.total, 3), host=range(SHAPE.total), accelerator=[2, 4, 5])
    np.testing.assert_array_equal(worth_copying(WORTH, now, price), copied)


def test_only_what_host_memory_has_is_copied_and_nothing_twice() -> None:
    now = resident(Capacity(SHAPE.total, 6), host=[0, 1, 3], accelerator=[1], arriving=[0])
    np.testing.assert_array_equal(worth_copying(WORTH, now, price=0.0), [3])


def test_without_slots_there_is_nothing_to_copy() -> None:
    now = resident(Capacity(SHAPE.total, 0), host=range(SHAPE.total))
    assert not len(worth_copying(WORTH, now, price=0.0))
