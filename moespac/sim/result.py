"""What a simulated run did, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moespac.errors import ConfigError
from moespac.schedule.memory import ExpertMemory
from moespac.schedule.stats import PassClock
from moespac.types import Observation

_BYTES, _SECONDS = "bytes ", "seconds "


@dataclass(frozen=True)
class SimResult:
    """The decode passes of one policy; prompts, and what was loaded before them, are not counted."""

    policy: str
    tokens: int  # decoded
    passes: int
    tokens_per_second: float
    seconds_per_token: float
    drafted: int
    accepted: int
    mean_accepted: float  # tokens that a pass yields: accepted drafts, and the target's own
    hit_rate: float  # active experts that were in the fastest tier when their layer began
    token_hit_rate: float  # the same, each expert as often as tokens wanted it
    link_bytes: int
    storage_bytes: int
    seconds: dict[str, float]  # by cause; accelerator_experts overlaps with the others, which add up to total

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Adds up the steps that count; what happens in the others is left out."""

    def __init__(self, memory: ExpertMemory, clock: PassClock) -> None:
        self._memory = memory
        self._clock = clock
        self._sums: Counter[str] = Counter()
        self.begin_step()

    def begin_step(self) -> None:
        self._before = self._totals()

    def dispatch(self, counts: NDArray[np.int64], resident: NDArray[np.bool_]) -> None:
        """A layer of a step that will count begins. Both (experts,): its tokens, and what the fastest tier has."""
        self._sums["active"] += int(np.count_nonzero(counts))
        self._sums["hits"] += int(np.count_nonzero(counts[resident]))
        self._sums["active_tokens"] += int(counts.sum())
        self._sums["hit_tokens"] += int(counts[resident].sum())

    def end_step(self, seen: Observation) -> None:
        """The step that began counts; its pass was ``seen``."""
        self._sums.update(self._totals())  # type: ignore[arg-type]  # a Counter of floats
        self._sums.subtract(self._before)  # type: ignore[arg-type]
        self._sums.update({"passes": 1, "drafted": seen.window.drafted, "accepted": seen.accepted})

    def result(self, policy: str) -> SimResult:
        """Raises ConfigError when no step counted."""
        sums = self._sums
        if not sums["passes"]:
            raise ConfigError("the trace decodes nothing in these sequences; record longer texts")
        tokens, total = sums["passes"] + sums["accepted"], sums[f"{_SECONDS}total"]
        return SimResult(
            policy=policy,
            tokens=tokens,
            passes=sums["passes"],
            tokens_per_second=tokens / total,
            seconds_per_token=total / tokens,
            drafted=sums["drafted"],
            accepted=sums["accepted"],
            mean_accepted=tokens / sums["passes"],
            hit_rate=sums["hits"] / sums["active"],
            token_hit_rate=sums["hit_tokens"] / sums["active_tokens"],
            link_bytes=sums[f"{_BYTES}link"],
            storage_bytes=sums[f"{_BYTES}storage"],
            seconds={key.removeprefix(_SECONDS): sums[key] for key in sums if key.startswith(_SECONDS)},
        )

    def _totals(self) -> dict[str, float]:
        moved = {f"{_BYTES}{name}": nbytes for name, nbytes in self._memory.bytes_read.items()}
        spent = {f"{_SECONDS}{cause}": seconds for cause, seconds in self._clock.seconds.items()}
        return moved | spent | {f"{_SECONDS}total": self._clock.now()}
