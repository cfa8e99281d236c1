"""A layer whose experts are all at hand: one turn does what the loop does, in native code what its twin does."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moespac.config import CostConfig
from moespac.experts.kernels.library import load_library
from moespac.experts.workers import Ticket
from moespac.policy import native
from moespac.policy.base import Turns
from moespac.policy.cost import CostModel
from moespac.policy.split import Stakes
from moespac.schedule.at_hand import AtHand, Hits, Share, Taken
from moespac.schedule.jobs import Jobs
from moespac.schedule.layer import LayerRun
from moespac.schedule.stats import PassClock
from moespac.schedule.tiers import Tier
from moespac.types import NO_IDS, Capacity, Placement, Plan, Residency
from tests.fakes import FakeStore
from tests.schedule.real_workers import Memory

LAYERS, EXPERTS = 2, 6
TOTAL = LAYERS * EXPERTS
needs_library = pytest.mark.skipif(load_library() is None, reason="no native code on this machine")
CALM = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
of_layer = st.sets(st.integers(EXPERTS, TOTAL - 1))  # of the second layer


def tier(name: str, ready: list[int]) -> Tier:
    made = Tier(name, EXPERTS, 4096, TOTAL)  # type: ignore[arg-type]
    for expert in ready:
        made.reserve(expert, np.zeros(TOTAL))
        made.commit(expert)
    return made


def ids(experts: set[int]) -> np.ndarray:
    return np.array(sorted(experts, key=lambda e: e * 7 % 5), dtype=np.int64)


def plain(taken: Taken) -> tuple:
    shares = [share and [part.tolist() for part in share[:3]] + [share.total] for share in taken[1:]]
    return (taken.hits, *shares)


@needs_library
@CALM
@given(
    host=of_layer,
    device=of_layer,
    on_host=of_layer,
    on_device=of_layer,
    load=of_layer,
    seed=st.integers(0, 99),
)
def test_both_take_the_same(host, device, on_host, on_device, load, seed) -> None:
    """Twice, so that pins count; what is missing pins nothing. ``host`` and ``device``: who computes."""
    counts = np.random.default_rng(seed).integers(1, 9, EXPERTS)
    placement = Placement(ids(host), ids(device - host), load=ids(load) if seed % 3 == 0 else NO_IDS)
    twins = [[tier("host", sorted(on_host)), tier("accelerator", sorted(on_device))] for _ in range(2)]
    for one in twins[1]:
        one._library = None  # its pins are Python's own, too
    takes = [AtHand(*twins[0], EXPERTS).take, AtHand(*twins[1], EXPERTS).take_in_python]
    for _ in range(2):
        native, python = (plain(take(placement, counts, EXPERTS)) for take in takes)
        assert native == python
        assert native[0] == Hits(len(host & on_host), len((device - host) & on_device))
        for one, other in zip(*twins, strict=True):
            assert one._pins.tolist() == other._pins.tolist()
            assert bool(one._pins.any()) == (
                native[1] is not None and bool(placement_of(one, placement).size)
            )


def placement_of(tier: Tier, placement: Placement) -> np.ndarray:
    return placement.host if tier.name == "host" else placement.accelerator


@needs_library
def test_only_what_is_ready_is_pinned_and_only_what_is_pinned_released() -> None:
    here = tier("host", [3, 5])
    both, more = np.array([5, 3]), np.array([3, 4])
    here.pin_all(both)
    for wrong in (lambda: here.pin_all(more), lambda: here.release_all(more)):
        with pytest.raises(AssertionError):
            wrong()
        assert here._pins.sum() == 2
    here.release_all(both)
    with pytest.raises(AssertionError):
        here.release_all(both)
    here.check_integrity()


def test_pins_are_those_of_the_slots_that_are_left() -> None:
    """A tier that shrinks has other arrays."""
    here = tier("host", list(range(6)))
    here.shrink(2, np.arange(TOTAL, dtype=float))
    kept = np.flatnonzero(here.ready)
    taken = AtHand(here, None, EXPERTS).take(Placement(kept), np.ones(EXPERTS, np.int64), 0)
    assert taken.host is not None and sorted(taken.host.slots.tolist()) == [0, 1]
    assert here._pins.tolist() == [1, 1]


@needs_library
@CALM
@given(
    ready=st.sets(st.integers(0, TOTAL - 1), max_size=EXPERTS),
    pinned=st.sets(st.integers(0, TOTAL - 1)),
    values=st.lists(st.sampled_from([0.0, 1.0, 2.5, np.inf]), min_size=TOTAL, max_size=TOTAL),
)
def test_both_choose_the_same_victim(ready, pinned, values) -> None:
    here = tier("host", sorted(ready, key=lambda e: e * 5 % 7))
    for expert in ready & pinned:
        here.pin(expert)
    worth = np.array(values)
    victim = here._victim(worth)
    assert victim == here._victim_in_python(worth)
    assert (victim in ready - pinned) == bool(ready - pinned)


@needs_library
@CALM
@given(
    ready=st.sets(st.integers(0, TOTAL - 1), max_size=EXPERTS),
    pinned=st.sets(st.integers(0, TOTAL - 1)),
    wanted=st.lists(st.integers(0, TOTAL - 1), unique=True, max_size=4),
    first=st.integers(0, TOTAL),
    values=st.lists(st.sampled_from([0.0, 1.0, 2.5, np.inf]), min_size=2 * TOTAL, max_size=2 * TOTAL),
)
def test_both_reserve_the_same(ready, pinned, wanted, first, values) -> None:
    """Slots for copies of several: free ones, then those of the least retained, as far as there are any."""
    retention = Turns(np.array(values[:TOTAL]), np.array(values[TOTAL:]), first)
    told = []
    for natively in (True, False):
        source = Tier("host", TOTAL, 4096, TOTAL)
        for expert in range(TOTAL):
            source.reserve(expert, np.zeros(TOTAL))
            source.commit(expert)
        here = tier("accelerator", sorted(ready, key=lambda e: e * 5 % 7))
        for expert in ready & pinned:
            here.pin(expert)
        missing = [expert for expert in wanted if expert not in ready]
        if not natively:
            here._library = None
        places = here.reserve_all(missing, source, retention)
        assert len(places) == min(len(missing), EXPERTS - len(ready & pinned))
        here.check_integrity()
        assert [expert for expert in range(TOTAL) if source._pins[source.slot(expert)]] == sorted(
            missing[: len(places)]
        )
        books = here.books._replace(free=here.books.free[: here.books.counts[0]])
        told.append((places, [part.tolist() for part in books], source._pins.tolist()))
    assert told[0] == told[1]


@needs_library
@CALM
@given(ready=of_layer, wanted=of_layer, seed=st.integers(0, 99))
def test_both_sort_out_and_look_up_the_same(ready, wanted, seed) -> None:
    counts = np.random.default_rng(seed).integers(1, 9, EXPERTS)
    told = []
    for natively in (True, False):
        here = tier("accelerator", sorted(ready))
        if not natively:
            here._library = None
        resident, missing = here.sort_out(ids(wanted))
        assert (set(resident), set(missing)) == (wanted & ready, wanted - ready)
        slots, tokens = here.look_up(np.array(resident, np.int64), counts, EXPERTS)
        told.append((resident, missing, slots.tolist(), tokens, here._pins.tolist()))
    assert told[0] == told[1]


@needs_library
@CALM
@given(on_host=of_layer, on_device=of_layer, active=of_layer, seed=st.integers(0, 99))
def test_placing_and_taking_in_one_call_is_one_after_the_other(on_host, on_device, active, seed) -> None:
    rng = np.random.default_rng(seed)
    counts = np.zeros(EXPERTS, np.int64)
    counts[[expert - EXPERTS for expert in active]] = rng.integers(1, 9, len(active))
    told = []
    for at_once in (True, False):
        tiers = [tier("host", sorted(on_host)), tier("accelerator", sorted(on_device))]
        grids = [one.reshape(LAYERS, EXPERTS) for part in tiers for one in (part.ready, part.filling)]
        now = Residency(grids[0], grids[2], grids[1], grids[3], Capacity(EXPERTS, EXPERTS))
        worth = np.random.default_rng(seed).uniform(0, 1e-3, TOTAL)
        placer = native.placer(now, CostModel(CostConfig(), 1 << 20), Stakes(worth, np.zeros(2)))
        at_hand = AtHand(*tiers, EXPERTS)
        assert placer is not None
        if at_once:
            placement, taken = at_hand.place_and_take(placer.address, counts, EXPERTS)
        else:
            order, there = placer(1, counts)  # type: ignore[misc]
            placement = Placement(order[there:], order[:there])
            taken = at_hand.take_in_python(placement, counts, EXPERTS)
        placed = placement.host.tolist(), placement.accelerator.tolist()
        told.append((placed, plain(taken), [part._pins.tolist() for part in tiers]))
    assert told[0] == told[1]


# ---- the turn and the loop ----------------------------------------------------------------------------------


@dataclass
class Devices:
    """Note who was asked for what, and what is pinned meanwhile."""

    memory: Memory
    in_order: bool
    host_threads: int = 2
    asked: list[tuple] = field(default_factory=list)

    def compute_on_host(self, experts: np.ndarray, slots: np.ndarray) -> np.ndarray:
        self._note("host", experts, slots)
        return 1e-6 * (1 + experts % 7)

    def compute_on_accelerator(self, experts: np.ndarray, slots: np.ndarray, name: str) -> Ticket:
        self._note("accelerator", experts, slots)
        ticket = self.memory.device.compute(name, lambda: None)
        ticket.seconds = 1e-6 * len(experts)
        return ticket

    def _note(self, device: str, experts: np.ndarray, slots: np.ndarray) -> None:
        pins = [int(tier._pins.sum()) for tier in self.memory.tiers]
        self.asked.append((device, experts.tolist(), slots.tolist(), pins))


class InTheLoop(AtHand):
    """Everything is left to the event loop."""

    def take(self, placement: Placement, counts: np.ndarray, first_id: int) -> Taken:
        taken = self.take_in_python(placement, counts, first_id)
        for tier, share in zip(self._tiers, taken[1:], strict=False):
            if share is not None and share.experts.size:
                tier.release_all(share.experts)
        return Taken(taken.hits, None, None)

    def take_and_reserve(self, *given: object) -> None:
        return None


@needs_library
@CALM
@given(
    layers=st.lists(st.tuples(of_layer, of_layer), min_size=1, max_size=4),
    there=of_layer,
    ahead=st.lists(st.integers(0, TOTAL - 1), unique=True, max_size=5),
    copied_ahead=st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=3),
    in_order=st.booleans(),
    slots=st.integers(2, EXPERTS),
    seed=st.integers(0, 99),
)
def test_one_turn_does_what_the_loop_does(layers, there, ahead, copied_ahead, in_order, slots, seed) -> None:
    """The second layer, several times: who computes what, what is copied for it, and what moves meanwhile, what is
    learned."""
    told = []
    values = np.random.default_rng(seed).permutation(TOTAL).astype(float)
    for kind in (AtHand, InTheLoop):
        memory = Memory(FakeStore(LAYERS, EXPERTS), TOTAL, slots, asynchronous=False)
        memory.at_hand = kind(memory.host, memory.accelerator, EXPERTS)
        if kind is InTheLoop:
            for one in memory.tiers:
                one._library = None
            memory.begin_copies = lambda *given: 0  # they are asked for one by one
        for expert in range(EXPERTS, TOTAL):
            memory.demand_host(expert, lambda tier: values)
        for expert in sorted(there):
            memory.settle()
            memory.demand_accelerator(expert, lambda tier: values)
        memory.settle()
        clock, devices = PassClock(), Devices(memory, in_order)
        jobs, hits = Jobs(memory.bell, clock), []
        for host, device in layers:
            counts = np.random.default_rng(seed).integers(1, 40, EXPERTS)
            placement = Placement(ids(host), ids(device - host))
            memory.follow(Plan(np.array(ahead, np.int64), np.array(copied_ahead, np.int64)))
            run = LayerRun(memory, devices, memory._costs, clock, jobs, counts, first_id=EXPERTS)
            hits.append(run.execute(placement, lambda tier: values))
        jobs.finish()
        memory.quiesce()
        memory.check_integrity()
        assert not any(tier._pins.any() for tier in memory.tiers)
        curves = [curve.tolist() for curve in memory._costs.tables()]
        resident = [np.flatnonzero(tier.ready).tolist() for tier in memory.tiers]
        causes = clock.seconds.keys() - {"wait_for_experts"}  # the loop waits for what is there already
        told.append((devices.asked, hits, resident, memory.store.reads, curves, causes))
        memory.close()
    assert told[0] == told[1]


def test_a_copy_ahead_that_lands_as_its_layer_begins_is_not_made_again() -> None:
    memory = Memory(FakeStore(LAYERS, EXPERTS), TOTAL, EXPERTS, asynchronous=False)
    values = np.zeros(TOTAL)
    for expert in range(EXPERTS):
        memory.demand_host(expert, lambda tier: values)
    memory.settle()
    memory.follow(Plan(accelerator=np.array([2])))
    memory.pump(lambda tier: values)
    assert memory.flying, "it is there, and nobody has looked yet"
    devices, jobs = Devices(memory, in_order=True), Jobs(memory.bell, PassClock())
    counts = np.ones(EXPERTS, np.int64)
    run = LayerRun(memory, devices, memory._costs, PassClock(), jobs, counts, first_id=0)
    run.execute(Placement(np.array([0]), np.array([2, 3])), lambda tier: values)
    jobs.finish()
    memory.check_integrity()
    assert sorted(e for device, experts, *_ in devices.asked if device == "accelerator" for e in experts) == [
        2,
        3,
    ]
    assert memory.bytes_read["link"] == 2 * memory.shape.record_bytes
    memory.close()


def test_a_host_that_fails_leaves_nothing_pinned() -> None:
    memory = Memory(FakeStore(LAYERS, EXPERTS), TOTAL, EXPERTS, asynchronous=False)
    values = np.zeros(TOTAL)
    for expert in (0, 1):
        memory.demand_host(expert, lambda tier: values)
    memory.settle()
    memory.demand_accelerator(1, lambda tier: values)
    memory.settle()
    devices = Devices(memory, in_order=True)
    devices.compute_on_host = lambda experts, slots: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    jobs = Jobs(memory.bell, PassClock())
    counts = np.ones(EXPERTS, np.int64)
    run = LayerRun(memory, devices, memory._costs, PassClock(), jobs, counts, first_id=0)
    with pytest.raises(ZeroDivisionError):
        run.execute(Placement(np.array([0]), np.array([1])), lambda tier: values)
    assert not any(tier._pins.any() for tier in memory.tiers)
    memory.close()


def test_nothing_is_asked_of_an_accelerator_that_is_not_there() -> None:
    here = tier("host", [0])
    for take in (AtHand(here, None, EXPERTS).take, AtHand(here, None, EXPERTS).take_in_python):
        share = take(Placement(np.array([0])), np.ones(EXPERTS, np.int64), 0)
        assert isinstance(share.host, Share) and share.accelerator is not None
        assert share.accelerator.experts.size == 0
