"""The bound: next uses by hand, and never more misses than any policy that does not know the future."""

from __future__ import annotations

import numpy as np
import pytest

from moespac.config import PolicyConfig
from moespac.policy.base import Policy, Sensor
from moespac.types import Capacity, Observation, Window
from tests.policy.small import SHAPE, counts, make, resident, routing

CONFIG = PolicyConfig()
HOST_ONLY = Capacity(4)
MACHINE = Capacity(SHAPE.total, 4)


def _passes(*tokens: list[list[int]]) -> list[np.ndarray]:
    """(layers, 1, k) each, from the experts of each layer."""
    return [np.array(layers)[:, None, :] for layers in tokens]


PASSES = _passes(
    [[0, 1], [0, 1], [0, 1]],
    [[2, 3], [0, 1], [2, -1]],
    [[0, 3], [4, 5], [0, 2]],
)


def _end_pass(policy: Policy) -> None:
    policy.observe(Observation(Window(np.array([1])), PASSES[0], 0))


def test_the_next_use_by_hand() -> None:
    """Time counts layers: pass p, layer l is 3 p + l."""
    policy = make("belady", HOST_ONLY)
    policy.reveal(PASSES)

    def next_uses(layer: int, *experts: int) -> list[float]:
        return (-policy.retention("host", layer)[list(experts)]).tolist()

    assert next_uses(-1, 0, 1, 8, 16, 2) == [0, 0, 1, 2, 3]
    assert next_uses(0, 0, 2, 8) == [6, 3, 1], "layer 0 has been dispatched"
    _end_pass(policy)
    assert next_uses(-1, 0, 3, 8, 16, 18) == [6, 3, 4, 8, 5]
    assert next_uses(2, 18) == [8]
    assert min(next_uses(2, 8, 1)) > 9, "they are never used again"


def test_it_fetches_what_is_needed_next() -> None:
    policy = make("belady", HOST_ONLY)
    policy.reveal(PASSES)
    np.testing.assert_array_equal(policy.plan(None, resident(HOST_ONLY, [1])).host, [0, 8, 9, 16])
    placement = policy.place(1, counts([0, 1]), resident(HOST_ONLY, [16]))
    np.testing.assert_array_equal(placement.prefetch.host, [17, 2, 3, 8])


def test_what_is_never_used_again_is_never_fetched() -> None:
    policy = make("belady", Capacity(SHAPE.total))
    policy.reveal(PASSES[:1])
    assert set(policy.plan(None, resident(Capacity(SHAPE.total))).host) == {0, 1, 8, 9, 16, 17}
    policy.place(2, counts([0]), resident(HOST_ONLY))
    _end_pass(policy)
    assert not len(policy.plan(None, resident(HOST_ONLY)).host), "the trace has ended"


def test_with_an_accelerator_host_memory_is_filled_behind_it() -> None:
    capacity = Capacity(3, 2)
    policy = make("belady", capacity)
    policy.reveal(PASSES)
    now = resident(capacity, host=[0, 8], accelerator=[0], arriving=[1])
    plan = policy.plan(Window(np.array([1])), now)
    np.testing.assert_array_equal(plan.host, [9, 16, 17])
    value = policy.retention("host", -1)
    assert value.argmin() == 0, "the accelerator has it too"


def test_on_the_accelerator_experts_are_worth_the_seconds_that_they_save() -> None:
    policy = make("belady", MACHINE)
    policy.costs.observe_host(1, 1.0)
    policy.costs.observe_accelerator(1, 0.25)
    policy.reveal(PASSES)
    later = CONFIG.baselines.clairvoyant_discount
    saved = policy.retention("accelerator", -1)
    assert saved[0] == pytest.approx(0.75 * (1 + later**2)), "in this pass, and in the third"
    assert saved[2] == pytest.approx(0.75 * later)
    assert policy.retention("accelerator", 0)[0] == pytest.approx(0.75 * later**2), (
        "layer 0 has been dispatched"
    )


def test_a_copy_that_takes_more_than_it_saves_waits_for_a_draft() -> None:
    policy = make("belady", MACHINE)
    policy.costs.observe_host(1, 1.0)
    policy.costs.observe_accelerator(1, 0.25)
    policy.costs.observe_link(4.0)
    policy.costs.observe_host_beside_copy(
        1, 2.0
    )  # a copy takes 2 seconds from the host, more than any use saves
    drafted = [np.repeat(PASSES[0], 2, axis=1), *PASSES[1:]]
    now = resident(MACHINE, range(SHAPE.total), [2, 3, 10, 11])
    for passes, window in ((PASSES, [1]), (drafted, [1, 2])):
        policy.reveal(passes)
        assert not len(policy.plan(Window(np.array(window)), now).accelerator)
    assert set(policy.plan(Window(np.array([1])), now).accelerator) <= {0, 1, 8, 9, 16, 17}
    assert len(policy.plan(Window(np.array([1])), now).accelerator) == 4


def test_it_splits_a_layer_between_the_devices() -> None:
    policy = make("belady", MACHINE)
    now = resident(MACHINE, range(SHAPE.total), [1])
    policy.costs.observe_host(1, 1.0)
    policy.costs.observe_accelerator(1, 0.1)
    policy.costs.observe_link(1.5)
    placement = policy.place(0, counts([0, 1, 2, 3]), now)
    assert placement.accelerator[0] == 1 and len(placement.accelerator) == 2, "1.6 there while two take 2.0"
    assert set(placement.host) | set(placement.accelerator) == {0, 1, 2, 3}


def _misses(policy: Policy, passes: list[np.ndarray]) -> int:
    """Demand fetches of a cache in host memory that follows the policy's order and prefetches nothing."""
    held: set[int] = set()
    misses = 0
    if Sensor.FUTURE in policy.sensors:
        policy.reveal(passes)
    for routed in passes:
        for layer in range(SHAPE.layers):
            active = set((layer * SHAPE.experts + np.unique(routed[layer])).tolist())
            tokens = np.bincount(routed[layer].ravel(), minlength=SHAPE.experts)
            policy.place(layer, tokens, resident(policy.capacity, held))
            value = policy.retention("host", layer)
            for expert in active - held:
                misses += 1
                if len(held) == policy.capacity.host:
                    held.remove(min(held - active, key=lambda resident: value[resident]))
                held.add(expert)
        policy.observe(Observation(Window(np.zeros(routed.shape[1], np.int64)), routed, 0))
    return misses


@pytest.mark.parametrize("slots", [4, 8, 14])
def test_no_order_of_eviction_misses_less(slots: int) -> None:
    rng = np.random.default_rng(slots)
    skewed = [np.minimum(routing(1, rng), routing(1, rng)) for _ in range(60)]
    misses = {
        name: _misses(make(name, Capacity(slots)), skewed)
        for name in (
            "belady",
            "lru",
            "lfu",
            "arc",
            "mixtral-offloading",
            "moe-infinity",
            "hybrimoe",
            "moe-spac",
        )
    }
    best = misses.pop("belady")
    assert best <= min(misses.values())
    assert best < misses["lru"]
