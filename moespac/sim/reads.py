"""Reads from storage as the engine makes them where it has no accelerator (csrc/reads.c), in virtual time.

A record is read in stripes, and whoever of ``MemoryConfig.readers`` is free takes the next stripe of the read that
is first in turn: one that a layer waits for before all that are speculative, of which only ``stripes_ahead`` are
under way at once. The disk serves stripes in the order in which they were taken, each a latency after that at the
earliest.

Stripes that follow each other are one run, told by arithmetic: a record of many takes hardly longer to simulate
than one of few.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable

from moespac.config import MemoryConfig
from moespac.sim.clock import PacedClock, VirtualBell
from moespac.sim.hardware import HardwareProfile
from moespac.timeline import STORAGE, Record, expert_name

_ROUNDING = 1e-9  # seconds: what happens so close together happens at once


class StripedRead:
    """``schedule.ports.Ticket``. ``seconds``: of its duration, those since another read was complete."""

    def __init__(self, name: str, speculative: bool, turn: int, hurry: Callable[[StripedRead], None]) -> None:
        self.name = name
        self.speculative = speculative
        self.turn = turn  # first come, first served
        self.begun = 0  # stripes
        self.start = 0.0  # as ``seconds``, in the world's time
        self.lane = 0
        self.done = False
        self.error: Exception | None = None
        self.seconds = 0.0
        self._hurry = hurry

    def cancel(self) -> bool:
        """Take the read back if none of its stripes has been taken."""
        if self.begun or self.done:
            return False
        self.done = True
        return True

    def hurry(self) -> None:
        """A layer waits for it: it goes ahead of all that are speculative."""
        if not self.done:
            self._hurry(self)


class _Run:
    """``count`` stripes of one read, one after the other: all that it lacked when the first of them was taken."""

    def __init__(
        self, read: StripedRead, begin: float, period: float, each: float, last: float, count: int
    ) -> None:
        """The disk turns to it at ``begin``; a stripe takes it ``each`` seconds, the last one ``last``."""
        self.read = read
        self.speculative = read.speculative
        self.count = count
        self._begin = begin
        self._period = period  # from one stripe to the next
        self._each = each
        self._last = last

    def cut(self, count: int) -> int:
        """Leave all but the first ``count``; how many those are."""
        left, self.count = self.count - count, count
        if left:
            self._last = self._each
        return left

    def end(self, stripe: int) -> float:
        """When one of them, counted from 0, is complete."""
        return self._begin + stripe * self._period + (self._last if stripe == self.count - 1 else self._each)

    def complete(self, now: float) -> int:
        """How many are."""
        now += _ROUNDING
        if now >= self.end(self.count - 1):
            return self.count
        passed = math.floor((now - self._begin - self._each) / self._period) + 1
        return min(max(passed, 0), self.count - 1)


class StripedReads:
    """``schedule.ports.Mover``: storage -> host."""

    sharing = 1

    def __init__(
        self,
        hardware: HardwareProfile,
        record_bytes: int,
        experts: int,
        config: MemoryConfig,
        clock: PacedClock,
        bell: VirtualBell,
        record: Record,
        turned: Callable[[bool], None],
    ) -> None:
        """``experts`` in a layer; ``clock`` is the disk's, which others may slow down. ``record`` is told each
        read, from its first stripe to its last, and ``turned`` whether the disk is at work now."""
        self._experts = experts
        self._config = config
        self._clock = clock
        self._bell = bell
        self._record = record
        self._turned = turned
        self._stripes = math.ceil(record_bytes / config.stripe_bytes)  # of a record
        last = record_bytes - (self._stripes - 1) * config.stripe_bytes
        self._latency = hardware.storage_latency
        self._each = config.stripe_bytes / hardware.storage_bandwidth
        self._last = last / hardware.storage_bandwidth
        self._turns = itertools.count()
        self._waiting: list[StripedRead] = []  # that have stripes which are in no run
        self._runs: deque[_Run] = deque()  # as the disk serves them
        self._free_at = 0.0  # the disk
        self._lanes = list(range(config.readers, 0, -1))
        self._latest = 0.0  # when a read was complete, in the world's time

    def move(self, expert: int, slot: int, source_slot: int | None, speculative: bool) -> StripedRead:
        read = StripedRead(expert_name(expert, self._experts), speculative, next(self._turns), self._hurry)
        self._waiting.append(read)
        self._reconsider(read)
        return read

    def close(self) -> None:
        """Nothing in virtual time needs stopping."""

    def _hurry(self, read: StripedRead) -> None:
        read.speculative, read.turn = False, next(self._turns)
        self._reconsider(read)

    def _reconsider(self, read: StripedRead) -> None:
        """``read`` came, or changed its turn."""
        if not read.speculative:
            self._overtake()
        self._take()

    def _overtake(self) -> None:
        """Of a speculative run, always the last one, only those stripes go on that are under way."""
        if not self._runs or not self._runs[-1].speculative:
            return
        run, now = self._runs[-1], self._clock.now()
        readers, ahead = self._free_readers(list(self._runs)[:-1], now)
        under_way = run.complete(now) + min(readers, ahead)
        if left := run.cut(min(run.count, under_way)):
            run.read.begun -= left
            self._waiting.append(run.read)
            self._free_at = run.end(run.count - 1)
            self._watch(run, now)

    def _take(self) -> None:
        """Whoever is free takes what is first in turn, and goes on with it."""
        now = self._clock.now()
        self._waiting = [read for read in self._waiting if not read.done]
        while self._waiting:
            read = min(self._waiting, key=lambda read: (read.speculative, read.turn))
            readers, ahead = self._free_readers(self._runs, now)
            if readers <= 0 or (read.speculative and ahead <= 0):
                return
            if not read.begun:
                read.start, read.lane = self._clock.world.now(), self._lanes.pop()
            self._waiting.remove(read)
            self._run(read, now)

    def _run(self, read: StripedRead, now: float) -> None:
        count = self._stripes - read.begun
        period = max(self._each, (self._latency + self._each) / self._together(read.speculative))
        begin = max(now + self._latency, self._free_at)
        run = _Run(read, begin, period, self._each, self._last, count)
        read.begun += count
        self._runs.append(run)
        self._turned(True)
        self._free_at = run.end(count - 1)
        self._watch(run, now)

    def _together(self, speculative: bool) -> int:
        """Stripes of such reads that are under way at once."""
        return self._config.stripes_ahead if speculative else self._config.readers

    def _free_readers(self, runs: deque[_Run] | list[_Run], now: float) -> tuple[int, int]:
        """Readers that ``runs`` leave, and how many of them may take speculative stripes."""
        readers, ahead = self._config.readers, self._config.stripes_ahead
        for run in runs:
            left = run.count - run.complete(now)
            readers -= left
            if run.speculative:
                ahead -= left
        return readers, ahead

    def _watch(self, run: _Run, now: float) -> None:
        """Look whenever a reader becomes free that has no next stripe in the run."""
        for stripe in range(max(run.complete(now), run.count - self._together(run.speculative)), run.count):
            self._clock.after(max(run.end(stripe) - now, 0.0), self._look)

    def _look(self) -> None:
        now = self._clock.now()
        while self._runs and self._runs[0].complete(now) == self._runs[0].count:
            read = self._runs.popleft().read
            if read.begun == self._stripes and all(run.read is not read for run in self._runs):
                self._complete(read)
        self._take()
        self._turned(bool(self._runs))

    def _complete(self, read: StripedRead) -> None:
        now = self._clock.world.now()
        read.seconds = now - max(self._latest, read.start)
        read.done = True
        self._latest = now
        self._record(f"{STORAGE} {read.lane}", read.name, read.start, now - read.start)
        self._lanes.append(read.lane)
        self._lanes.sort(reverse=True)
        self._bell.ring()
