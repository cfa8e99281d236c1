"""BOUND: what no schedule of experts can beat, for the passes that a run made.

While decoding, experts that are not in memory must be read, and experts that are active must be computed, which
takes at least reading their weights from memory. The clairvoyant policy (Belady 1966, with bypass) reads the
fewest; both at the full bandwidth, and at the same time, is the bound. Each text's decoding begins with the best
possible content of memory: what its prefill reads is the prefill's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from moespac.trace.schema import Trace


@dataclass(frozen=True)
class Needs:
    """Of all decode passes of a trace, in experts."""

    misses: int  # that even the clairvoyant policy reads
    active: int  # (pass, expert) pairs
    tokens: int  # decoded and kept
    slots: int  # experts that memory holds

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def seconds(self, record_bytes: int, storage_bandwidth: float, memory_bandwidth: float) -> float:
        """The least time, at bytes/s."""
        reading = self.misses * record_bytes / storage_bandwidth
        computing = self.active * record_bytes / memory_bandwidth
        return max(reading, computing)


def needs_of(trace: Trace, slots: int) -> Needs:
    """What the decode passes of ``trace`` need when memory holds ``slots`` experts."""
    misses = active = tokens = 0
    for sequence in range(trace.sequences):
        steps = _steps(trace, sequence)
        misses += clairvoyant_misses(steps, slots)
        active += sum(len(step) for step in steps)
        tokens += len(trace.decode_tokens(sequence).tokens)
    return Needs(misses, active, tokens, slots)


def clairvoyant_misses(steps: Sequence[NDArray[np.int64]], slots: int) -> int:
    """The fewest experts read when each step needs a set of them and ``slots`` stay between steps.

    An expert may be used without being kept, and memory begins with what is best.
    """
    uses: dict[int, list[int]] = {}  # of each expert, the steps to come, the next one last
    for number in range(len(steps) - 1, -1, -1):
        for expert in steps[number].tolist():
            uses.setdefault(expert, []).append(number)
    held = set(_soonest(uses.keys(), uses, slots))
    misses = 0
    for step in steps:
        needed = set(step.tolist())
        misses += len(needed - held)
        for expert in needed:
            uses[expert].pop()
        held = set(_soonest(held | needed, uses, slots))
    return misses


def _soonest(experts: Iterable[int], uses: dict[int, list[int]], slots: int) -> list[int]:
    """Of ``experts``, the ``slots`` that are used again first."""
    coming = [(uses[expert][-1], expert) for expert in experts if uses[expert]]
    return [expert for _, expert in sorted(coming)[:slots]]


def _steps(trace: Trace, sequence: int) -> list[NDArray[np.int64]]:
    """Flat ids of the distinct experts of each layer of each decode pass."""
    steps = []
    for observed in trace.passes(sequence):
        if observed.window.prefill:
            continue
        for layer, routed in enumerate(observed.routing):
            experts = np.unique(routed[routed >= 0])
            steps.append(layer * trace.experts + experts)
    return steps
