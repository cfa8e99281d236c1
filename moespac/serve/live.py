"""What the page shows of the engine: seen between two windows, by the engine's own thread, when somebody asks."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moespac.config import ServeConfig
from moespac.engine.engine import Engine, Piece
from moespac.serve.answer import Answer
from moespac.serve.worker import Worker
from moespac.timeline import Event, Record, Timeline

# One byte an expert: its utility level, and flags.
LEVEL, HOST, ACCELERATOR, ARRIVING_HOST, ARRIVING_ACCELERATOR, USED = 0b111, 8, 16, 32, 64, 128


class Step(NamedTuple):
    """Counters of the engine after one step of it."""

    tokens: int
    seconds: float
    drafted: int
    accepted: int
    hits: int
    misses: int


class Live:
    """Rates over the latest steps, and the picture of memory. ``look`` is for the event loop, the rest is called on
    the engine's thread."""

    def __init__(
        self, engine: Engine, worker: Worker, config: ServeConfig, record: Record | None = None
    ) -> None:
        """``record``: who else wants the timeline, all of it."""
        self._engine = engine
        self._other_record = record
        engine.record_timeline(record)
        self._worker = worker
        self._config = config
        self._steps: deque[Step] = deque(maxlen=config.live_steps)
        self._tokens = 0
        self._timeline = Timeline(config.live_spans)
        self._watched = False
        self._wanted = 0.0  # when somebody looked last, on time.monotonic()
        self._picture: dict[str, Any] | None = None
        self._taken = 0.0  # when, on time.monotonic()
        self._taking: asyncio.Future[None] | None = None

    async def look(self) -> dict[str, Any]:
        """The engine as it is now, or as it was when last seen if a long pass holds it up."""
        self._wanted = time.monotonic()
        if self._picture is None or self._wanted - self._taken > self._config.live_seconds:
            if self._taking is None or self._taking.done():
                self._taking = asyncio.get_running_loop().create_future()
                self._worker.run_between_windows(self._errand(self._taking))
            wait = None if self._picture is None else self._config.live_wait
            await asyncio.wait([self._taking], timeout=wait)
        assert self._picture is not None
        spans = _latest_passes(self._timeline.events, self._config.live_passes, self._config.live_spans)
        return self._picture | {"spans": spans, "age": round(time.monotonic() - self._taken, 3)}

    def _errand(self, done: asyncio.Future[None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def settle() -> None:
            if not done.done():
                done.set_result(None)

        def run() -> None:
            if not self._watched:
                self._watched = True
                self._engine.record_timeline(_both(self._timeline.record, self._other_record))
            try:
                self._picture, self._taken = self._take(), time.monotonic()
            finally:
                loop.call_soon_threadsafe(settle)

        return run

    # ---- serve.worker.Observer -----------------------------------------------------------------------

    def stepped(self, piece: Piece, seconds: float) -> None:
        stats = self._engine.runtime.stats
        self._tokens += len(piece.tokens)
        self._steps.append(
            Step(len(piece.tokens), seconds, piece.drafted, piece.accepted, stats.hits, stats.misses)
        )
        if self._watched and time.monotonic() - self._wanted > self._config.live_watched:
            self._watched = False
            self._engine.record_timeline(self._other_record)

    def ended(self, answer: Answer) -> None: ...

    def stop(self) -> None:
        """The worker has ended: nobody looks any more."""
        self._engine.record_timeline(None)

    # ---- within --------------------------------------------------------------------------------------

    def _take(self) -> dict[str, Any]:
        engine = self._engine
        runtime, shape = engine.runtime, engine.shape
        levels = runtime.policy.levels
        return {
            "layers": shape.layers,
            "experts": shape.experts,
            "levels": None if levels is None else engine.config.method.utility.levels,
            "policy": runtime.policy.name,
            "drafter": engine.drafter.name,
            "tiers": [
                {
                    "name": tier.name,
                    "slots": tier.slots,
                    "resident": int(tier.ready.sum()),
                    "bytes": tier.slots * tier.record_bytes,
                }
                for tier in runtime.memory.tiers
            ],
            "grid": base64.b64encode(self._grid().tobytes()).decode("ascii"),
            "tokens": self._tokens,
            "bytes": dict(runtime.memory.bytes_read),
            "active": self._worker.active,
            "waiting": self._worker.waiting,
        } | self._rates()

    def _grid(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(layers, experts)"""
        runtime, residency = self._engine.runtime, self._engine.runtime.memory.residency
        grid = np.zeros((self._engine.shape.layers, self._engine.shape.experts), np.uint8)
        if runtime.policy.levels is not None:
            grid |= np.minimum(runtime.policy.levels, LEVEL).astype(np.uint8)
        grid[residency.host] |= HOST
        grid[residency.accelerator] |= ACCELERATOR
        grid[residency.arriving_host] |= ARRIVING_HOST
        grid[residency.arriving_accelerator] |= ARRIVING_ACCELERATOR
        for layer, routing in enumerate(runtime.latest_routing):
            grid[layer, routing[routing >= 0]] |= USED
        return grid

    def _rates(self) -> dict[str, float | None]:
        """Over the latest steps, those that only read a prompt included."""
        steps = list(self._steps)
        if not steps:
            return {"tokens_per_second": None, "acceptance": None, "hit_rate": None, "tokens_per_pass": None}
        seconds, drafted = sum(s.seconds for s in steps), sum(s.drafted for s in steps)
        hits, misses = steps[-1].hits - steps[0].hits, steps[-1].misses - steps[0].misses
        tokens = sum(s.tokens for s in steps)
        return {
            "tokens_per_second": tokens / seconds if seconds else None,
            "tokens_per_pass": tokens / len(steps),
            "acceptance": sum(s.accepted for s in steps) / drafted if drafted else None,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
        }


def _both(mine: Record, other: Record | None) -> Record:
    if other is None:
        return mine

    def record(lane: str, name: str, start: float, duration: float) -> None:
        mine(lane, name, start, duration)
        other(lane, name, start, duration)

    return record


def _latest_passes(events: list[Event], passes: int, most: int) -> list[tuple[str, str, float, float]]:
    """What happened since the pass before the latest ``passes`` was verified, ``most`` spans of it at most."""
    start, verified = 0.0, 0
    for event in reversed(events):
        if event.name == "verify":
            verified += 1
            if verified > passes:
                start = event.start + event.duration
                break
    recent = [event for event in events[-most:] if event.start + event.duration > start]
    return [
        (lane, name, round(max(at, start), 6), round(min(d, at + d - start), 6))
        for lane, name, at, d in recent
    ]
