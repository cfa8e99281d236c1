"""A hypothesis state machine drives tiers and transfers; the books must agree after every step."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moespac.config import ForesightConfig
from moespac.errors import StorageError
from moespac.experts.kernels.foresight import NativeForesight
from moespac.experts.kernels.library import load_library
from moespac.experts.kernels.passes import PassOrder
from moespac.policy.base import PassRetention
from moespac.policy.foresight import Foresight
from moespac.types import NO_IDS, Placement, Plan
from tests.experts.fake_cuda import FakeDriver
from tests.fakes import FakeStore
from tests.schedule.real_workers import HostMemory, Memory

LAYERS, EXPERTS = 3, 4
TOTAL = LAYERS * EXPERTS
some_expert = st.integers(0, TOTAL - 1)
some_order = st.permutations(range(TOTAL))


def hold_copies(memory: Memory, gate: threading.Event) -> None:
    """Every copy over the link waits for ``gate`` before it looks at its source."""
    if memory._cuda is not None:
        memory._cuda.copy_stream.gate = gate
        return
    submit = memory.device.link.submit

    def submit_behind_gate(name, job, *priority):
        def gated() -> None:
            gate.wait()
            job()

        return submit(name, gated, *priority)

    memory.device.link.submit = submit_behind_gate


class MemoryMachine(RuleBasedStateMachine):
    """The decode thread's possible actions in any order, against real workers."""

    asynchronous = True
    cuda = False

    @initialize(host=st.integers(1, 6), device=st.integers(0, 3))
    def build(self, host: int, device: int) -> None:
        self.threads_before = threading.active_count()
        self.store = FakeStore(LAYERS, EXPERTS)
        card = FakeDriver() if self.cuda else None
        if card is not None:
            card.copy_stream.delay = 1e-3  # who does not wait for it is too early
        self.memory = self.open(host, device, card)
        self.link_gate = threading.Event()  # copies wait for it
        self.link_gate.set()
        if self.memory.accelerator is not None:
            hold_copies(self.memory, self.link_gate)
        self.values = np.zeros(TOTAL)
        self.broke = False
        self.pinned: list[tuple[object, int]] = []

    def open(self, host: int, device: int, card: FakeDriver | None) -> Memory | HostMemory:
        return Memory(self.store, host, device, self.asynchronous, card)

    def retention(self, tier: str) -> np.ndarray:
        return self.values

    @rule(order=some_order)
    def change_minds(self, order: list[int]) -> None:
        self.values = np.array(order, dtype=float)

    @rule(host=some_order, device=some_order)
    def follow(self, host: list[int], device: list[int]) -> None:
        self.memory.follow(
            Plan(np.array(host[:5]), np.array(device[:3]) if self.memory.accelerator else Plan().host)
        )

    @rule()
    def pump(self) -> None:
        self.memory.pump(self.retention)

    @rule(expert=some_expert)
    def demand_host(self, expert: int) -> None:
        if not self.memory.host.ready[expert]:
            self.memory.demand_host(expert, self.retention)

    @precondition(lambda self: self.memory.accelerator is not None)
    @rule(expert=some_expert)
    def demand_accelerator(self, expert: int) -> None:
        if not self.memory.accelerator.ready[expert]:
            self.memory.demand_accelerator(expert, self.retention)

    @rule(layer=st.integers(0, LAYERS - 1), active=st.sets(st.integers(0, EXPERTS - 1)))
    def start_layer(self, layer: int, active: set[int]) -> None:
        self.memory.start_layer(layer, on_host([layer * EXPERTS + e for e in active]))

    @rule(expert=some_expert)
    def pin(self, expert: int) -> None:
        for tier in self.memory.tiers:
            if tier.ready[expert] and len(self.pinned) < 2:
                tier.pin(expert)
                self.pinned.append((tier, expert))

    @rule()
    def release(self) -> None:
        if self.pinned:
            tier, expert = self.pinned.pop()
            tier.release(expert)

    @precondition(lambda self: self.memory.accelerator is not None)
    @rule(expert=some_expert)
    def copy(self, expert: int) -> None:
        """Read first, then left on its way to the accelerator: by chance this comes together too seldom."""
        self.quiesce()
        if not self.memory.host.ready[expert]:
            self.memory.demand_host(expert, self.retention)
            self.quiesce()
        if self.memory.host.ready[expert] and not self.memory.accelerator.ready[expert]:
            self.memory.demand_accelerator(expert, self.retention)

    @precondition(lambda self: self.memory.accelerator is not None and self.memory.accelerator.slots > 1)
    @rule(slots=st.integers(1, 2))
    def shrink(self, slots: int) -> None:
        """Memory ran out: between passes, so nothing is pinned."""
        tier = self.memory.accelerator
        while self.pinned:
            self.release()
        self.store.gate.set()
        self.link_gate.set()
        self.memory.quiesce()
        before = set(np.flatnonzero(tier.ready).tolist())
        slots = min(slots, tier.slots - 1)
        self.memory.shrink(slots, self.retention)
        assert (
            tier.slots == slots == self.memory.residency.capacity.accelerator == len(self.memory.device.arena)
        )
        kept = set(np.flatnonzero(tier.ready).tolist())
        assert kept <= before and len(kept) == (min(slots, len(before)) if self.memory.device.keeps else 0)
        gone = before - kept
        assert not self.memory.device.keeps or all(
            self.values[g] <= self.values[k] for g in gone for k in kept
        )

    @rule(expert=some_expert)
    def break_disk(self, expert: int) -> None:
        self.store.failing.add(expert)
        self.broke = True

    @rule()
    def mend_disk(self) -> None:
        self.store.failing.clear()

    @rule()
    def block_disk(self) -> None:
        if self.asynchronous:  # the synchronous twin would wait for itself
            self.store.gate.clear()

    @rule()
    def unblock_disk(self) -> None:
        self.store.gate.set()

    @rule()
    def block_link(self) -> None:
        if self.asynchronous:
            self.link_gate.clear()

    @rule()
    def unblock_link(self) -> None:
        self.link_gate.set()

    @rule()
    def settle(self) -> None:
        try:
            self.memory.settle()
        except StorageError as error:
            assert self.broke  # mended since, perhaps: the read failed before
            assert "check the disk" in str(error)

    @rule()
    def quiesce(self) -> None:
        self.store.gate.set()
        self.link_gate.set()
        self.memory.quiesce()
        assert not any(tier.filling.any() for tier in self.memory.tiers)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check_integrity()

    @invariant()
    def ready_records_hold_their_expert(self) -> None:
        if hasattr(self, "memory"):
            for tier in self.memory.tiers:
                for expert in np.flatnonzero(tier.ready):
                    assert (self.memory.record(tier, expert) == self.store.pattern(expert)).all()

    @invariant()
    def pinned_records_stay(self) -> None:
        for tier, expert in getattr(self, "pinned", []):
            assert tier.ready[expert]

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.store.gate.set()
            self.link_gate.set()
            self.memory.close()
            assert threading.active_count() == self.threads_before, "no thread outlives close()"


class SynchronousMachine(MemoryMachine):
    asynchronous = False


class CudaMachine(MemoryMachine):
    cuda = True


class SynchronousCudaMachine(CudaMachine):
    asynchronous = False


class NativeMachine(MemoryMachine):
    def open(self, host: int, device: int, card: FakeDriver | None) -> HostMemory:
        return HostMemory(self.store, host)


CALM = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAsynchronous = MemoryMachine.TestCase
TestAsynchronous.settings = CALM
TestSynchronous = SynchronousMachine.TestCase
TestSynchronous.settings = CALM
TestCuda = CudaMachine.TestCase
TestCuda.settings = CALM
TestSynchronousCuda = SynchronousCudaMachine.TestCase
TestSynchronousCuda.settings = CALM
if load_library() is not None:
    TestNative = NativeMachine.TestCase
    TestNative.settings = CALM


needs_library = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")
either = pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_library)])


def on_host(experts: list[int]) -> Placement:
    return Placement(np.array(experts, dtype=np.int64))


def ranks(tier: str) -> np.ndarray:
    return np.arange(TOTAL, dtype=float)


@pytest.fixture(params=["asynchronous", "synchronous", pytest.param("native", marks=needs_library)])
def memory(request):
    store = FakeStore(LAYERS, EXPERTS)
    if request.param == "native":
        memory = HostMemory(store, host=2)
    else:
        memory = Memory(store, host=2, device=1, asynchronous=request.param == "asynchronous")
    yield memory
    memory.close()


def six_slots(store: FakeStore, native: bool, readers: int) -> Memory | HostMemory:
    return HostMemory(store, 6, readers) if native else Memory(store, 6, 0, True, readers=readers)


def test_prefetch_never_evicts_what_is_worth_more(memory) -> None:
    for expert in (10, 11):
        memory.demand_host(expert, ranks)
    memory.quiesce()
    memory.follow(Plan(np.array([3, 4])))
    memory.pump(ranks)
    memory.quiesce()
    assert np.flatnonzero(memory.host.ready).tolist() == [10, 11]


def test_demand_evicts_the_least_retained(memory) -> None:
    for expert in (4, 9):
        memory.demand_host(expert, ranks)
    memory.quiesce()
    assert memory.demand_host(0, ranks)
    memory.quiesce()
    assert np.flatnonzero(memory.host.ready).tolist() == [0, 9]


def test_a_demand_evicts_even_what_is_kept_for_ever(memory) -> None:
    """Static policies keep their set with infinite value; a layer that needs a slot must still get one."""

    def for_ever(tier: str) -> np.ndarray:
        return np.full(TOTAL, np.inf)

    for expert in (4, 9, 0):
        assert memory.demand_host(expert, for_ever)
        memory.quiesce()
    assert memory.host.ready[0]


def test_a_read_error_is_retried_then_typed(memory) -> None:
    memory.store.failing.add(5)
    memory.demand_host(5, ranks)
    with pytest.raises(StorageError, match=r"expert 1 of MoE layer 1 failed 2 times"):
        while memory.host.filling[5]:
            memory.settle()
    assert memory.store.reads.count(5) == 2
    memory.store.failing.clear()
    memory.demand_host(5, ranks)
    memory.quiesce()
    assert memory.host.ready[5]


@needs_library
def test_a_read_that_fails_twice_before_anybody_hears_of_it() -> None:
    """As in a pass that runs natively: it is read again, and fails again."""
    memory = HostMemory(FakeStore(LAYERS, EXPERTS), host=2)
    memory.store.failing.add(5)
    for _ in range(2):
        memory.demand_host(5, ranks)
        while memory.host.filling[5]:
            memory._library.moespac_memory_settle(memory.address)
    with pytest.raises(StorageError, match=r"expert 1 of MoE layer 1 failed"):
        memory.settle()
    memory.store.failing.clear()
    memory.demand_host(5, ranks)
    memory.quiesce()
    assert memory.host.ready[5]
    memory.close()


@either
def test_a_demand_overtakes_queued_prefetches(native: bool) -> None:
    store = FakeStore(LAYERS, EXPERTS)
    memory = six_slots(store, native, readers=1)
    store.gate.clear()
    memory.follow(Plan(np.array([1, 2, 3])))
    memory.pump(ranks)
    while not store.reads:  # the reader has taken one, the others wait in the queue
        time.sleep(1e-3)
    memory.demand_host(8, ranks)
    store.gate.set()
    memory.quiesce()
    memory.close()
    assert store.reads == [1, 8, 2, 3]


@needs_library
def test_what_routers_foresee_is_read_first_and_kept() -> None:
    """While layer 0 runs, layer 1 (experts 4 to 7) was foreseen: 5 and 7 are read before what was planned, and what
    is likely there stays, whatever the plan thought of it."""
    store = FakeStore(LAYERS, EXPERTS)
    memory = HostMemory(store, host=4, readers=1)
    for expert in (4, 6, 8, 9):
        memory.demand_host(expert, ranks)
    memory.quiesce()
    store.reads.clear()
    foresight = NativeForesight(Foresight(ForesightConfig()), store.shape)
    order = PassOrder(PassRetention(np.zeros(TOTAL), ranks("host") / TOTAL, 2.0), foresight)
    foresight.worth[4:8] = 0.9, 0.8, 0.1, 0.7
    foresight._soon[:2] = 5, 7
    foresight._foresight.end_soon, foresight._foresight.end = 2, 8
    memory.follow(Plan(np.array([10, 11])))
    memory._library.moespac_memory_pump(memory.address, order.address, 0)
    memory.quiesce()
    memory.close()
    assert store.reads[:2] == [5, 7]
    assert np.flatnonzero(memory.host.ready).tolist() == [4, 5, 7, 10], "6, 8 and 9 made way"


@either
def test_a_useless_prefetch_is_dropped_from_the_queue(native: bool) -> None:
    store = FakeStore(LAYERS, EXPERTS)
    memory = six_slots(store, native, readers=2)
    store.gate.clear()
    memory.follow(Plan(np.array([8, 9, 1])))
    memory.pump(ranks)
    while len(store.reads) < 2:  # both readers are busy with the first two
        time.sleep(1e-3)
    memory.start_layer(0, on_host([2]))
    store.gate.set()
    memory.quiesce()
    memory.close()
    assert 1 not in store.reads
    assert not memory.host.ready[1]


def test_the_source_of_a_copy_stays_until_the_copy_is_done() -> None:
    memory = Memory(FakeStore(LAYERS, EXPERTS), host=1, device=1, asynchronous=True)
    gate = threading.Event()
    hold_copies(memory, gate)
    memory.demand_host(0, ranks)
    memory.quiesce()
    assert memory.demand_accelerator(0, ranks)
    assert not memory.demand_host(7, ranks), "the only slot is being copied from"
    gate.set()
    memory.quiesce()
    assert memory.demand_host(7, ranks)
    memory.quiesce()
    assert (memory.record(memory.accelerator, 0) == FakeStore.pattern(0)).all()
    memory.close()


def test_a_new_plan_takes_back_copies_that_nobody_has_begun() -> None:
    memory = Memory(FakeStore(LAYERS, EXPERTS), host=6, device=3, asynchronous=True)
    for expert in (0, 1, 2):
        memory.demand_host(expert, ranks)
    memory.quiesce()
    gate = threading.Event()
    hold_copies(memory, gate)
    memory.follow(Plan(accelerator=np.array([2, 1, 0])))
    memory.pump(ranks)
    assert memory.accelerator.filling[[0, 1, 2]].all() and memory.copying
    while not memory._flights["accelerator", 2].ticket._taken:
        time.sleep(1e-3)
    memory.follow(Plan(accelerator=np.array([1])))
    assert memory.accelerator.filling[[0, 1, 2]].tolist() == [False, True, True], (
        "2 has begun, 1 is still wanted"
    )
    memory.check_integrity()
    gate.set()
    memory.quiesce()
    assert not memory.copying
    assert np.flatnonzero(memory.accelerator.ready).tolist() == [1, 2]
    assert not memory.host._pins.any()
    memory.close()


@needs_library
@settings(CALM, derandomize=True)
@given(
    host=st.integers(1, 6),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("demand"), some_expert),
            st.tuples(st.just("follow"), st.lists(some_expert, unique=True, max_size=5)),
            st.tuples(st.just("layer"), st.lists(some_expert, max_size=3), st.integers(0, LAYERS - 1)),
            st.tuples(st.just("order"), some_order),
        ),
        max_size=30,
    ),
)
def test_native_books_decide_as_their_twin(host: int, steps: list[tuple]) -> None:
    """One thing after the other; what is in flight at the same time is up to the disk."""
    twins = [HostMemory(FakeStore(LAYERS, EXPERTS), host), Memory(FakeStore(LAYERS, EXPERTS), host, 0, False)]
    order = np.zeros(TOTAL)
    for what, given_, *more in steps:
        if what == "order":
            order = np.array(given_, dtype=float)
        for memory in twins:
            take_step(memory, what, given_, more, order)
        native, python = (memory.host for memory in twins)
        assert set(np.flatnonzero(native.ready)) == set(np.flatnonzero(python.ready)), what
        assert native.peak_slots == python.peak_slots
    for memory in twins:
        memory.check_integrity()
        memory.close()


def take_step(memory: Memory | HostMemory, what: str, given_: Any, more: list, order: np.ndarray) -> None:
    """... and wait for all that it sets going."""
    if what == "demand" and not memory.host.ready[given_]:
        memory.demand_host(given_, lambda tier: order)
    elif what == "follow":
        memory.follow(Plan(np.array(given_, dtype=np.int64)))
    elif what == "layer":  # with a plan before it, which it cuts, and something to add
        memory.follow(Plan(np.arange(TOTAL)[:: 1 + len(given_)]))
        memory.start_layer(more[0], Placement(NO_IDS, prefetch=Plan(np.array(given_, dtype=np.int64))))
    memory.quiesce()
    while memory.moves:
        memory.pump(lambda tier: order)
        memory.quiesce()
