"""What every registered policy owes the engine and the simulator, on random machines and windows."""

from __future__ import annotations

import numpy as np
import pytest

from moespac.config import PolicyConfig
from moespac.policy.base import CacheRetention, Policy, Sensor
from moespac.policy.registry import SIMULATOR_POLICIES, make_policy
from moespac.types import Capacity, Observation, Placement, Plan, Residency, Window
from tests.policy.small import SHAPE, residency, routing

MACHINES = [
    Capacity(1),
    Capacity(5),
    Capacity(SHAPE.total),
    Capacity(1, 1),
    Capacity(4, 1),
    Capacity(12, 5),
    Capacity(SHAPE.total, 18),
    Capacity(SHAPE.total, SHAPE.total),
]
PASSES = [  # tokens, drafted, prefill
    (40, 0, True),
    (1, 0, False),
    (5, 4, False),
    (300, 0, True),
    (2, 1, False),
    (1, 0, False),
    (5, 4, False),
    (9, 8, False),
]


@pytest.mark.parametrize("attended", [True, False], ids=["attended", "bare"])
@pytest.mark.parametrize("capacity", MACHINES, ids=str)
@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_a_policy_keeps_the_contract(name: str, capacity: Capacity, attended: bool) -> None:
    """``bare``: nobody plans or serves the sensors, as in stock generate()."""
    rng = np.random.default_rng(7)
    policy = make_policy(name, SHAPE, capacity, PolicyConfig(), simulated=True)
    passes = [routing(size, rng) for size, *_ in PASSES]
    passes[2][:, 1] = -1  # a token that is routed nowhere
    if attended and Sensor.FUTURE in policy.sensors:
        policy.reveal(passes)
    for (size, drafted, prefill), routed in zip(PASSES, passes, strict=True):
        window = Window(rng.integers(0, 50, size), drafted, prefill)
        if attended:
            _plan(policy, window, _window_counts(routed), residency(capacity, rng))
        for layer in range(SHAPE.layers):
            _run_layer(policy, layer, _window_counts(routed), residency(capacity, rng), attended)
        policy.observe(Observation(window, routed, accepted=int(rng.integers(0, drafted + 1))))
        _check_values(policy.retention("host", -1))


@pytest.mark.parametrize("capacity", [Capacity(5), Capacity(12, 5)], ids=str)
@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_the_next_plan_does_not_know_what_was_put_off(name: str, capacity: Capacity) -> None:
    decided = []
    for learns in (False, True):
        rng = np.random.default_rng(3)
        policy = make_policy(name, SHAPE, capacity, PolicyConfig(), simulated=True)
        passes = [routing(size, rng) for size, *_ in PASSES * 3]
        policy.reveal(passes)
        for (size, drafted, prefill), routed in zip(PASSES * 3, passes, strict=True):
            window = Window(rng.integers(0, 9, size), drafted, prefill)
            plan = policy.plan(window, residency(capacity, rng))
            if learns:
                policy.learn()
            values = [policy.retention(tier, -1) for tier in ("host", "accelerator")]
            decided.append([part.tolist() for part in (*vars(plan).values(), *values)])
            policy.observe(Observation(window, routed, accepted=drafted // 2))
    half = len(decided) // 2
    assert decided[:half] == decided[half:]


CACHES = ("lru", "lfu", "freetoken", "llama.cpp", "llama.cpp+sd", "ktransformers", "fiddler")


@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_a_cache_that_only_uses_change_knows_the_pass_before_it(name: str) -> None:
    """Its values, asked once, order all experts in each layer as those of its twin, who is asked in each."""
    rng = np.random.default_rng(11)
    capacity = Capacity(9)
    asked, ahead = (make_policy(name, SHAPE, capacity, PolicyConfig(), simulated=True) for _ in range(2))
    known = ahead.pass_retention()
    assert isinstance(known, CacheRetention) == (name in CACHES)
    if not isinstance(known, CacheRetention):
        return
    for size in (40, 1, 5, 1, 2, 300, 1, 1, 9, 3) * 3:
        routed, now = routing(size, rng), residency(capacity, rng)
        routed[:, rng.random(size) < 0.1] = -1
        known = ahead.pass_retention()
        assert isinstance(known, CacheRetention)
        for layer, counts in enumerate(_window_counts(routed)):
            used = asked.place(layer, counts, now).host
            known.value[used] = known.once_used[used]
            assert (_order(known.value) == _order(asked.retention("host", layer))).all()
        ahead.ran(0, routed[:1])
        ahead.ran(1, routed[1:])
        for policy in (asked, ahead):
            policy.observe(Observation(Window(np.zeros(size, np.int64), size - 1), routed, accepted=0))
        assert (ahead.retention("host", -1) == asked.retention("host", -1)).all()
    assert not make_policy(name, SHAPE, Capacity(9, 4), PolicyConfig()).pass_retention()


def _order(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _plan(policy: Policy, window: Window, counts: np.ndarray, now: Residency) -> None:
    if Sensor.DRAFT_ROUTING in policy.sensors:
        policy.foresee_window(counts)
    _check_plan(policy.plan(window, now), now)
    _check_values(policy.retention("accelerator", -1))


def _run_layer(policy: Policy, layer: int, counts: np.ndarray, now: Residency, attended: bool) -> None:
    if attended and Sensor.NEXT_GATE in policy.sensors and layer + 1 < SHAPE.layers:
        policy.foresee_layer(layer + 1, counts[layer + 1])
    _check_placement(policy.place(layer, counts[layer], now), layer, counts[layer], now)
    for tier in ("host", "accelerator"):
        _check_values(policy.retention(tier, layer))


def _window_counts(routed: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(layer[layer >= 0], minlength=SHAPE.experts) for layer in routed])


def _check_plan(plan: Plan, now: Residency) -> None:
    for ids in (plan.host, plan.accelerator):
        assert len(set(ids.tolist())) == len(ids)
    assert not (now.host | now.arriving_host).ravel()[plan.host].any()
    assert not (now.accelerator | now.arriving_accelerator).ravel()[plan.accelerator].any()
    assert len(plan.host) <= now.capacity.host
    assert len(plan.accelerator) <= now.capacity.accelerator


def _check_placement(placement: Placement, layer: int, counts: np.ndarray, now: Residency) -> None:
    placed = np.concatenate([placement.host, placement.accelerator])
    assert sorted(placed) == (layer * SHAPE.experts + np.flatnonzero(counts)).tolist()
    if not now.capacity.accelerator:
        assert not len(placement.accelerator) and not len(placement.load)
    assert set(placement.load // SHAPE.experts) <= {layer}
    assert len(set(placement.load.tolist())) == len(placement.load)
    _check_plan(placement.prefetch, now)


def _check_values(values: np.ndarray) -> None:
    assert values.shape == (SHAPE.total,)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("capacity", [Capacity(5), Capacity(12, 5)], ids=str)
@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_a_layer_may_be_routed_nothing(name: str, capacity: Capacity) -> None:
    policy = make_policy(name, SHAPE, capacity, PolicyConfig(), simulated=True)
    now = residency(capacity, np.random.default_rng(0))
    nothing = np.zeros(SHAPE.experts, np.int64)
    _check_placement(policy.place(1, nothing, now), 1, nothing, now)
    _check_values(policy.retention("host", 1))


@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_values_are_the_callers_own(name: str) -> None:
    """The driver may keep or change them; the policy must not notice."""
    policy = make_policy(name, SHAPE, Capacity(12, 5), PolicyConfig(), simulated=True)
    first = policy.retention("host", 0)
    kept = first.copy()
    first += 1
    np.testing.assert_array_equal(policy.retention("host", 0), kept)
