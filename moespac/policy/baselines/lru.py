"""Least recently used: the textbook cache, filled on demand."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moespac.policy.base import Policy, TierName
from moespac.policy.cost import CostModel
from moespac.types import Capacity, ModelShape, Placement, Plan, Residency


class LruPolicy(Policy):
    """One global LRU per tier, no foresight.

    With an accelerator, what it holds is computed there. A miss is loaded and computed there too, or
    (``miss_on="host"``) computed by the host at once and loaded behind it for the next time.
    """

    name = "lru"

    def __init__(
        self,
        shape: ModelShape,
        capacity: Capacity,
        costs: CostModel,
        miss_on: Literal["host", "accelerator"] = "accelerator",
    ) -> None:
        super().__init__(shape, capacity, costs)
        self._miss_on = miss_on
        self._uses = 0
        self._last_use: dict[TierName, NDArray[np.float64]] = {
            "host": np.zeros(shape.total),
            "accelerator": np.zeros(shape.total),
        }

    def place(self, layer: int, counts: NDArray[np.int64], residency: Residency) -> Placement:
        active = np.flatnonzero(counts)
        ids = layer * self.shape.experts + active
        present = residency.accelerator[layer, active] | residency.arriving_accelerator[layer, active]
        if not self.capacity.accelerator:
            self._touch("host", ids)
            return Placement(ids)
        self._touch("accelerator", ids)
        self._touch("host", ids[~present])  # computed there, or copied from there
        if self._miss_on == "accelerator":
            return Placement(host=ids[:0], accelerator=np.concatenate([ids[present], ids[~present]]))
        return Placement(ids[~present], ids[present], prefetch=Plan(accelerator=ids[~present]))

    def retention(self, tier: TierName, layer: int) -> NDArray[np.float64]:
        return self._last_use[tier].copy()

    def _touch(self, tier: TierName, ids: NDArray[np.int64]) -> None:
        self._last_use[tier][ids] = self._uses + 1 + np.arange(len(ids))
        self._uses += len(ids)
