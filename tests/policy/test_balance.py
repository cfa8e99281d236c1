from __future__ import annotations

from itertools import chain

import highspy
import numpy as np
import pytest

from moespac.config import BalanceConfig, CostConfig
from moespac.policy.balance import (
    SavedSeconds,
    accelerator_costs,
    choose_thresholds,
    host_costs,
    slots_needed,
)
from moespac.policy.cost import CostModel
from tests.policy.small import SHAPE

EXACT, GREEDY = BalanceConfig(), BalanceConfig(exact_cells=0)
U = 5


def _instance(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 7))
    levels = rng.integers(0, U + 1, (layers, int(rng.integers(2, 12)))).astype(np.int8)
    weights = slots_needed(levels, U)
    values = rng.uniform(0, 1, weights.shape)
    return values, weights, int(rng.integers(0, levels.size + 2))


def _total(values: np.ndarray, thresholds: np.ndarray) -> float:
    return float(np.take_along_axis(values, thresholds[:, None] - 1, axis=1).sum())


def _milp(values: np.ndarray, weights: np.ndarray, slots: int) -> float:
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    chosen = [[solver.addBinary(obj=float(value)) for value in row] for row in values]
    for row in chosen:
        solver.addConstr(sum(row) == 1)
    pairs = zip(weights.ravel(), chain.from_iterable(chosen), strict=True)
    solver.addConstr(sum(int(w) * x for w, x in pairs) <= slots)
    solver.minimize()
    return solver.getObjectiveValue()


@pytest.mark.parametrize("seed", range(25))
def test_thresholds_are_optimal(seed: int) -> None:
    values, weights, slots = _instance(seed)
    thresholds = choose_thresholds(values, weights, slots, EXACT)
    assert ((thresholds >= 1) & (thresholds <= U + 1)).all()
    assert _total(weights, thresholds) <= slots
    assert _total(values, thresholds) == pytest.approx(_milp(values, weights, slots))


@pytest.mark.parametrize("seed", range(25))
def test_the_greedy_way_is_feasible_and_off_by_less_than_one_layer(seed: int) -> None:
    values, weights, slots = _instance(seed)
    thresholds = choose_thresholds(values, weights, slots, GREEDY)
    assert _total(weights, thresholds) <= slots
    best = _total(values, choose_thresholds(values, weights, slots, EXACT))
    assert best - 1e-9 <= _total(values, thresholds) <= best + np.ptp(values, axis=1).max()


def test_slots_needed_by_hand() -> None:
    levels = np.array([[0, 1, 1, 5], [2, 2, 2, 2]], np.int8)
    np.testing.assert_array_equal(slots_needed(levels, U), [[3, 1, 1, 1, 1, 0], [4, 4, 0, 0, 0, 0]])


def test_without_slots_everything_stays_where_it_is() -> None:
    values, weights, _ = _instance(1)
    weights[:, :-1] = np.maximum(weights[:, :-1], 1)
    assert (choose_thresholds(values, weights, 0, EXACT) == U + 1).all()


def test_the_cost_of_a_threshold_depends_on_what_must_move() -> None:
    """All on the fast accelerator is best, unless it would have to be moved there over a slow link."""
    costs = CostModel(CostConfig(), SHAPE.record_bytes)
    levels = np.tile(np.array([0, 0, 1, 2, 3, 4, 5, 5], np.int8), (SHAPE.layers, 1))
    expected = np.full(SHAPE.total, 2.0)
    present, absent = np.ones(levels.shape, bool), np.zeros(levels.shape, bool)
    here = accelerator_costs(levels, expected, present, costs, U, EXACT)
    assert (np.diff(here, axis=1) >= 0).all()
    for _ in range(9):
        costs.observe_link(1.0)
    far = accelerator_costs(levels, expected, absent, costs, U, EXACT)
    assert (far.argmin(axis=1) == U).all()


def test_host_costs_by_hand() -> None:
    levels = np.array([[5, 0]], np.int8)
    costs = CostModel(
        CostConfig(host_bandwidth=1e9, host_token_share=0, storage_bandwidth=1 / 3), record_bytes=1
    )
    table = host_costs(levels, np.array([1e9, 1e9]), np.ones((1, 2), bool), costs, U, EXACT)
    computing = costs.host_expert(np.array([1e9]))[0] * 2
    np.testing.assert_allclose(table[0] - computing, [3, 3, 3, 3, 3, 6], rtol=1e-6, atol=1e-2)


def test_what_an_expert_saves_by_hand() -> None:
    costs = CostModel(CostConfig(), 1 << 20)
    for tokens in (1, 2, 4):
        costs.observe_host(tokens, 3.0)
        costs.observe_accelerator(tokens, 1.0)
    np.testing.assert_allclose(SavedSeconds(1, costs)(np.array([0, 0.5, 1])), [0, 1, 2])
    np.testing.assert_allclose(SavedSeconds(2, costs)(np.array([0, 0.5, 1])), [0, 1.5, 2], rtol=1e-6)
    costs.observe_accelerator(1, 9.0)
    costs.observe_accelerator(1, 9.0)
    assert not SavedSeconds(1, costs)(np.array([0.5])).any(), "a slower accelerator saves nothing"
