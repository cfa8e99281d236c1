from __future__ import annotations

import numpy as np
import pytest

from moespac.config import UtilityConfig
from moespac.policy.utility import Calibration, ReferenceLevels, UtilityEstimator, step
from moespac.types import ModelShape
from tests.policy.small import SHAPE


def test_inertia_by_hand() -> None:
    levels = np.array([[0, 0, 2, 3, 3]], np.int8)
    target = np.array([[5, 1, 2, 2, 0]])
    np.testing.assert_array_equal(step(levels, target, up=1, down=1), [[1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(step(levels, target, up=5, down=2), [[1, 0, 2, 3, 2]])


def test_the_reference_machine_rises_on_five_and_falls_on_one() -> None:
    machine = ReferenceLevels(ModelShape(1, 3, 1, 1))
    for counts in ([5, 4, 0], [5, 6, 0], [5, 6, 0], [0, 7, 9]):
        machine.observe(np.array([counts]))
    # 5 rises, 5 - 1 does not, 0 falls; 4 does not, 6, 6 - 1 and 7 - 2 rise; 9 rises by one
    np.testing.assert_array_equal(machine.levels, [[0, 3, 1]])


def test_the_reference_machine_stops_at_its_highest_level() -> None:
    machine = ReferenceLevels(ModelShape(1, 1, 1, 1))
    for _ in range(9):
        machine.observe(np.array([[99]]))
    assert machine.levels == 5


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("held", [0.2, 0.5])
def test_the_middle_boundary_lets_through_what_memory_holds(held: float, scale: float) -> None:
    shape = ModelShape(4, 200, 8, 1)
    calibration = Calibration(shape, held, UtilityConfig())
    rng = np.random.default_rng(3)
    for _ in range(40):
        levels = calibration.levels((scale * rng.beta(0.5, 3, shape.total)).astype(np.float32))
    share = (levels >= 3).mean(axis=1)
    np.testing.assert_allclose(share, held, atol=0.08)
    assert levels.min() == 0 and levels.max() == 5


def test_boundaries_follow_when_demand_shifts() -> None:
    shape = ModelShape(1, 200, 8, 1)
    calibration = Calibration(shape, 0.25, UtilityConfig(histogram_windows=4))
    demand = np.random.default_rng(3).beta(0.5, 3, shape.total).astype(np.float32)
    for _ in range(10):
        before = calibration.levels(demand)
    assert calibration.levels(demand / 8).max() < 4  # at first, demand just fell
    for _ in range(30):
        after = calibration.levels(demand / 8)
    np.testing.assert_array_equal(before, after)  # then the levels mean what they meant


def test_levels_move_one_step_a_window_but_known_demand_does_not_wait() -> None:
    estimator = UtilityEstimator(SHAPE, 0.25, UtilityConfig())
    demand = np.full(SHAPE.total, 0.01, np.float32)
    demand[::8] = 0.9
    for expected in (1, 2, 3):
        estimator.observe(demand)
        assert (estimator.levels[:, 0] == expected).all()
        assert (estimator.highest[:, 0] >= 3).all()


def test_of_equal_demand_the_steadier_expert_is_worth_more() -> None:
    estimator = UtilityEstimator(SHAPE, 0.25, UtilityConfig())
    demand = np.full(SHAPE.total, 0.01, np.float32)
    demand[3] = 0.9
    for _ in range(5):
        estimator.observe(demand)
    even = np.full(SHAPE.total, 0.5, np.float32)
    assert estimator.order(even).argmax() == 3
    even[7] = 0.6
    assert estimator.order(even).argmax() == 7  # demand wins
