"""Least frequently used."""

from __future__ import annotations

import numpy as np

from moespac.policy.baselines.order import Active, Order, Recency, Values
from moespac.policy.baselines.textbook import TextbookPolicy


class Frequency:
    """Least frequently used first, of equals the least recently used.

    One pass is one use however many of its tokens want the expert, so a prefill counts no more than a token.
    Uses are remembered beyond eviction ("perfect" LFU), as memory for a counter is no matter here.
    """

    def __init__(self, total: int) -> None:
        self._uses = np.zeros(total)
        self._recency = Recency(total)

    def use(self, active: Active) -> None:
        self._uses[active.ids] += 1
        self._recency.use(active)

    def values(self) -> Values:
        recency = self._recency.values()
        return self._uses + recency / (recency.max() + 1)


class LfuPolicy(TextbookPolicy):
    """The textbook cache."""

    name = "lfu"

    def _order(self, slots: int) -> Order:
        return Frequency(self.shape.total)
