"""Static placements, and whole layers streamed: llama.cpp, Fiddler, KTransformers, vLLM, Accelerate."""

from __future__ import annotations

import numpy as np
import pytest

from moespac.types import Capacity
from tests.policy.small import SHAPE, counts, make, observation, resident

EVERYWHERE = range(SHAPE.total)
HOST_ONLY = Capacity(20)


def _machine(slots: int) -> Capacity:
    return Capacity(SHAPE.total, slots)


def _set(policy) -> list[int]:
    """What it wants to hold, on a machine that holds nothing yet."""
    plan = policy.plan(None, resident(policy.capacity, EVERYWHERE if policy.capacity.accelerator else ()))
    return np.concatenate([plan.host, plan.accelerator]).tolist()


def _kept(policy) -> list[int]:
    """Experts that nothing else pushes out of the fast tier."""
    value = policy.retention("accelerator" if policy.capacity.accelerator else "host", 0)
    return np.flatnonzero(value > value.min()).tolist()


# ---- llama.cpp ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp+sd"])
@pytest.mark.parametrize(("slots", "first"), [(7, 24), (8, 16), (20, 8), (24, 0)])
def test_llama_cpp_holds_as_many_last_layers_as_fit(name: str, slots: int, first: int) -> None:
    policy = make(name, _machine(slots))
    assert _set(policy) == list(range(first, 24))
    if 0 < first < 24:
        assert _kept(policy) == _set(policy)


def test_llama_cpp_computes_each_layer_where_it_is() -> None:
    policy = make("llama.cpp", _machine(16))
    now = resident(_machine(16), EVERYWHERE, range(8, 24))
    on_host, on_device = policy.place(0, counts([1, 5]), now), policy.place(1, counts([1, 5]), now)
    assert (on_host.host.tolist(), on_host.accelerator.tolist()) == ([1, 5], [])
    assert (on_device.host.tolist(), on_device.accelerator.tolist()) == ([], [9, 13])
    assert not len(policy.plan(None, now).accelerator)


def test_llama_cpp_copies_weights_for_batches_of_32_tokens_where_there_are_slots() -> None:
    """32 tokens of top-2 are 64 routings."""
    roomy, full = make("llama.cpp", _machine(17)), make("llama.cpp", _machine(16))
    large, small = counts({0: 32, 3: 32}), counts({0: 32, 3: 31})
    now = resident(_machine(17), EVERYWHERE, range(8, 24))
    assert roomy.place(0, large, now).accelerator.tolist() == [0, 3]
    assert roomy.place(0, small, now).host.tolist() == [0, 3]
    assert full.place(0, large, now).host.tolist() == [0, 3]


def test_without_an_accelerator_the_set_is_held_in_host_memory_beside_slots_to_read_through() -> None:
    """20 slots less 8: one whole layer. The rest is read, and kept by recency."""
    policy = make("llama.cpp", HOST_ONLY)
    assert _set(policy) == list(range(16, 24))
    for expert in (3, 1):
        policy.place(0, counts([expert]), resident(HOST_ONLY))
    policy.place(2, counts([0]), resident(HOST_ONLY))
    value = policy.retention("host", 0)
    assert value[16:].min() > value[1] > value[3] > value[0]


@pytest.mark.parametrize(("slots", "held"), [(1, 0), (2, 1), (15, 7), (16, 8), (17, 9), (24, 24)])
def test_slots_to_pass_through_are_at_most_half(slots: int, held: int) -> None:
    assert len(_set(make("ktransformers", Capacity(slots)))) == held
    assert len(_set(make("ktransformers", _machine(slots)))) == slots, (
        "nothing passes through the accelerator"
    )
    assert len(_set(make("fiddler", _machine(slots)))) == held, "Fiddler's transfers do"


# ---- by popularity -----------------------------------------------------------------------------------------


def test_ktransformers_is_uniform_then_by_frequency_in_each_layer() -> None:
    policy = make("ktransformers", _machine(7), calibration_passes=2)
    assert _set(policy) == [0, 8, 16, 1, 9, 17, 2]
    policy.observe(observation([1, 2], [5, 5]))
    assert _set(policy) == [0, 8, 16, 1, 9, 17, 2], "not yet calibrated"
    policy.observe(observation([1], [6]))  # now 5: 2 tokens, 6: 3, 7: 1
    assert _set(policy) == [6, 14, 22, 5, 13, 21, 7]
    assert set(_kept(policy)) == set(_set(policy))
    policy.observe(observation([1] * 9, [1] * 9))
    assert _set(policy) == [6, 14, 22, 5, 13, 21, 7], "calibrated once"


def test_rejected_tokens_are_not_popular() -> None:
    policy = make("ktransformers", _machine(3), calibration_passes=1)
    policy.observe(observation([1, 2, 3, 4], [2, 5, 5, 5], drafted=3, accepted=0))
    assert _set(policy) == [2, 10, 18]


def test_fiddler_holds_the_most_popular_of_all_layers() -> None:
    policy = make("fiddler", _machine(6), calibration_passes=1)
    assert _set(policy) == [0, 8, 16]
    seen = observation([1, 2], [3, 4])
    seen.routing[0] = 7  # both tokens, both times
    seen.routing[2] = [[3, 6], [3, 5]]
    policy.observe(seen)
    # tokens: 7 of layer 0: 4; layer 1: 4 twice, 3 and 5 once; layer 2: 3 twice
    assert _set(policy) == [7, 19, 12]


def test_fiddler_transfers_only_where_the_cpu_would_take_longer() -> None:
    """As in its source: 7 a token on the CPU, 70 for a transfer."""
    policy = make("fiddler", _machine(6))
    policy.costs.observe_host(1, 7.0)
    policy.costs.observe_link(70.0)
    now = resident(_machine(6), EVERYWHERE, [0, 8, 16])
    placement = policy.place(1, counts({0: 1, 1: 10, 2: 11, 3: 1}), now)
    assert (placement.host.tolist(), placement.accelerator.tolist()) == ([9, 11], [8, 10])
    assert set(np.argsort(policy.retention("accelerator", 1))[-3:]) == {0, 8, 16}


# ---- streamed ----------------------------------------------------------------------------------------------


def test_accelerate_loads_whole_layers_and_drops_them() -> None:
    policy = make("accelerate", _machine(10))
    placement = policy.place(1, counts([1, 5]), resident(_machine(10), EVERYWHERE))
    assert (placement.host.tolist(), placement.accelerator.tolist()) == ([], [9, 13])
    assert placement.load.tolist() == list(range(8, 16))
    by_layer = policy.retention("accelerator", 1).reshape(SHAPE.layers, -1)
    assert (by_layer[1] > by_layer[0]).all() and (by_layer[0] > by_layer[2]).all(), "2 ran longest ago"
    between = policy.retention("accelerator", -1).reshape(SHAPE.layers, -1)
    assert (between[2] > between[1]).all() and (between[1] > between[0]).all()


def test_accelerate_reads_only_what_is_routed_without_an_accelerator() -> None:
    placement = make("accelerate", HOST_ONLY).place(1, counts([1]), resident(HOST_ONLY))
    assert placement.host.tolist() == [9] and not len(placement.load)


@pytest.mark.parametrize(("slots", "share"), [(5, 0), (16, 0), (18, 2), (22, 6), (23, 7), (24, 8)])
def test_vllm_holds_a_share_of_each_layer_and_room_for_two_rests(slots: int, share: int) -> None:
    """3 layers of 8: 3 * share + 2 * (8 - share) slots."""
    policy = make("vllm-offload", _machine(slots))
    first_rest = list(range(share, 8))[: slots - 3 * share]
    static = [layer * 8 + expert for layer in range(3) for expert in range(share)]
    assert _set(policy) == static + first_rest


def test_vllm_streams_the_rest_of_this_layer_and_the_next() -> None:
    policy = make("vllm-offload", _machine(18))
    now = resident(_machine(18), EVERYWHERE, [0, 1, 8, 9, 16, 17, 3], arriving=[4])
    placement = policy.place(2, counts([1, 5]), now)
    assert (placement.host.tolist(), placement.accelerator.tolist()) == ([], [17, 21])
    assert placement.load.tolist() == [18, 19, 20, 21, 22, 23]
    assert placement.prefetch.accelerator.tolist() == [2, 5, 6, 7], "layer 0 of the next pass"
    value = policy.retention("accelerator", 1)
    assert value[[0, 8, 16]].min() > value[18] > value[10] > value[2], "static, next, this, the one before"


def test_vllm_without_an_accelerator_holds_its_share_in_host_memory() -> None:
    """20 slots less 8, over 3 layers."""
    policy = make("vllm-offload", HOST_ONLY)
    assert _set(policy) == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    placement = policy.place(1, counts([1, 7]), resident(HOST_ONLY))
    assert placement.host.tolist() == [9, 15] and not len(placement.load)
