"""LRU, LFU, ARC and FreeToken: who goes first, and who computes a miss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moespac.policy.baselines.arc import AdaptiveReplacement
from moespac.policy.baselines.order import Active
from moespac.types import Capacity
from tests.policy.small import SHAPE, counts, make, resident

HOST_ONLY = Capacity(8)
WITH_ACCELERATOR = Capacity(SHAPE.total, 4)


def _victims(values: np.ndarray) -> list[int]:
    """Experts that have any value, those that go first at the front."""
    return [expert for expert in np.argsort(values, kind="stable").tolist() if values[expert] > 0]


def _use(policy, *layer_and_experts: tuple[int, list[int]], capacity: Capacity = HOST_ONLY) -> None:
    for layer, experts in layer_and_experts:
        policy.place(layer, counts(experts), resident(capacity))


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = make("lru", HOST_ONLY)
    _use(policy, (0, [3]), (1, [2]), (0, [5]), (1, [2]))
    assert _victims(policy.retention("host", -1)) == [3, 5, 10]


def test_lfu_evicts_what_was_used_least_and_of_equals_the_least_recent() -> None:
    policy = make("lfu", HOST_ONLY)
    _use(policy, (0, [3]), (1, [2]), (0, [5, 3]), (1, [4]))
    assert _victims(policy.retention("host", -1)) == [10, 5, 12, 3]


def test_for_lfu_a_pass_is_one_use_however_long_its_window() -> None:
    policy = make("lfu", HOST_ONLY)
    policy.place(0, counts({1: 300}), resident(HOST_ONLY))
    _use(policy, (0, [2]), (0, [2]))
    assert _victims(policy.retention("host", -1)) == [1, 2]


def _requests(cache: AdaptiveReplacement, experts: list[int]) -> list[int]:
    for expert in experts:
        cache.use(Active(np.array([expert]), np.array([1]), np.array([False])))
    return _victims(cache.values())


def test_arc_by_hand() -> None:
    """Megiddo and Modha's cases, c = 2; T1 | T2 | B1 | B2 and p after each request."""
    cache = AdaptiveReplacement(10, 2)
    assert _requests(cache, [1, 2]) == [1, 2]  # IV: 1 2 | | |
    assert _requests(cache, [1]) == [2, 1]  # I: 2 | 1 | |, and T1 is above its target of 0
    assert _requests(cache, [3]) == [3, 1]  # IV: 3 | 1 | 2 |
    assert _requests(cache, [2]) == [2, 3]  # II: p = 1, so T2 gives: 3 | 2 | | 1
    assert _requests(cache, [1]) == [2, 1]  # III: p = 0, so T1 gives: | 2 1 | 3 |
    assert _requests(cache, [4]) == [4, 1]  # IV: 4 | 1 | 3 | 2
    assert _requests(cache, [5]) == [5, 1]  # IV, |T1| + |B1| = c: 3 is forgotten, 5 | 1 | 4 | 2
    assert _requests(cache, [3]) == [3, 1]  # IV again, as 3 was forgotten: 3 | 1 | 5 | 2


def test_arc_keeps_what_is_used_again_through_a_scan() -> None:
    cache = AdaptiveReplacement(40, 6)
    assert {0, 1, 2} <= set(_requests(cache, [0, 1, 2, 0, 1, 2, *range(10, 40)]))


def test_arc_takes_from_t1_at_its_target_for_a_hit_in_b2() -> None:
    """c = 3: 3 | 2 5 | | 4 and p = 2; the hit makes p = 1 = |T1|: | 2 5 4 | 3 |."""
    assert _requests(AdaptiveReplacement(10, 3), [2, 5, 4, 4, 3, 2, 5, 4]) == [2, 5, 4]


def test_arc_drops_t1_itself_when_it_fills_the_cache() -> None:
    assert _requests(AdaptiveReplacement(10, 2), [1, 2, 3, 1]) == [3, 1]


@example(slots=1, requests=[1, 1, 2, 2, 3])  # the directory is full with nothing in L1
@given(st.integers(1, 6), st.lists(st.integers(0, 11), max_size=120))
def test_arc_keeps_the_papers_invariants(slots: int, requests: list[int]) -> None:
    cache = AdaptiveReplacement(12, slots)
    for number, expert in enumerate(requests):
        held = _requests(cache, [expert])
        once, again = len(cache._once), len(cache._again)
        left_once, left_again = len(cache._left_once), len(cache._left_again)
        assert once + left_once <= slots and once + again + left_once + left_again <= 2 * slots
        assert 0 <= cache._target <= slots
        assert len(held) == once + again == min(len(set(requests[: number + 1])), slots)
        assert expert in held


@pytest.mark.parametrize("name", ["lru", "lfu", "arc"])
def test_misses_go_where_they_are_told(name: str) -> None:
    now = resident(WITH_ACCELERATOR, range(SHAPE.total), [0])
    by_device = make(name, WITH_ACCELERATOR).place(0, counts([0, 1]), now)
    assert not len(by_device.host) and not len(by_device.prefetch.accelerator)
    np.testing.assert_array_equal(by_device.accelerator, [0, 1])
    by_host = make(name, WITH_ACCELERATOR, miss_on="host").place(0, counts([0, 1]), now)
    assert (by_host.host, by_host.accelerator, by_host.prefetch.accelerator) == ([1], [0], [1])


def test_what_is_resident_or_arriving_runs_first() -> None:
    now = resident(WITH_ACCELERATOR, range(SHAPE.total), [4], arriving=[2])
    placement = make("lru", WITH_ACCELERATOR).place(0, counts([1, 2, 4]), now)
    np.testing.assert_array_equal(placement.accelerator, [2, 4, 1])


def test_a_hit_on_the_accelerator_is_no_use_of_host_memory() -> None:
    policy = make("lru", WITH_ACCELERATOR)
    policy.place(0, counts([0, 1]), resident(WITH_ACCELERATOR, [0, 1], [0]))
    assert _victims(policy.retention("host", -1)) == [1]
    assert _victims(policy.retention("accelerator", -1)) == [0, 1]


def _freetoken(capacity: Capacity = WITH_ACCELERATOR):
    """The link is half as fast as the CPU."""
    policy = make("freetoken", capacity)
    policy.costs.observe_link(2.0)
    policy.costs.observe_host(1, 1.0)
    return policy


def test_freetoken_fetches_its_share_of_the_misses_the_most_recent_first() -> None:
    policy = _freetoken()
    now = resident(WITH_ACCELERATOR, range(SHAPE.total))
    for expert in (6, 2, 5):
        policy.place(0, counts([expert]), now)
    placement = policy.place(0, counts([0, 2, 5, 6]), now)
    np.testing.assert_array_equal(placement.accelerator, [5, 2])
    np.testing.assert_array_equal(placement.host, [6, 0])
    odd = policy.place(1, counts([0, 1, 2]), now)
    assert len(odd.accelerator) == 1, "the share is rounded down"


def test_freetoken_fetches_all_over_a_fast_link_as_far_as_there_are_slots() -> None:
    policy = _freetoken()
    for _ in range(20):
        policy.costs.observe_link(0.1)
    now = resident(WITH_ACCELERATOR, range(SHAPE.total), [0, 1])
    assert set(policy.place(0, counts([0, 2]), now).accelerator) == {0, 2}
    crowded = policy.place(0, counts(range(8)), now)
    assert len(crowded.accelerator) == 4 and {0, 1} < set(crowded.accelerator.tolist())
