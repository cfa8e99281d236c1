"""A layer runs to its end whatever the placement, the sizes of the tiers and the order of arrivals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moespac.errors import StorageError
from moespac.experts.kernels.library import load_library
from moespac.experts.workers import Ticket
from moespac.schedule.jobs import Jobs
from moespac.schedule.layer import LayerRun
from moespac.schedule.stats import PassClock
from moespac.types import NO_IDS, Placement, Plan
from tests.experts.fake_cuda import FakeDriver, FakeStream
from tests.fakes import FakeStore
from tests.schedule.real_workers import HostMemory, Memory

LAYERS, EXPERTS = 2, 8
needs_library = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")
ids = st.integers(0, EXPERTS - 1)
CALM = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class CountingDevices:
    """Computes nothing, but sees to it that the bytes are the expert's, and counts."""

    def __init__(self, memory: Memory, in_order: bool = False) -> None:
        self.memory = memory
        self.in_order = in_order
        self.on_host: Counter[int] = Counter()
        self.on_accelerator: Counter[int] = Counter()

    host_threads = 2

    def compute_on_host(self, experts: np.ndarray, slots: np.ndarray) -> np.ndarray:
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            assert (self.memory.arena("host")[slot] == FakeStore.pattern(expert)).all()
            self.on_host[expert] += 1
        return np.full(len(experts), 1e-6)

    def compute_on_accelerator(self, experts: np.ndarray, slots: np.ndarray, name: str) -> Ticket:
        def job() -> None:
            for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
                assert (self.memory.arena("accelerator")[slot] == FakeStore.pattern(expert)).all()
                self.on_accelerator[expert] += 1

        return self.memory.device.compute(name, job)


@pytest.mark.parametrize("kind", ["python", "cuda", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("asynchronous", [True, False])
@CALM
@given(
    host=st.integers(1, 6),
    device=st.integers(0, 4),
    active=st.sets(ids, min_size=1),
    there=st.sets(ids),
    load=st.sets(ids),
    ahead=st.lists(st.integers(0, LAYERS * EXPERTS - 1), unique=True),
    kept_for_ever=st.sets(st.integers(0, LAYERS * EXPERTS - 1)),
    broken=st.sets(ids, max_size=1),
)
def test_every_expert_is_computed_once_where_it_was_placed(
    kind, asynchronous, host, device, active, there, load, ahead, kept_for_ever, broken
) -> None:
    store = FakeStore(LAYERS, EXPERTS)
    device = 0 if kind == "native" else device
    if kind == "native":
        memory: Memory | HostMemory = HostMemory(store, host)
    else:
        memory = Memory(store, host, device, asynchronous, FakeDriver() if kind == "cuda" else None)
    devices, jobs = CountingDevices(memory, in_order=kind == "cuda"), Jobs(memory.bell, PassClock())
    values = np.arange(LAYERS * EXPERTS, dtype=float)
    values[list(kept_for_ever)] = np.inf
    counts = np.zeros(EXPERTS, dtype=np.int64)
    counts[list(active)] = 1
    on_device = sorted(active & there) if device else []
    placement = Placement(
        host=np.array(sorted(active - set(on_device)), dtype=np.int64),
        accelerator=np.array(on_device, dtype=np.int64),
        prefetch=Plan(np.array(ahead, dtype=np.int64), np.array(ahead if device else [], dtype=np.int64)),
        load=np.array(sorted(load), dtype=np.int64) if device else NO_IDS,
    )
    run = LayerRun(memory, devices, memory._costs, PassClock(), jobs, counts, first_id=0)
    memory.start_layer(0, placement)
    store.failing = broken
    try:
        run.execute(placement, lambda tier: values)
        jobs.finish()
        assert devices.on_host == Counter(placement.host.tolist())
        assert devices.on_accelerator == Counter(placement.accelerator.tolist())
    except StorageError:
        assert broken & (active | load)
    memory.quiesce()
    memory.check_integrity()
    assert not any(tier._pins.any() for tier in memory.tiers), "nothing stays pinned"
    memory.close()


class Launching(FakeDriver):
    """Jobs fail where they are launched, if they do."""

    def run(self, job: Callable[[], object], stream: FakeStream) -> None:
        job()


class Card:
    """A layer whose experts are all on a card, which works when its gate is open."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.memory = Memory(FakeStore(LAYERS, EXPERTS), EXPERTS, EXPERTS, True, self.driver)
        self.values = np.arange(LAYERS * EXPERTS, dtype=float)
        self.devices = CountingDevices(self.memory, in_order=True)
        self.jobs = Jobs(self.memory.bell, PassClock())
        self.run_layer()
        self.jobs.finish()

    def run_layer(self) -> None:
        counts = np.ones(EXPERTS, dtype=np.int64)
        run = LayerRun(
            self.memory, self.devices, self.memory._costs, PassClock(), self.jobs, counts, first_id=0
        )
        run.execute(Placement(NO_IDS, np.arange(EXPERTS)), lambda tier: self.values)

    @property
    def pinned(self) -> int:
        return int(self.memory.accelerator._pins.sum())

    def close(self) -> None:
        self.driver.current_stream().gate.set()
        self.jobs.finish()
        self.memory.close()


def test_nobody_waits_for_a_device_that_works_in_order() -> None:
    card = Card(FakeDriver())
    card.driver.current_stream().gate.clear()
    card.run_layer()
    assert card.pinned == EXPERTS, "the job reads them still"
    card.run_layer()
    card.jobs.reap()
    assert card.pinned == 2 * EXPERTS
    card.driver.current_stream().gate.set()
    card.jobs.finish()
    assert card.pinned == 0 and card.devices.on_accelerator == Counter(dict.fromkeys(range(EXPERTS), 3))
    card.close()


def test_a_job_that_fails_is_heard_of_in_its_own_layer() -> None:
    card = Card(Launching())
    counted, card.devices.on_accelerator = card.devices.on_accelerator, None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        card.run_layer()
    assert card.pinned == 0
    card.devices.on_accelerator = counted
    card.run_layer()
    card.close()


class Flipping:
    """A ticket that becomes done while it is looked at: the second look finds it so."""

    error, seconds = None, 1e-6

    def __init__(self) -> None:
        self.looks = 0

    @property
    def done(self) -> bool:
        self.looks += 1
        return self.looks > 1


def test_a_job_that_is_done_in_between_is_not_lost() -> None:
    card = Card(FakeDriver())
    tier = card.memory.accelerator
    experts = np.arange(2)
    tier.pin_all(experts)
    card.jobs.add(Flipping(), tier, experts, 2, card.memory._costs)  # type: ignore[arg-type]
    card.jobs.reap()
    assert card.pinned == 2
    card.jobs.reap()
    assert card.pinned == 0
    card.close()
