"""What policies share that see the drafter's routing before the pass."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.base import Counts, Sensor
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.order import Order, Recency
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, Ids, ModelShape, Plan, Residency, Window


class DraftedPolicy(CachePolicy):
    """LRU, and before each pass a choice of what the draft suggests, as far as drafting leaves time to fetch.

    How long drafting took is not told to a policy: ``BaselineConfig.draft_token_seconds`` for each draft.
    """

    sensors = frozenset({Sensor.DRAFT_ROUTING})

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._suggested: Counts | None = None

    def foresee_window(self, counts: Counts) -> None:
        self._suggested = counts

    def plan(self, window: Window, residency: Residency) -> Plan:
        suggested, self._suggested = self._suggested, None
        self._foreseen = NO_IDS
        if suggested is not None:
            absent = (suggested > 0) & ~self._held(residency).reshape(suggested.shape)
            seconds = window.drafted * self._config.draft_token_seconds
            self._foreseen = self._choose(suggested, absent, seconds)
        return super().plan(window, residency)

    @abstractmethod
    def _choose(self, suggested: Counts, absent: NDArray[np.bool_], seconds: float) -> Ids:
        """What to count on, the most useful first. ``suggested`` (layers, experts) tokens, ``absent`` those of the
        suggested experts that are not there, ``seconds`` that drafting takes."""

    @property
    def _fetch_seconds(self) -> float:
        """To bring one expert into the fast tier."""
        return self.costs.link if self.capacity.accelerator else self.costs.storage

    def _order(self, slots: int) -> Order:
        return Recency(self.shape.total)
