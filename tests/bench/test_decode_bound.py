"""The bound by hand-computed cases, and against every schedule there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespac.bench.decode.bound import Needs, clairvoyant_misses, needs_of
from moespac.trace.recorder import TraceRecorder
from moespac.types import ModelShape, Observation, Window

Steps = list[list[int]]


def misses(steps: Steps, slots: int) -> int:
    return clairvoyant_misses([np.array(step) for step in steps], slots)


@pytest.mark.parametrize(
    ("steps", "slots", "expected"),
    [
        ([[0], [1], [2]], 3, 0),  # memory begins with what is best
        ([[0], [1], [2]], 1, 2),  # it holds 0 and lets 1 and 2 pass
        ([[0], [1], [0], [1]], 1, 2),  # 0 stays, 1 passes twice: nothing is gained by keeping it
        ([[0, 1], [2], [0, 1]], 2, 1),  # 0 and 1 stay, 2 passes
        ([[0], [1], [2], [0], [1], [2]], 2, 2),  # a scan: LRU would miss all of its second round
        ([[0, 1, 2]], 2, 1),  # a step may need more than memory holds
        ([], 2, 0),
    ],
)
def test_by_hand(steps: Steps, slots: int, expected: int) -> None:
    assert misses(steps, slots) == expected


def _fewest(steps: list[frozenset[int]], slots: int) -> int:
    """By trying every content of memory, at the beginning and after each step."""
    everything = frozenset().union(*steps)
    best = {frozenset(held): 0 for held in combinations(everything, min(slots, len(everything)))}
    for step in steps:
        after: dict[frozenset[int], int] = {}
        for held, cost in best.items():
            cost += len(step - held)
            reach = held | step
            for kept in combinations(reach, min(slots, len(reach))):
                after[frozenset(kept)] = min(cost, after.get(frozenset(kept), cost))
        best = after
    return min(best.values())


@given(
    st.lists(st.frozensets(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_no_schedule_reads_fewer(steps: list[frozenset[int]], slots: int) -> None:
    assert misses([sorted(step) for step in steps], slots) == _fewest(steps, slots)


def test_the_slower_of_reading_and_computing_counts() -> None:
    needs = Needs(misses=6, active=40, tokens=10, slots=2)
    assert needs.seconds(1000, storage_bandwidth=1000, memory_bandwidth=8000) == pytest.approx(6.0)
    assert needs.seconds(1000, storage_bandwidth=6000, memory_bandwidth=8000) == pytest.approx(5.0)


def test_only_decode_passes_of_a_trace_count_and_an_expert_once_a_pass() -> None:
    shape = ModelShape(layers=1, experts=4, top_k=1, record_bytes=1)
    recorder = TraceRecorder(shape, "test")

    def run(experts: list[int], drafted: int, accepted: int, prefill: bool = False) -> None:
        window = Window(np.arange(len(experts)), drafted, prefill)
        recorder(Observation(window, np.array(experts)[None, :, None], accepted, None))

    for _ in range(2):  # each text begins anew
        recorder.begin_sequence()
        run([0, 1, 2, 3], 0, 0, prefill=True)
        run([0, 0, 1], drafted=2, accepted=1)  # 0 twice in one pass: read and computed from memory once
        run([2], 0, 0)
        run([0], 0, 0)
    needs = needs_of(recorder.trace(), slots=1)
    assert needs == Needs(misses=2 * 2, active=2 * 4, tokens=2 * 4, slots=1)
