"""What a run did: seconds by cause, hits, bytes. Counted where it happens, read by the summary."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from moespac.timeline import LANES_OF_CAUSES, Tape


class _Block(NamedTuple):
    cause: str
    name: str  # on the timeline


@dataclass
class HostPath:
    """What the host itself spends in passes whose trunk runs as recordings: from a router's choice to the next
    launch. Waits, and experts computed on the host, are not in it."""

    passes: int = 0
    layers: int = 0  # MoE layers of those passes together
    seconds: float = 0.0
    launches: int = 0  # of the trunk: recordings, copies, events; those of the experts are not in it

    def passed(self, layers: int, seconds: float) -> None:
        self.passes += 1
        self.layers += layers
        self.seconds += seconds

    def clear(self) -> None:
        self.passes = self.layers = self.launches = 0
        self.seconds = 0.0


@dataclass
class PassClock:
    """Seconds by cause on an injected clock. Causes that nest count their time in the inner one only."""

    now: Callable[[], float] = time.perf_counter
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tape: Tape = field(default_factory=Tape)  # is told each span, if it is on
    path: HostPath = field(default_factory=HostPath)
    _blocks: list[_Block] = field(default_factory=list)  # that are open, the innermost last
    _measured: dict[str, _Measured] = field(default_factory=dict)  # by cause, without a name of their own
    _since: float = 0.0  # when the innermost block began, or went on after one inside it

    def measure(self, cause: str, name: str | None = None) -> _Measured:
        """A context; on the timeline it is called ``name``, or else as its cause."""
        if name is not None:
            return _Measured(self, _Block(cause, name))
        known = self._measured.get(cause)
        if known is None:
            known = self._measured[cause] = _Measured(self, _Block(cause, cause))
        return known

    def _begin(self, block: _Block) -> None:
        now = self.now()
        if self._blocks:
            self._count(self._blocks[-1], now)
        self._blocks.append(block)
        self._since = now

    def _end(self) -> None:
        now = self.now()
        self._count(self._blocks.pop(), now)
        self._since = now

    def _count(self, block: _Block, now: float) -> None:
        spent = now - self._since
        self.seconds[block.cause] += spent
        if self.tape.record is not None and spent > 0:
            self.tape(LANES_OF_CAUSES.get(block.cause, block.cause), block.name, self._since, spent)

    def was_spent_on(self, cause: str, start: float, seconds: float, name: str | None = None) -> None:
        """A part of the innermost open block, over by now, belongs to another cause."""
        for block, until in ((self._blocks[-1], start), (_Block(cause, name or cause), start + seconds)):
            self._count(block, until)
            self._since = until

    def add(self, cause: str, seconds: float) -> None:
        """Time on another thread: it overlaps with the causes measured here and adds to none of them."""
        self.seconds[cause] += seconds


class _Measured:
    """By hand and not by contextlib: a layer has several of these, and this takes half the time."""

    __slots__ = ("_block", "_clock")

    def __init__(self, clock: PassClock, block: _Block) -> None:
        self._clock = clock
        self._block = block

    def __enter__(self) -> None:
        self._clock._begin(self._block)

    def __exit__(self, *_: object) -> None:
        self._clock._end()


@dataclass
class TierStats:
    """Of the experts that were placed on one tier's device."""

    hits: int = 0  # active (layer, expert) pairs that were resident there
    misses: int = 0

    def count(self, hits: int, active: int) -> None:
        self.hits += hits
        self.misses += active - hits


@dataclass
class ExpertStats:
    """Counts over the decode passes (a prefill touches nearly every expert and would drown them)."""

    host: TierStats = field(default_factory=TierStats)
    accelerator: TierStats = field(default_factory=TierStats)
    passes: int = 0
    shrinks: int = 0  # times that the accelerator's memory ran out and experts made way

    @property
    def hits(self) -> int:
        return self.host.hits + self.accelerator.hits

    @property
    def misses(self) -> int:
        return self.host.misses + self.accelerator.misses

    @property
    def hit_rate(self) -> float | None:
        active = self.hits + self.misses
        return self.hits / active if active else None
