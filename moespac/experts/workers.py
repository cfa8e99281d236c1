"""Threads that move or compute, and the tickets that say when a job is done.

``Workers(threads=0)`` is the synchronous twin: a job runs where it is submitted, its ticket is born done.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from enum import IntEnum

import torch

from moespac.timeline import Tape


class Priority(IntEnum):
    """A read that a layer waits for goes ahead of every speculative one."""

    DEMAND = 0
    SPECULATIVE = 1


class Bell:
    """Rings whenever any job is done, so that one thread can wait for whichever comes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rings = 0

    def ring(self) -> None:
        with self._condition:
            self._rings += 1
            self._condition.notify_all()

    def count(self) -> int:
        with self._condition:
            return self._rings

    def wait_beyond(self, count: int) -> None:
        """Return once it has rung more than ``count`` times."""
        with self._condition:
            self._condition.wait_for(lambda: self._rings > count)


class Ticket:
    """One job in flight. ``done`` once it ran (then ``error`` and ``seconds`` are final) or was cancelled."""

    __slots__ = (
        "_clock",
        "_job",
        "_lock",
        "_queue_first",
        "_taken",
        "done",
        "error",
        "name",
        "seconds",
        "start",
    )

    def __init__(
        self,
        name: str,
        job: Callable[[], object],
        clock: Callable[[], float],
        queue_first: Callable[[Ticket], None],
    ) -> None:
        self.name = name
        self._job = job
        self._clock = clock
        self._queue_first = queue_first
        self._lock = threading.Lock()
        self._taken = False
        self.done = False
        self.error: Exception | None = None
        self.start = 0.0
        self.seconds = 0.0

    def cancel(self) -> bool:
        """Take the job back if no worker has begun it; True when it will never run."""
        if not self._take():
            return False
        self.done = True
        return True

    def hurry(self) -> None:
        """The job was speculative and is needed now: it goes ahead of all that are not."""
        if not self.done:
            self._queue_first(self)

    def run(self) -> bool:
        """Run the job unless another worker or ``cancel`` took it; True when it ran here."""
        if not self._take():
            return False
        self.start = self._clock()
        try:
            self._job()
        except Exception as error:  # carried to the thread that asked for the job
            self.error = error
        self.seconds = self._clock() - self.start
        self.done = True
        return True

    def _take(self) -> bool:
        with self._lock:
            taken, self._taken = self._taken, True
            return not taken


class Workers:
    """``threads`` daemon threads that serve one priority queue; ``bell`` rings after each job.

    Each thread is a lane of the timeline.
    """

    def __init__(
        self,
        lane: str,
        threads: int,
        bell: Bell,
        clock: Callable[[], float] = time.perf_counter,
        tape: Tape | None = None,
    ) -> None:
        self._tape = tape or Tape()
        self._lane = lane
        self._bell = bell
        self._clock = clock
        self._queue: list[tuple[Priority, int, Ticket]] = []
        self._order = itertools.count()  # first come, first served within a priority
        self._condition = threading.Condition()
        self._closed = False
        lanes = [lane] if threads == 1 else [f"{lane} {i}" for i in range(1, threads + 1)]
        self._threads = [
            threading.Thread(target=self._serve, args=[lane], name=f"moespac {lane}", daemon=True)
            for lane in lanes[:threads]
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, job: Callable[[], object], priority: Priority = Priority.DEMAND) -> Ticket:
        """``name`` is what the timeline shows."""
        ticket = Ticket(name, job, self._clock, self._queue_first)
        if not self._threads:
            self._run(ticket, self._lane)
            return ticket
        self._push(ticket, priority)
        return ticket

    def close(self) -> None:
        """Stop after the jobs that are running; queued ones are cancelled. Returns when no thread is left."""
        with self._condition:
            self._closed = True
            for _, _, ticket in self._queue:
                ticket.cancel()
            self._queue.clear()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _queue_first(self, ticket: Ticket) -> None:
        """Queue it once more, in front; whoever takes it out second finds it taken and skips it."""
        self._push(ticket, Priority.DEMAND)

    def _push(self, ticket: Ticket, priority: Priority) -> None:
        with self._condition:
            assert not self._closed, "no job after close"
            heapq.heappush(self._queue, (priority, next(self._order), ticket))
            self._condition.notify()

    @torch.inference_mode()  # the mode is per thread, and workers write into the decode thread's tensors
    def _serve(self, lane: str) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                _, _, ticket = heapq.heappop(self._queue)
            self._run(ticket, lane)

    def _run(self, ticket: Ticket, lane: str) -> None:
        if ticket.run():
            self._tape(lane, ticket.name, ticket.start, ticket.seconds)
            self._bell.ring()
