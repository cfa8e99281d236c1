"""host -> device: few copies on the stream, the rest in a queue where a demand still overtakes a prefetch.

What is on a stream can be neither reordered nor taken back. So only ``ahead`` copies are put there: one that runs
and one behind it, so that the link does not idle while a thread wakes up to put the next.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moespac.experts.cuda.driver import Driver
from moespac.experts.cuda.page_lock import PageLock
from moespac.experts.cuda.tickets import DeviceTicket, EventPool, announce
from moespac.experts.workers import Bell, Priority
from moespac.timeline import LINK, Tape


class _Copy(NamedTuple):
    ticket: DeviceTicket
    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class _Running:
    ticket: DeviceTicket
    staging: torch.Tensor | None  # the buffer that it reads, free again when it is done


class CopyQueue:
    """The link. From page-locked memory the caller itself puts a copy on the stream; what is not page-locked is
    brought into a page-locked buffer by the thread, so that the caller never waits for host memory."""

    def __init__(
        self,
        driver: Driver,
        lock: PageLock,
        events: EventPool,
        bell: Bell,
        tape: Tape,
        ahead: int,
        asynchronous: bool,
    ) -> None:
        self._driver = driver
        self._page_lock = lock
        self._events = events
        self._bell = bell
        self._tape = tape
        self._ahead = ahead
        self._condition = threading.Condition()
        self._queue: list[tuple[Priority, int, _Copy]] = []
        self._order = itertools.count()  # first come, first served within a priority
        self._running: deque[_Running] = deque()  # on the stream, in its order
        self._being_staged = 0
        self._buffers = lock.staging(ahead)
        self._closed = False
        self._thread: threading.Thread | None = None
        if asynchronous:
            self._thread = threading.Thread(target=self._serve, name=f"moespac {LINK}", daemon=True)
            self._thread.start()

    def submit(
        self, name: str, source: torch.Tensor, target: torch.Tensor, priority: Priority
    ) -> DeviceTicket:
        """source (record_bytes,) in host memory, target (record_bytes,) on the device."""
        ticket = DeviceTicket(name)
        copy = _Copy(ticket, source, target)
        ticket.queue_first = lambda: self._push(copy, Priority.DEMAND)
        self._push(copy, priority)
        if self._thread is None:
            while self._running or self._queue:
                self._turn()
        return ticket

    def close(self) -> None:
        """Wait for the copies on the stream; queued ones are cancelled. Returns when no thread is left."""
        with self._condition:
            self._closed = True
            for _, _, copy in self._queue:
                copy.ticket.cancel()
            self._queue.clear()
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _push(self, copy: _Copy, priority: Priority) -> None:
        """Twice for a copy that hurries: whoever takes it out second finds it taken and skips it."""
        with self._condition:
            assert not self._closed, "no copy after close"
            heapq.heappush(self._queue, (priority, next(self._order), copy))
            self._put_locked()
            self._condition.notify()

    @torch.inference_mode()  # the mode is per thread, and the arena may be an inference tensor
    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._running or self._queue or self._closed)
                if self._closed and not self._running:
                    return
            self._turn()

    def _turn(self) -> None:
        """Put what may be put, wait for the copy that ends next, and put the next before telling anybody."""
        self._put_staged()
        with self._condition:
            first = self._running[0] if self._running else None
        if first is None:
            return
        interval = first.ticket.wait()
        with self._condition:
            self._running.popleft()
            self._events.give(interval)
            if first.staging is not None:
                self._buffers.append(first.staging)
            self._put_locked()
        announce(first.ticket, LINK, self._tape, self._bell)

    def _put_locked(self) -> None:
        """Put page-locked records on the stream while few are there. The condition is held."""
        while (copy := self._next()) is not None and self._page_lock.covers(copy.source):
            heapq.heappop(self._queue)
            if copy.ticket.take():
                self._put(copy, copy.source, None)

    def _put_staged(self) -> None:
        """The same for all records, by way of a buffer. On the thread only, the condition free while bytes move."""
        while True:
            with self._condition:
                self._put_locked()
                copy = self._next()
                if copy is None:
                    return
                heapq.heappop(self._queue)
                if not copy.ticket.take():
                    continue
                buffer = self._buffers.pop() if self._buffers else None
                self._being_staged += 1
            source = copy.source if buffer is None else buffer.copy_(copy.source)
            with self._condition:
                self._being_staged -= 1
                self._put(copy, source, buffer)

    def _next(self) -> _Copy | None:
        """What comes first of the queue, if the stream has room for it."""
        busy = len(self._running) + self._being_staged >= self._ahead
        return None if busy or not self._queue else self._queue[0][2]

    def _put(self, copy: _Copy, source: torch.Tensor, staging: torch.Tensor | None) -> None:
        """On the stream. It waits for nothing there: a slot is given to a copy only when its books say that no job
        holds it (pins are released once a job's end event has passed) and that no copy fills it, so everything that
        ever read or wrote the slot is over before this is called. In the same way what computes with the record is
        begun after the deciding thread has seen this copy's end event passed."""
        stream, interval = self._driver.copy_stream, self._events.take()
        try:
            interval.start.record(stream)
            self._driver.run(lambda: copy.target.copy_(source, non_blocking=True), stream)
            interval.end.record(stream)
        except Exception as error:  # carried to the thread that asked for the copy
            copy.ticket.fail(error)
            if staging is not None:
                self._buffers.append(staging)
            self._bell.ring()
            return
        copy.ticket.submitted(interval)
        self._running.append(_Running(copy.ticket, staging))
