"""Virtual time: a clock that jumps to what happens next, the bell of the one deciding thread, and work that slows
other work down. simpy keeps the time and what is to come.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import simpy

Action = Callable[[], None]


class VirtualClock:
    """Seconds since the simulation began. What happens at the same moment happens in the order it was planned."""

    def __init__(self) -> None:
        self._environment = simpy.Environment()

    def now(self) -> float:
        return self._environment.now

    def after(self, seconds: float, action: Action) -> None:
        """Have ``action`` called in ``seconds``."""
        event = self._environment.timeout(seconds)
        assert event.callbacks is not None, "a timeout has not happened when it is made"
        event.callbacks.append(lambda _: action())

    def step(self) -> None:
        """Go on to what happens next, and let it happen."""
        self._environment.step()

    def sleep(self, seconds: float) -> None:
        """The deciding thread is busy for ``seconds``; all else goes on."""
        if seconds > 0:
            self._environment.run(until=self._environment.timeout(seconds))

    def wait_for(self, begin: Callable[[Action], None]) -> float:
        """Begin something that calls the given action when it is complete; returns the seconds until then."""
        start, complete = self.now(), False

        def done() -> None:
            nonlocal complete
            complete = True

        begin(done)
        while not complete:
            self.step()
        return self.now() - start


class VirtualBell:
    """``schedule.ports.Bell`` in virtual time."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._rings = 0

    def ring(self) -> None:
        self._rings += 1

    def count(self) -> int:
        return self._rings

    def wait_beyond(self, count: int) -> None:
        """Let time pass until it has rung more than ``count`` times."""
        while self._rings <= count:
            self._clock.step()


class PacedClock:
    """The time of one who is slowed down now and then: it passes at ``pace`` of the world's."""

    def __init__(self, world: VirtualClock) -> None:
        self.world = world
        self._pace = 1.0
        self._then = self._since = world.now()  # its own time and the world's, when the pace changed
        self._due: list[tuple[float, int, Action]] = []  # a heap, by its own time
        self._order = itertools.count()
        self._changes = 0

    def now(self) -> float:
        return self._then + (self.world.now() - self._since) * self._pace

    def after(self, seconds: float, action: Action) -> None:
        """Have ``action`` called in ``seconds`` of its own."""
        heapq.heappush(self._due, (self.now() + seconds, next(self._order), action))
        self._foresee()

    @property
    def pace(self) -> float:
        return self._pace

    @pace.setter
    def pace(self, pace: float) -> None:
        if pace != self._pace:
            self._then, self._since = self.now(), self.world.now()
            self._pace = pace
            self._foresee()

    def _foresee(self) -> None:
        """When the next is due, in the world's time."""
        self._changes += 1
        if self._due:
            seconds = max(self._due[0][0] - self.now(), 0.0) / self._pace
            self.world.after(seconds, partial(self._happen, self._changes))

    def _happen(self, foreseen_at: int) -> None:
        if foreseen_at != self._changes:
            return  # the pace has changed since, or another was put before it
        _, _, action = heapq.heappop(self._due)
        self._foresee()
        action()


@dataclass(eq=False)
class _Work:
    user: str
    left: float  # seconds, were it alone
    done: Action
    speed: float = 1.0


class SharedResource:
    """Work that runs side by side, each at a share of its own full speed (processor sharing)."""

    def __init__(self, clock: VirtualClock, speed: Callable[[str, Sequence[str]], float]) -> None:
        """``speed(user, users)``: of one of the ``users`` who are at work now; itself among them. 1 is alone."""
        self._clock = clock
        self._speed = speed
        self._running: list[_Work] = []
        self._since = 0.0  # until when the work that is left has been counted
        self._changes = 0

    def work(self, user: str, seconds: float, done: Action) -> None:
        """Have work begun that takes ``seconds`` alone, and ``done`` called when it is complete."""
        self._count()
        self._running.append(_Work(user, seconds, done))
        self._foresee()

    def _count(self) -> None:
        now = self._clock.now()
        for work in self._running:
            work.left -= (now - self._since) * work.speed
        self._since = now

    def _foresee(self) -> None:
        """Who works now, and therefore what is complete next."""
        self._changes += 1
        if not self._running:
            return
        users = [work.user for work in self._running]
        for work in self._running:
            work.speed = self._speed(work.user, users)
        first = min(self._running, key=lambda work: work.left / work.speed)
        seconds = max(first.left / first.speed, 0.0)  # rounding may leave a little less than nothing
        self._clock.after(seconds, partial(self._complete, first, self._changes))

    def _complete(self, work: _Work, foreseen_at: int) -> None:
        if foreseen_at != self._changes:
            return  # somebody came or went since: it will be complete at another time
        self._count()
        self._running.remove(work)
        self._foresee()
        work.done()
