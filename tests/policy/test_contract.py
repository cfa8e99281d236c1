"""What every registered policy owes the engine, on random machines and windows."""

from __future__ import annotations

import numpy as np
import pytest

from moespac.config import PolicyConfig
from moespac.errors import ConfigError
from moespac.policy.registry import POLICIES, make_policy
from moespac.types import Capacity, Observation, Placement, Residency, Window
from tests.policy.small import SHAPE, residency, routing

MACHINES = [
    Capacity(5),
    Capacity(SHAPE.total),
    Capacity(12, 5),
    Capacity(SHAPE.total, SHAPE.total),
    Capacity(4, 1),
]
PASSES = [
    (1, 0),
    (5, 4),
    (300, 0),
    (2, 1),
    (1, 0),
    (5, 4),
    (9, 8),
]  # tokens, drafted; a prefill in the middle


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("capacity", MACHINES, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_the_contract(name: str, capacity: Capacity, planned: bool) -> None:
    rng = np.random.default_rng(7)
    policy = make_policy(name, SHAPE, capacity, PolicyConfig())
    for size, drafted in PASSES:
        window = Window(rng.integers(0, 50, size), drafted)
        now = residency(capacity, rng)
        if planned:
            _check_plan(policy.plan(window, now), now)
        routed = routing(size, rng)
        for layer in range(SHAPE.layers):
            counts = np.bincount(routed[layer].ravel(), minlength=SHAPE.experts)
            now = residency(capacity, rng)
            placement = policy.place(layer, counts, now)
            _check_placement(placement, layer, counts, now)
            for tier in ("host", "accelerator"):
                _check_values(policy.retention(tier, layer))
        policy.observe(Observation(window, routed, accepted=int(rng.integers(0, drafted + 1))))
        _check_values(policy.retention("host", -1))


def _check_plan(plan, now: Residency) -> None:
    for ids in (plan.host, plan.accelerator):
        assert len(set(ids.tolist())) == len(ids)
    assert not (now.host | now.arriving_host).ravel()[plan.host].any()
    assert not (now.accelerator | now.arriving_accelerator).ravel()[plan.accelerator].any()
    assert now.host.ravel()[plan.accelerator].all(), "only what the host has can be copied"
    assert len(plan.host) <= now.capacity.host
    assert len(plan.accelerator) <= now.capacity.accelerator


def _check_placement(placement: Placement, layer: int, counts: np.ndarray, now: Residency) -> None:
    placed = np.concatenate([placement.host, placement.accelerator])
    assert sorted(placed) == (layer * SHAPE.experts + np.flatnonzero(counts)).tolist()
    if not now.capacity.accelerator:
        assert not len(placement.accelerator)
    assert not now.accelerator.ravel()[placement.prefetch.accelerator].any()


def _check_values(values: np.ndarray) -> None:
    assert values.shape == (SHAPE.total,)
    assert np.isfinite(values).all()


def test_an_unknown_policy_is_a_config_error_that_names_the_known() -> None:
    with pytest.raises(ConfigError, match="lru, moe-spac"):
        make_policy("magic", SHAPE, Capacity(4), PolicyConfig())
