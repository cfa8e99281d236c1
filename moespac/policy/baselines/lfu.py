"""Least frequently used."""

from __future__ import annotations

import numpy as np

from moespac.policy.baselines.order import Active, Order, Recency, Values
from moespac.policy.baselines.textbook import TextbookPolicy
from moespac.types import Ids


class Frequency:
    """Least frequently used first, of equals the least recently used.

    One pass is one use however many of its tokens want the expert, so a prefill counts no more than a token.
    Uses are remembered beyond eviction ("perfect" LFU), as memory for a counter is no matter here.
    """

    def __init__(self, total: int) -> None:
        self._uses = np.zeros(total)
        self._recency = Recency(total)

    def use(self, active: Active) -> None:
        self.use_all(active.ids)

    def use_all(self, ids: Ids) -> None:
        self._uses[ids] += 1
        self._recency.use_all(ids)

    def values(self) -> Values:
        return self._uses + self._recency.values() / self._beyond

    def once_used(self) -> Values:
        return self._uses + 1 + self._recency.once_used() / self._beyond

    @property
    def _beyond(self) -> float:
        """More than any recency that ``once_used`` may have."""
        return float(self._recency.once_used()[-1]) + 1


class LfuPolicy(TextbookPolicy):
    """The textbook cache."""

    name = "lfu"
    on_demand = True

    def _order(self, slots: int) -> Order:
        return Frequency(self.shape.total)
