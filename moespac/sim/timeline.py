"""Who did what when, as a file for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Record = Callable[[str, str, float, float], None]  # (lane, name, start, duration), seconds


def ignore(lane: str, name: str, start: float, duration: float) -> None:
    """Keeps nothing: most simulations want figures only."""


class Event(NamedTuple):
    lane: str
    name: str
    start: float
    duration: float


class Timeline:
    """Keeps everything. ``timeline.record`` is a ``Record``."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, lane: str, name: str, start: float, duration: float) -> None:
        self.events.append(Event(lane, name, start, duration))

    def to_chrome(self) -> dict[str, Any]:
        """The Trace Event Format: one thread a lane, microseconds."""
        threads = {lane: number for number, lane in enumerate(sorted({event.lane for event in self.events}))}
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": thread, "args": {"name": lane}}
            for lane, thread in threads.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": event.name,
                "pid": 0,
                "tid": threads[event.lane],
                "ts": event.start * 1e6,
                "dur": event.duration * 1e6,
            }
            for event in self.events
        ]
        return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
