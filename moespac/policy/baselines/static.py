"""Placements that are decided once and stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.base import CacheRetention, Counts, Policy, TierName
from moespac.policy.baselines.demand import used_in
from moespac.policy.baselines.order import Active, Recency, Values
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, Grid, Ids, ModelShape, Placement, Plan, Residency, Window


class StaticPolicy(Policy):
    """A fixed set of experts in the fast tier; the host computes all others.

    Host memory that is not the fast tier, and what the set leaves of it where it is, keeps the others by recency,
    as a page cache does.
    """

    passes_through = False  # whether other experts come to the accelerator too, if only to go

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs)
        self._config = config.baselines
        self._fast: TierName = "accelerator" if capacity.accelerator else "host"
        self._slots = capacity.accelerator or capacity.host  # of the fast tier
        self._recency = Recency(shape.total)
        self._hold(NO_IDS)

    def plan(self, window: Window, residency: Residency) -> Plan:
        """The set, while it is not there."""
        if self.capacity.accelerator:
            return Plan(accelerator=absent(self._set, residency.accelerator | residency.arriving_accelerator))
        return Plan(host=absent(self._set, residency.host | residency.arriving_host))

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        experts = np.flatnonzero(counts)
        ids = layer * self.shape.experts + experts
        active = Active(ids, counts[experts], self._is_held[ids])
        self._recency.use(active.missed(residency.host))
        return self._dispatch(active) if self.capacity.accelerator else Placement(ids)

    def pass_retention(self) -> CacheRetention | None:
        if self.capacity.accelerator:
            return None
        value, once_used = self._recency.values(), self._recency.once_used()
        once_used[self._set] = value[self._set] = value[self._set] + once_used[-1] + 1
        return CacheRetention(value, once_used)

    def ran(self, layer: int, routing: NDArray[np.int64]) -> None:
        used = used_in(layer, routing, self.shape)
        self._recency.use_all(used[~self._is_held[used]])

    def retention(self, tier: TierName, layer: int) -> Values:
        values = self._recency.values()
        if tier == self._fast:
            values[self._set] += values.max() + 1
        return values

    def _hold(self, ids: Ids) -> None:
        """Make ``ids`` the set, the most useful first."""
        self._set = ids
        self._is_held: NDArray[np.bool_] = np.zeros(self.shape.total, np.bool_)
        self._is_held[ids] = True

    def _dispatch(self, active: Active) -> Placement:
        """Who computes what; there is an accelerator. ``active.held``: of the set."""
        return Placement(host=active.ids[~active.held], accelerator=active.ids[active.held])

    @property
    def _room(self) -> int:
        """Experts that the set may have: less than the slots where others pass through them."""
        streams = self.passes_through or not self.capacity.accelerator
        if self._slots >= self.shape.total or not streams:
            return min(self._slots, self.shape.total)
        return max(self._slots - self._config.streaming_slots, self._slots // 2)


def absent(ids: Ids, present: Grid) -> Ids:
    """Those of ``ids`` that are not in the (layers, experts) grid."""
    return ids[~present.ravel()[ids]]
