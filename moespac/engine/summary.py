"""What a generation cost and where the time went: the truth a user sees."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

import moespac
from moespac.experts.runtime import ExpertRuntime

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
    seconds: dict[str, float]  # by cause; accelerator_experts overlaps with the others, which add up to total
    policy: str
    drafter: str
    window: int
    exactness: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    return {
        "moespac": moespac.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@dataclass
class Meter:
    """Differences of the runtime's counters over one generation."""

    runtime: ExpertRuntime
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    _start: float = field(init=False)
    _bytes: dict[str, int] = field(init=False)
    _hits: int = field(init=False)
    _misses: int = field(init=False)
    _seconds: dict[str, float] = field(init=False)
    passes: int = 0
    first_tokens: int = 0

    def __post_init__(self) -> None:
        self._start = self.runtime.clock.now()
        self._bytes = dict(self.runtime.memory.bytes_read)
        self._hits, self._misses = self.runtime.stats.hits, self.runtime.stats.misses
        self._seconds = dict(self.runtime.clock.seconds)

    def prefilled(self, tokens: int) -> None:
        """The prefill is over and gave ``tokens``: what follows counts as decoding."""
        self.prefill_seconds = self.runtime.clock.now() - self._start
        self._seconds = dict(self.runtime.clock.seconds)
        self.first_tokens = tokens

    def passed(self, drafted: int, accepted: int) -> None:
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted

    def figures(self, new_tokens: int) -> dict[str, Any]:
        """The Summary's measured fields."""
        total = self.runtime.clock.now() - self._start
        decode = total - self.prefill_seconds
        spent = self.runtime.clock.seconds
        causes = {cause: s - self._seconds.get(cause, 0.0) for cause, s in spent.items()}
        seconds = {"prefill": self.prefill_seconds} | {cause: s for cause, s in causes.items() if s > 0}
        seconds["other"] = total - sum(s for cause, s in seconds.items() if cause not in CONCURRENT)
        seconds["total"] = total
        memory, stats = self.runtime.memory, self.runtime.stats
        hits, misses = stats.hits - self._hits, stats.misses - self._misses
        decoded = new_tokens - self.first_tokens
        accelerator = memory.accelerator.peak_bytes if memory.accelerator is not None else 0
        return {
            "passes": self.passes,
            "tokens_per_second": decoded / decode if decoded and decode > 0 else None,
            "acceptance_rate": self.accepted / self.drafted if self.drafted else None,
            "mean_accepted": decoded / self.passes if self.passes else None,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "bytes_read": {name: n - self._bytes[name] for name, n in memory.bytes_read.items()},
            "peak_bytes": {"host": memory.host.peak_bytes, "accelerator": accelerator},
            "seconds": {cause: round(s, 6) for cause, s in seconds.items()},
        }
