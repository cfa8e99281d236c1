"""Who did what when, in the engine and in the simulator; for ui.perfetto.dev or chrome://tracing.

A lane is something that does one thing at a time, so its spans never overlap. The deciding thread has several:
draft, trunk, host experts, decide and wait take turns, and a block inside another cuts the outer one's in two.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Record = Callable[[str, str, float, float], None]  # (lane, name, start, duration), seconds

REQUEST = "request"  # its spans are "prefill" and "decode"
ACCELERATOR = "accelerator experts"
TRUNK_ON_DEVICE = "accelerator trunk"  # its spans are stretches between two blocks of experts
STORAGE = "storage"  # "storage 1", "storage 2" ...: one for each reader
LINK = "link"
LANES_OF_CAUSES = {  # the causes of ``PassClock``
    "draft": "draft",
    "trunk": "trunk",
    "host_experts": "host experts",
    "decide": "decide",
    "verify": "decide",
    "wait_for_experts": "wait",
    "wait_for_accelerator": "wait",
    "wait_for_device": "wait",  # for a router's choice, or drafted tokens
}
_ORDER = [  # as they are shown
    REQUEST,
    *dict.fromkeys(LANES_OF_CAUSES.values()),
    TRUNK_ON_DEVICE,
    ACCELERATOR,
    LINK,
    STORAGE,
]


def ignore(lane: str, name: str, start: float, duration: float) -> None:
    """Keeps nothing: most simulations want figures only."""


@functools.cache
def expert_name(expert: int, experts: int) -> str:
    """MoE layer and number of the expert with this flat id, as a timeline shows them."""
    return "{}.{}".format(*divmod(expert, experts))


def expert_names(flat_ids: Iterable[int], experts: int) -> str:
    """Of a job that several share."""
    return " ".join(expert_name(expert, experts) for expert in flat_ids)


class Tape:
    """A ``Record`` that threads hold on to while it is switched on, over and off."""

    def __init__(self, record: Record | None = None) -> None:
        self.record = record  # None: off

    def __call__(self, lane: str, name: str, start: float, duration: float) -> None:
        if self.record is not None:
            self.record(lane, name, start, duration)


class Event(NamedTuple):
    lane: str
    name: str
    start: float
    duration: float


class Timeline:
    """Keeps everything, or the last ``most`` events. ``record`` is a ``Record`` that any thread may call."""

    def __init__(self, most: int | None = None) -> None:
        self._events: deque[Event] = deque(maxlen=most)
        self._lock = threading.Lock()

    def record(self, lane: str, name: str, start: float, duration: float) -> None:
        with self._lock:
            self._events.append(Event(lane, name, start, duration))

    @property
    def events(self) -> list[Event]:
        """A copy, in the order in which they ended."""
        with self._lock:
            return list(self._events)

    def to_chrome(self) -> dict[str, Any]:
        """The Trace Event Format: one thread a lane, microseconds."""
        events = self.events
        threads = {lane: n for n, lane in enumerate(sorted({event.lane for event in events}, key=_rank))}
        names: list[dict[str, Any]] = []
        for lane, thread in threads.items():
            of_thread = {"ph": "M", "pid": 0, "tid": thread}
            names.append(of_thread | {"name": "thread_name", "args": {"name": lane}})
            names.append(of_thread | {"name": "thread_sort_index", "args": {"sort_index": thread}})
        spans = [
            {
                "ph": "X",
                "name": event.name,
                "pid": 0,
                "tid": threads[event.lane],
                "ts": round(event.start * 1e6, 3),
                "dur": round(event.duration * 1e6, 3),
            }
            for event in events
        ]
        return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}


def _rank(lane: str) -> tuple[int, int, str]:
    kind = lane.rstrip("0123456789").rstrip()
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER)), len(lane), lane  # "storage 2" before "10"
