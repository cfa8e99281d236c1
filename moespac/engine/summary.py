"""What a generation cost and where the time went: the truth a user sees."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers

import moespac
from moespac.experts.runtime import ExpertRuntime
from moespac.timeline import REQUEST

CONCURRENT = frozenset({"accelerator_experts"})  # causes on other threads: they overlap with the rest


@dataclass(frozen=True)
class Summary:
    """One generation in figures. Its fields are the keys of ``generate --json``."""

    text: str
    token_ids: list[int]  # new tokens
    finish_reason: str  # "stop", "length" or "context"
    prompt_tokens: int
    passes: int  # decode passes of the target, the prefill not counted
    tokens_per_second: (
        float | None
    )  # of decoding: new tokens after the first over the seconds after the prefill
    acceptance_rate: float | None  # accepted over drafted tokens; None when nothing was drafted
    mean_accepted: float | None  # tokens that a decode pass yields: accepted drafts, and the target's own
    hit_rate: float | None  # active experts that were resident where they were computed, in decode passes
    bytes_read: dict[str, int]  # from storage, and over the link to the accelerator
    peak_bytes: dict[str, int]  # of expert slots in use, since the engine was loaded
    link_bandwidth: float | None  # bytes/s to the accelerator, while anything was copied; None: nothing was
    page_locked: (
        float | None
    )  # share of the host's slots that is copied from at full speed; None: no such thing
    shrinks: int  # times that the accelerator's memory ran out and experts made way
    seconds: dict[str, float]  # by cause; accelerator_experts overlaps with the others, which add up to total
    policy: str
    drafter: str
    window: int | str  # K as asked for; 0 where the model's cache cannot be rewound
    exactness: str
    versions: dict[str, str]
    # Where the trunk runs as recordings: the host's own microseconds from a router's choice to the next launch, and
    # launches of the trunk.
    host_us_per_layer: float | None = None
    launches_per_layer: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    return {
        "moespac": moespac.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class Meter:
    """Differences of the runtime's counters over one generation."""

    def __init__(self, runtime: ExpertRuntime) -> None:
        self._runtime = runtime
        self._start = runtime.clock.now()
        self._bytes = dict(runtime.memory.bytes_read)
        self._link_seconds = runtime.memory.link_seconds
        self._shrinks = runtime.stats.shrinks
        self._hits, self._misses = runtime.stats.hits, runtime.stats.misses
        self._seconds = dict(runtime.clock.seconds)
        self._path = replace(runtime.clock.path)
        self._prefill_seconds = 0.0
        self._first_tokens = 0
        self._passes = self._drafted = self._accepted = 0

    def prefilled(self, tokens: int) -> None:
        """The prefill is over and gave ``tokens``: what follows counts as decoding."""
        self._prefill_seconds = self._runtime.clock.now() - self._start
        self._runtime.clock.tape(REQUEST, "prefill", self._start, self._prefill_seconds)
        self._seconds = dict(self._runtime.clock.seconds)
        self._path = replace(self._runtime.clock.path)
        self._first_tokens = tokens

    def passed(self, drafted: int, accepted: int) -> None:
        """A decode pass is over."""
        self._passes += 1
        self._drafted += drafted
        self._accepted += accepted

    def figures(self, new_tokens: int) -> dict[str, Any]:
        """The Summary's measured fields."""
        memory, stats = self._runtime.memory, self._runtime.stats
        total = self._runtime.clock.now() - self._start
        decode = total - self._prefill_seconds
        self._runtime.clock.tape(REQUEST, "decode", self._start + self._prefill_seconds, decode)
        decoded = new_tokens - self._first_tokens
        hits, misses = stats.hits - self._hits, stats.misses - self._misses
        return {
            "passes": self._passes,
            "tokens_per_second": decoded / decode if decoded and decode > 0 else None,
            "acceptance_rate": self._accepted / self._drafted if self._drafted else None,
            "mean_accepted": decoded / self._passes if self._passes else None,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "bytes_read": {name: n - self._bytes[name] for name, n in memory.bytes_read.items()},
            "peak_bytes": {"host": 0, "accelerator": 0}
            | {tier.name: tier.peak_bytes for tier in memory.tiers},
            "link_bandwidth": self._link_bandwidth(),
            "page_locked": self._runtime.page_locked,
            "shrinks": stats.shrinks - self._shrinks,
            "seconds": self._by_cause(total),
            **self._host_path(),
        }

    def _host_path(self) -> dict[str, float | None]:
        path, before = self._runtime.clock.path, self._path
        layers = path.layers - before.layers
        if not layers:
            return {"host_us_per_layer": None, "launches_per_layer": None}
        return {
            "host_us_per_layer": round((path.seconds - before.seconds) / layers * 1e6, 1),
            "launches_per_layer": round((path.launches - before.launches) / layers, 2),
        }

    def _link_bandwidth(self) -> float | None:
        memory = self._runtime.memory
        busy = memory.link_seconds - self._link_seconds
        return (memory.bytes_read["link"] - self._bytes["link"]) / busy if busy > 0 else None

    def _by_cause(self, total: float) -> dict[str, float]:
        spent = self._runtime.clock.seconds.items()
        causes = {cause: s - self._seconds.get(cause, 0.0) for cause, s in spent}
        seconds = {"prefill": self._prefill_seconds} | {cause: s for cause, s in causes.items() if s > 0}
        seconds["other"] = total - sum(s for cause, s in seconds.items() if cause not in CONCURRENT)
        seconds["total"] = total
        return {cause: round(s, 6) for cause, s in seconds.items()}
