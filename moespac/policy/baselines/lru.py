"""Least recently used."""

from __future__ import annotations

from moespac.policy.baselines.order import Order, Recency
from moespac.policy.baselines.textbook import TextbookPolicy


class LruPolicy(TextbookPolicy):
    """The textbook cache. On a model it suffers from its scan: each pass uses all layers in the same order."""

    name = "lru"
    on_demand = True

    def _order(self, slots: int) -> Order:
        return Recency(self.shape.total)
