"""Virtual workers with a priority queue, as ``moespac.experts.workers`` has real ones."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from moespac.sim.clock import Action, VirtualBell, VirtualClock
from moespac.timeline import Record

Job = Callable[[Action], None]  # begins the work, and has the given action called when it is complete

_DEMAND, _SPECULATIVE = 0, 1


class VirtualTicket:
    """``schedule.ports.Ticket``: nothing fails in virtual time."""

    __slots__ = ("_hurry", "done", "error", "job", "name", "seconds", "taken")

    def __init__(self, name: str, job: Job, hurry: Callable[[VirtualTicket], None]) -> None:
        self.name = name
        self.job = job
        self.taken = False
        self.done = False
        self.error: Exception | None = None
        self.seconds = 0.0
        self._hurry = hurry

    def cancel(self) -> bool:
        """Take the job back if nobody has begun it; True when it will never run."""
        if self.taken:
            return False
        self.taken = self.done = True
        return True

    def hurry(self) -> None:
        """The job was speculative and is needed now: it goes ahead of all that are not."""
        if not self.done:
            self._hurry(self)


class VirtualWorkers:
    """``workers`` of them serve one queue; the bell rings after each job.

    With 0 a job takes the deciding thread's own time and its ticket is born done: the synchronous twin.
    """

    def __init__(
        self, lane: str, workers: int, clock: VirtualClock, bell: VirtualBell, record: Record
    ) -> None:
        self._clock = clock
        self._bell = bell
        self._record = record
        self._synchronous = workers == 0
        self._idle = [lane if workers < 2 else f"{lane} {i}" for i in range(max(workers, 1), 0, -1)]
        self._queue: list[tuple[int, int, VirtualTicket]] = []
        self._order = itertools.count()  # first come, first served within a priority

    def submit(self, name: str, job: Job, speculative: bool = False) -> VirtualTicket:
        ticket = VirtualTicket(name, job, self._queue_first)
        self._push(ticket, _SPECULATIVE if speculative else _DEMAND)
        while self._synchronous and not ticket.done:
            self._clock.step()
        return ticket

    def _queue_first(self, ticket: VirtualTicket) -> None:
        """Queue it once more, in front; whoever takes it out second finds it taken and skips it."""
        self._push(ticket, _DEMAND)

    def _push(self, ticket: VirtualTicket, priority: int) -> None:
        heapq.heappush(self._queue, (priority, next(self._order), ticket))
        self._serve()

    def _serve(self) -> None:
        while self._idle and self._queue:
            _, _, ticket = heapq.heappop(self._queue)
            if not ticket.taken:
                ticket.taken = True
                self._begin(ticket, self._idle.pop())

    def _begin(self, ticket: VirtualTicket, lane: str) -> None:
        start = self._clock.now()

        def complete() -> None:
            ticket.seconds = self._clock.now() - start
            ticket.done = True
            self._record(lane, ticket.name, start, ticket.seconds)
            self._idle.append(lane)
            self._serve()
            self._bell.ring()

        ticket.job(complete)
