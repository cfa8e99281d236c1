"""What a run did: seconds by cause, hits, bytes. Counted where it happens, read by the summary."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Elapsed:
    """The seconds of one measured block, valid after it."""

    seconds: float = 0.0


@dataclass
class PassClock:
    """Seconds by cause on an injected clock. Causes that nest count their time in the inner one only."""

    now: Callable[[], float] = time.perf_counter
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _nested: list[float] = field(default_factory=list)  # seconds that inner blocks took, by depth

    @contextmanager
    def measure(self, cause: str) -> Iterator[Elapsed]:
        elapsed = Elapsed()
        self._nested.append(0.0)
        start = self.now()
        try:
            yield elapsed
        finally:
            elapsed.seconds = self.now() - start
            self.seconds[cause] += elapsed.seconds - self._nested.pop()
            if self._nested:
                self._nested[-1] += elapsed.seconds

    def add(self, cause: str, seconds: float) -> None:
        """Time on another thread: it overlaps with the causes measured here and adds to none of them."""
        self.seconds[cause] += seconds


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
