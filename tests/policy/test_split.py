from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moespac.config import CostConfig
from moespac.policy.cost import CostModel
from moespac.policy.split import Stakes, State, best_prefix


def _machine(rng: np.random.Generator) -> CostModel:
    """Random speeds, so that each resource is the bottleneck in some instance."""
    costs = CostModel(CostConfig(), record_bytes=1 << 20)
    costs.observe_link(rng.uniform(0.1, 3))
    costs.observe_storage(rng.uniform(0.1, 6))
    for tokens in (1, 2, 4, 8):
        costs.observe_host(tokens, rng.uniform(0.5, 2) * (1 + tokens / 2))
        costs.observe_accelerator(tokens, rng.uniform(0.05, 1) * (1 + tokens / 8))
    costs.observe_host_beside_copy(1, float(costs.host_expert(np.array([1]))[0]) * rng.uniform(1, 3))
    return costs


def _instance(rng: np.random.Generator, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    n = int(rng.integers(1, most))
    counts, states = rng.integers(1, 6, n), rng.integers(0, 4, n)
    order = np.lexsort((-counts, states))
    return counts[order], states[order]


def _simulate(on_accelerator: np.ndarray, counts: np.ndarray, states: np.ndarray, costs: CostModel) -> float:
    """The finish time, told expert by expert."""
    host, accelerator = costs.host_expert(counts), costs.accelerator_expert(counts)
    reads = gpu = cpu = 0.0
    link = (states == State.ARRIVING).sum() * costs.link  # they arrive, wanted or not
    arrived = 0
    for i in np.flatnonzero(on_accelerator):
        ready = 0.0
        if states[i] == State.ARRIVING:
            arrived += 1
            ready = arrived * costs.link
        elif states[i] == State.HOST:
            link += costs.link
            ready = link
        elif states[i] == State.STORAGE:
            reads += costs.storage
            link = max(link, reads) + costs.link
            ready = link
        gpu = max(gpu, ready) + accelerator[i]
    for i in np.flatnonzero(~on_accelerator):
        ready = 0.0
        if states[i] == State.STORAGE:
            reads += costs.storage
            ready = reads
        cpu = max(cpu, ready) + host[i]
    copying = ((states == State.ARRIVING) | (on_accelerator & (states > State.ARRIVING))).sum() * costs.link
    if cpu * costs.copy_toll <= copying:  # the host is done before the copies are
        return max(cpu * costs.copy_toll, gpu)
    return max(cpu + copying * (1 - 1 / costs.copy_toll), gpu)


def _stakes(rng: np.random.Generator, counts: np.ndarray, states: np.ndarray, costs: CostModel) -> tuple:
    """Random, and the instance in the order that ``split`` wants then."""
    worth = rng.uniform(0, 2, len(counts))
    pull = np.where(states >= State.HOST, costs.host_expert(counts) + worth, counts)
    order = np.lexsort((-pull, states))
    given_up = np.sort(rng.uniform(0, 1, len(counts)))
    return counts[order], states[order], Stakes(worth[order], given_up)


def _objective(bits: np.ndarray, counts, states, costs: CostModel, stakes: Stakes) -> float:
    copied = bits & (states >= State.HOST)
    return (
        _simulate(bits, counts, states, costs)
        - stakes.worth[copied].sum()
        + stakes.given_up[: copied.sum()].sum()
    )


def _split(
    counts: np.ndarray, states: np.ndarray, costs: CostModel, slots: int, stakes: Stakes | None = None
) -> np.ndarray:
    """(n,) which experts the accelerator gets."""
    worth, given_up, _ = stakes or Stakes(np.zeros(len(counts)), np.zeros(0))
    copied = np.where(states >= State.HOST, worth, 0)
    return np.arange(len(counts)) < best_prefix(counts, states, costs, slots, Stakes(copied, given_up))


@pytest.mark.parametrize("seed", range(60))
def test_what_a_copy_is_worth_later_is_weighed_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, (counts, states) = _machine(rng), _instance(rng, most=40)
    counts, states, stakes = _stakes(rng, counts, states, costs)
    slots = int(rng.integers(1, len(counts) + 1))
    there = _split(counts, states, costs, slots, stakes)
    prefixes = [np.arange(len(counts)) < p for p in range(slots + 1)]
    best = min(_objective(prefix, counts, states, costs, stakes) for prefix in prefixes)
    assert _objective(there, counts, states, costs, stakes) == pytest.approx(best)


def test_a_miss_that_will_come_again_is_copied_even_if_the_layer_takes_longer() -> None:
    costs = CostModel(CostConfig(host_bandwidth=20e9, link_bandwidth=10e9), record_bytes=10 << 20)
    one, missed = np.array([1]), np.array([int(State.HOST)])
    for worth, copied in ((0.1e-3, False), (5e-3, True)):
        there = _split(one, missed, costs, 1, Stakes(np.array([worth]), np.zeros(1)))
        assert bool(there[0]) is copied
    dear = Stakes(np.array([5e-3]), np.array([5e-3]))
    assert not _split(one, missed, costs, 1, dear)[0], "what makes way is worth as much"


def test_hardly_any_assignment_finishes_earlier_on_machines_as_they_are() -> None:
    """Against all subsets of at most seven experts: nearly always the best, and on average hardly above it."""
    excess = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bandwidths = CostConfig(
            host_bandwidth=rng.uniform(10e9, 60e9),
            link_bandwidth=rng.uniform(8e9, 25e9),
            storage_bandwidth=rng.uniform(1e9, 7e9),
        )
        costs = CostModel(bandwidths, record_bytes=int(rng.choice([1, 5, 10, 50])) << 20)
        alone = float(costs.host_expert(np.array([1]))[0])
        costs.observe_host_beside_copy(1, alone * rng.uniform(1, 2))
        counts, states = _instance(rng)
        there = _split(counts, states, costs, len(counts))
        every = (np.array(bits) for bits in product([False, True], repeat=len(counts)))
        best = min(_simulate(bits, counts, states, costs) for bits in every)
        excess.append(_simulate(there, counts, states, costs) / best - 1)
    assert np.mean(np.array(excess) < 1e-9) > 0.85
    assert np.mean(excess) < 0.005


@pytest.mark.parametrize("seed", range(30))
def test_the_prefix_way_is_no_worse_than_either_device_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, (counts, states) = _machine(rng), _instance(rng, most=40)
    there = _split(counts, states, costs, slots=len(counts))
    alone = [_simulate(np.full(len(counts), on), counts, states, costs) for on in (False, True)]
    assert _simulate(there, counts, states, costs) <= min(alone) + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_the_prefix_way_finds_the_best_prefix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, (counts, states) = _machine(rng), _instance(rng, most=40)
    slots = int(rng.integers(1, len(counts) + 1))
    there = _split(counts, states, costs, slots)
    prefixes = [np.arange(len(counts)) < p for p in range(slots + 1)]
    best = min(_simulate(prefix, counts, states, costs) for prefix in prefixes)
    assert there.sum() <= slots
    assert _simulate(there, counts, states, costs) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(60))
def test_the_prefix_way_copies_at_once_beside_residents_when_nothing_is_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, (counts, states) = _machine(rng), _instance(rng, most=20)
    states[states > State.HOST] = State.HOST
    states[states == State.ARRIVING] = State.ACCELERATOR
    order = np.lexsort((-counts, states))
    counts, states = counts[order], states[order]
    there = _split(counts, states, costs, len(counts))
    prefixes = [np.arange(len(counts)) < p for p in range(len(counts) + 1)]
    best = min(_simulate(prefix, counts, states, costs) for prefix in prefixes)
    assert _simulate(there, counts, states, costs) == pytest.approx(best)


def test_a_resident_expert_stays_on_a_fast_accelerator() -> None:
    costs = CostModel(CostConfig(host_bandwidth=20e9, link_bandwidth=1e9), record_bytes=10 << 20)
    there = _split(np.array([1, 1]), np.array([State.ACCELERATOR, State.HOST]), costs, slots=2)
    np.testing.assert_array_equal(there, [True, False])


def test_misses_are_shared_between_both_devices() -> None:
    costs = CostModel(CostConfig(host_bandwidth=20e9, link_bandwidth=20e9), record_bytes=10 << 20)
    there = _split(np.ones(10, np.int64), np.full(10, int(State.HOST)), costs, slots=10)
    assert there.sum() == 5
