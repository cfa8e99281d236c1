"""A CUDA card as an accelerator: copies on their own stream, computing on the trunk's, events between them.

Computing runs on the stream that is current where it is asked for, the trunk's: what it reads of the trunk (hidden
states) and what the join reads of it are in order without an event, and no tensor crosses streams, so the allocator
need not be told. A second stream would gain nothing, since the trunk has nothing to do while its experts run.
Nothing here waits for the whole device but ``shrink`` and ``close``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moespac.experts.cuda.arena import DeviceArena
from moespac.experts.cuda.copies import CopyQueue
from moespac.experts.cuda.driver import Driver
from moespac.experts.cuda.page_lock import PageLock
from moespac.experts.cuda.tickets import DeviceTicket, EventPool, Watcher
from moespac.experts.workers import Bell, Priority
from moespac.schedule.tiers import Move
from moespac.timeline import ACCELERATOR, Tape

_JOBS_IN_FLIGHT = (
    8  # event pairs made at the start; a layer has one to three jobs, and two copies run beside them
)


class CudaAccelerator:
    """Implements ``accelerator.Accelerator``. Not ``asynchronous``: every ticket is born done."""

    in_order = True
    stands_in = False

    def __init__(
        self,
        driver: Driver,
        arena: DeviceArena,
        lock: PageLock,
        bell: Bell,
        asynchronous: bool,
        copies_ahead: int,
        tape: Tape | None = None,
    ) -> None:
        tape = tape or Tape()
        self.device = driver.device
        self.keeps = arena.keeps
        self._driver = driver
        self._arena = arena
        self._lock = lock
        self._rows = list(arena.records)  # views made once: indexing a tensor costs as much as putting a copy
        self._events = EventPool(driver, _JOBS_IN_FLIGHT)
        self.link = CopyQueue(driver, lock, self._events, bell, tape, copies_ahead, asynchronous)
        self._computing = Watcher(ACCELERATOR, self._events, bell, tape, asynchronous)

    @property
    def arena(self) -> torch.Tensor:
        return self._arena.records

    @property
    def page_locked(self) -> float:
        return self._lock.share

    def copy_in(self, name: str, source: torch.Tensor, slot: int, priority: Priority) -> DeviceTicket:
        return self.link.submit(name, source, self._rows[slot], priority)

    def compute(self, name: str, job: Callable[[], object]) -> DeviceTicket:
        """Launches here and now. Where that fails, the ticket says so once what was launched before it is over."""
        ticket, interval, stream = DeviceTicket(name), self._events.take(), self._driver.current_stream()
        interval.start.record(stream)
        try:
            self._driver.run(job, stream)
        except Exception as error:  # carried to the join
            ticket.error = error
        interval.end.record(stream)
        ticket.take()
        ticket.submitted(interval)
        self._computing.watch(ticket)
        return ticket

    def shrink(self, slots: int, moves: Sequence[Move]) -> None:
        for move in moves:
            self._rows[move.target].copy_(self._rows[move.source])
        self._driver.finish()
        self._rows.clear()  # they would keep a plain arena's memory
        self._arena.shrink(slots)
        self._rows = list(self._arena.records)

    def close(self) -> None:
        self.link.close()
        self._computing.close()
        self._driver.finish()
        self._rows.clear()
        self._arena.close()
        self._lock.close()
