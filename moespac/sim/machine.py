"""A hardware profile at work in virtual time: it implements ``schedule.ports``, so that the engine's own schedule
runs over it.

- Storage, as the engine chooses (``engine.build``): with an accelerator ``MemoryConfig.readers`` reads at once;
  each waits the latency, then all that are in flight share the bandwidth. Without one, one after the other in
  stripes (``sim.reads``), and reads and the host's experts slow each other down as the profile says; that the
  engine has its native kernel is assumed.
- Link: one copy at a time.
- Host: one expert at a time, on all cores, in the deciding thread, as the engine does it.
- The host's memory is shared by the host's experts and the copies that read from it; with an accelerator, what
  reads from storage take of it is left out.
- Accelerator: one job after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from moespac.config import MemoryConfig
from moespac.schedule.ports import Mover
from moespac.sim.clock import Action, PacedClock, SharedResource, VirtualBell, VirtualClock
from moespac.sim.hardware import HardwareProfile
from moespac.sim.reads import StripedReads
from moespac.sim.shapes import SimModel
from moespac.sim.workers import Job, VirtualTicket, VirtualWorkers
from moespac.timeline import ACCELERATOR, LINK, STORAGE, Record, expert_name

_HOST, _LINK, _STORAGE = "host", "link", "storage"  # who shares a resource


class Machine:
    """One machine that runs one model."""

    def __init__(
        self,
        hardware: HardwareProfile,
        model: SimModel,
        config: MemoryConfig,
        host_only: bool,
        record: Record,
    ) -> None:
        """``host_only``: no accelerator holds experts. ``record`` is told transfers and the accelerator's jobs."""
        self.clock = clock = VirtualClock()
        self.bell = bell = VirtualBell(clock)
        self.expert_host_seconds = cache(partial(hardware.expert_host_seconds, model))
        self.expert_accelerator_seconds = cache(partial(hardware.expert_accelerator_seconds, model))
        self._hardware = hardware
        self._model = model
        self._host_memory = SharedResource(clock, self._memory_speed)
        self._storage = SharedResource(clock, lambda user, users: 1 / len(users))
        self._rates = hardware.rates_together()
        self._alone = host_only and config.asynchronous  # the host's experts and reads, with no copies
        self._host_time, self._disk_time = PacedClock(clock), PacedClock(clock)

        readers = config.readers if config.asynchronous else 0
        single = 1 if config.asynchronous else 0
        self.reader: Mover
        if self._alone:
            time = self._disk_time
            self.reader = StripedReads(
                hardware, model.expert_bytes, model.experts, config, time, bell, record, self._disk_turned
            )
        else:
            workers = VirtualWorkers(STORAGE, readers, clock, bell, record)
            self.reader = VirtualMover(workers, self._read, model.experts, sharing=config.readers)
        self.link = VirtualMover(VirtualWorkers(LINK, single, clock, bell, record), self._copy, model.experts)
        self.jobs = VirtualWorkers(ACCELERATOR, single, clock, bell, record)

    def run_dense(self, seconds: float) -> None:
        """Trunk or draft model: the deciding thread waits for it."""
        self.clock.sleep(seconds)

    def run_on_host(self, seconds: float) -> float:
        """One expert that takes ``seconds`` while it has the host's memory to itself; returns what it takes."""
        if not self._alone:
            return self.clock.wait_for(lambda done: self._host_memory.work(_HOST, seconds, done))
        self._disk_time.pace = 1 - self._hardware.storage_slowdown
        spent = self.clock.wait_for(lambda done: self._host_time.after(seconds, done))
        self._disk_time.pace = 1.0
        return spent

    def _disk_turned(self, works: bool) -> None:
        self._host_time.pace = 1 - self._hardware.expert_slowdown if works else 1.0

    def _read(self, done: Action) -> None:
        latency = self._hardware.storage_latency
        seconds = self._hardware.storage_seconds(self._model.expert_bytes) - latency
        self.clock.after(latency, lambda: self._storage.work(_STORAGE, seconds, done))

    def _copy(self, done: Action) -> None:
        latency = self._hardware.link_latency
        seconds = self._hardware.link_seconds(self._model.expert_bytes) - latency
        self.clock.after(latency, lambda: self._host_memory.work(_LINK, seconds, done))

    def _memory_speed(self, user: str, users: Sequence[str]) -> float:
        """Never more than one of either: host experts and copies each come one at a time."""
        if len(users) == 1:
            return 1.0
        return self._rates.host if user == _HOST else self._rates.link


class VirtualMover:
    """``schedule.ports.Mover``: each transfer takes the time that ``transfer`` takes."""

    def __init__(self, workers: VirtualWorkers, transfer: Job, experts: int, sharing: int = 1) -> None:
        self.sharing = sharing
        self._workers = workers
        self._transfer = transfer
        self._experts = experts

    def move(self, expert: int, slot: int, source_slot: int | None, speculative: bool) -> VirtualTicket:
        return self._workers.submit(expert_name(expert, self._experts), self._transfer, speculative)

    def close(self) -> None:
        """Virtual workers need no stopping."""


class LayerDevices:
    """``schedule.ports.Devices`` for one layer in one pass; ``counts`` (experts,) tokens of each."""

    host_threads = 1
    in_order = False  # virtual time goes on only where somebody waits

    def __init__(self, machine: Machine, counts: NDArray[np.int64], first_id: int) -> None:
        self._machine = machine
        self._counts = counts
        self._first_id = first_id

    def compute_on_host(self, experts: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
        """One after the other: the profile's seconds are those of all threads together."""
        machine = self._machine
        return np.array([machine.run_on_host(machine.expert_host_seconds(n)) for n in self._tokens(experts)])

    def compute_on_accelerator(
        self, experts: NDArray[np.int64], slots: NDArray[np.int64], name: str
    ) -> VirtualTicket:
        machine = self._machine
        seconds = sum(machine.expert_accelerator_seconds(n) for n in self._tokens(experts))
        return machine.jobs.submit(name, lambda done: machine.clock.after(seconds, done))

    def _tokens(self, experts: NDArray[np.int64]) -> list[int]:
        return self._counts[experts - self._first_id].tolist()
