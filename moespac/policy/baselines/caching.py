"""What most offloading systems are: a cache of experts, filled on demand, and some of them look ahead."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.base import CacheRetention, Counts, Policy, TierName
from moespac.policy.baselines.demand import used_in
from moespac.policy.baselines.order import Active, Order, UseOrder, Values
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, Ids, ModelShape, Placement, Plan, Residency, Window


class CachePolicy(Policy):
    """A cache in each tier, each with its own ``Order``; a tier sees the uses that the one above it misses.

    Experts that were foreseen are prefetched, and kept before all others until their layer has run. A miss is
    loaded and computed on the accelerator, after what is there, unless ``_dispatch`` says otherwise.
    """

    on_demand: ClassVar[bool] = False  # nothing is ever foreseen, and the order is a ``UseOrder``

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs)
        self._config = config.baselines
        self._fast: TierName = "accelerator" if capacity.accelerator else "host"
        self._slots = capacity.accelerator or capacity.host  # of the fast tier
        self._orders: dict[TierName, Order] = {
            "host": self._order(capacity.host),
            "accelerator": self._order(capacity.accelerator),
        }
        self._foreseen = NO_IDS  # in layers to come, the most useful first

    def plan(self, window: Window, residency: Residency) -> Plan:
        return self._fetch(self._foreseen, residency)

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        experts = np.flatnonzero(counts)
        ids = layer * self.shape.experts + experts
        active = Active(ids, counts[experts], self._held(residency)[ids])
        host, accelerator = self._dispatch(active) if self.capacity.accelerator else (ids, NO_IDS)
        self._orders[self._fast].use(active)
        if self.capacity.accelerator:
            self._orders["host"].use(active.missed(residency.host))
        self._foreseen = self._look_ahead(layer, active, residency)
        return Placement(host, accelerator, prefetch=self._fetch(self._foreseen, residency))

    def retention(self, tier: TierName, layer: int) -> Values:
        values = self._orders[tier].values()
        values[self._foreseen] += values.max() + 1
        return values

    def pass_retention(self) -> CacheRetention | None:
        if not self.on_demand or self.capacity.accelerator:
            return None
        order = self._use_order
        return CacheRetention(order.values(), order.once_used())

    def ran(self, layer: int, routing: NDArray[np.int64]) -> None:
        self._use_order.use_all(used_in(layer, routing, self.shape))

    @property
    def _use_order(self) -> UseOrder:
        order = self._orders["host"]
        assert isinstance(order, UseOrder)
        return order

    @abstractmethod
    def _order(self, slots: int) -> Order:
        """For a cache of ``slots`` experts."""

    def _dispatch(self, active: Active) -> tuple[Ids, Ids]:
        """What the host and what the accelerator computes, in order of execution."""
        return NO_IDS, np.concatenate([active.ids[active.held], active.ids[~active.held]])

    def _look_ahead(self, layer: int, active: Active, residency: Residency) -> Ids:
        """What to expect after ``layer``, the most useful first: by default the rest of what was foreseen."""
        return self._foreseen[self._foreseen >= (layer + 1) * self.shape.experts]

    def _held(self, residency: Residency) -> NDArray[np.bool_]:
        """(total,) what the fast tier has or will have."""
        if self.capacity.accelerator:
            return (residency.accelerator | residency.arriving_accelerator).ravel()
        return (residency.host | residency.arriving_host).ravel()

    def _fetch(self, ids: Ids, residency: Residency) -> Plan:
        """Bring these into the fast tier, as far as they are not there and it has slots."""
        absent = ids[~self._held(residency)[ids]][: self._slots]
        return Plan(accelerator=absent) if self.capacity.accelerator else Plan(host=absent)
