"""The one interface between deciding and doing. The engine and the simulator drive the same objects.

A decode step calls, in this order, all from one thread:

    plan(window, residency)              before the pass, the drafted tokens are known
    place(layer, counts, residency)      for each MoE layer, when its router has fired
    retention(tier, layer)               whenever a slot is needed: the lowest value is evicted
    observe(observation)                 after verification, acceptance is known
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moespac.policy.cost import CostModel
from moespac.types import Capacity, ModelShape, Observation, Placement, Plan, Residency, Window

TierName = Literal["host", "accelerator"]


class Policy(ABC):
    """Decides which experts are where, and who computes them. Never touches a tensor, a clock or a thread."""

    name: str

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel) -> None:
        self.shape = shape
        self.capacity = capacity
        self.costs = costs

    def plan(self, window: Window, residency: Residency) -> Plan:
        """What to fetch ahead of this pass. By default nothing: misses are fetched on demand."""
        return Plan()

    @abstractmethod
    def place(self, layer: int, counts: NDArray[np.int64], residency: Residency) -> Placement:
        """Who computes the active experts of ``layer``; ``counts`` (experts,) window tokens sent to each."""

    @abstractmethod
    def retention(self, tier: TierName, layer: int) -> NDArray[np.float64]:
        """The value of keeping each expert in ``tier``, (layers * experts,), while ``layer`` runs (-1:
        between passes). The resident expert with the lowest value is the next victim; a prefetch never evicts
        an expert worth as much as itself or more."""

    def observe(self, observation: Observation) -> None:
        """Learn from a completed pass. By default nothing."""

    def load_profile(self, path: Path) -> None:
        """Start from what an earlier run learned. By default nothing is kept."""

    def save_profile(self, path: Path) -> None:
        """Keep what was learned for the next run."""
