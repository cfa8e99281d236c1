"""Jobs on a device: the tickets that events complete, and the threads that wait for events.

A job is an interval between two events of one stream. Its ticket is done when the device has passed the second, and
its seconds are the device's own: neither Python nor a thread that woke up late is in them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from moespac.experts.cuda.driver import Driver, Event
from moespac.experts.workers import Bell
from moespac.timeline import Tape


class Interval(NamedTuple):
    start: Event
    end: Event


class EventPool:
    """Intervals, made once and used again: creating an event costs as much as copying a small record."""

    def __init__(self, driver: Driver, intervals: int) -> None:
        self._driver = driver
        self._free = deque(self._new() for _ in range(intervals))

    def take(self) -> Interval:
        try:
            return self._free.popleft()
        except IndexError:  # more jobs in flight than ever before
            return self._new()

    def give(self, interval: Interval) -> None:
        self._free.append(interval)

    def _new(self) -> Interval:
        return Interval(self._driver.event(), self._driver.event())


class DeviceTicket:
    """``schedule.ports.Ticket`` of a job on a device."""

    __slots__ = ("_done", "_interval", "_lock", "_taken", "error", "name", "queue_first", "seconds")

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None
        self.seconds = 0.0
        self.queue_first: Callable[[], None] | None = None  # None where jobs do not queue
        self._lock = threading.Lock()
        self._taken = False
        self._done = False
        self._interval: Interval | None = None

    @property
    def done(self) -> bool:
        """Asks the device: who looks in time need not wait for the thread that is woken."""
        if self._done:
            return True
        with self._lock:
            if self._interval is not None and not self._done:
                self._look(self._interval)
            return self._done

    def cancel(self) -> bool:
        """Take the job back if it is not on the device's stream yet; True when it will never run."""
        if not self.take():
            return False
        self._done = True
        return True

    def hurry(self) -> None:
        """The job was speculative and is needed now: it goes ahead of all that are not."""
        if self.queue_first is not None and not self._taken:
            self.queue_first()

    def take(self) -> bool:
        """Begin the job; False when somebody has, or when it was cancelled."""
        with self._lock:
            taken, self._taken = self._taken, True
            return not taken

    def submitted(self, interval: Interval) -> None:
        """Both events are on the stream."""
        with self._lock:
            self._interval = interval

    def fail(self, error: Exception) -> None:
        """The job never reached the device."""
        self.error = error
        self._done = True

    def wait(self) -> Interval:
        """Until the device has passed the end; returns the events, which are nobody's then."""
        interval = self._interval
        assert interval is not None
        try:
            interval.end.synchronize()
        except Exception as error:  # the device failed: carried to the thread that asked for the job
            self.error = self.error or error
        with self._lock:
            if not self._done:
                self._look(interval)
            self._done = True
            self._interval = None
        return interval

    def _look(self, interval: Interval) -> None:
        try:
            if not interval.end.query():
                return
            self.seconds = interval.start.elapsed_time(interval.end) / 1e3
        except Exception as error:
            self.error = self.error or error
        self._done = True


class Watcher:
    """Waits for jobs of one stream, in the order in which they lie there, and rings the bell after each.

    It asks the device at any moment, which CUDA forbids while another thread captures a graph in the default mode:
    captures are to be made with ``capture_error_mode="thread_local"``.
    """

    def __init__(self, lane: str, events: EventPool, bell: Bell, tape: Tape, asynchronous: bool) -> None:
        """Not ``asynchronous``: ``watch`` itself waits."""
        self._lane = lane
        self._events = events
        self._bell = bell
        self._tape = tape
        self._condition = threading.Condition()
        self._jobs: deque[DeviceTicket] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None
        if asynchronous:
            self._thread = threading.Thread(target=self._serve, name=f"moespac {lane}", daemon=True)
            self._thread.start()

    def watch(self, ticket: DeviceTicket) -> None:
        """``ticket`` was submitted, behind all that are watched already."""
        if self._thread is None:
            self._see_through(ticket)
            return
        with self._condition:
            assert not self._closed, "no job after close"
            self._jobs.append(ticket)
            self._condition.notify()

    def close(self) -> None:
        """Returns when all jobs are done and no thread is left."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                ticket = self._jobs.popleft()
            self._see_through(ticket)

    def _see_through(self, ticket: DeviceTicket) -> None:
        self._events.give(ticket.wait())
        announce(ticket, self._lane, self._tape, self._bell)


def announce(ticket: DeviceTicket, lane: str, tape: Tape, bell: Bell) -> None:
    """Tell the timeline and the deciding thread; it ended just now, as the host sees it."""
    tape(lane, ticket.name, time.perf_counter() - ticket.seconds, ticket.seconds)
    bell.ring()
