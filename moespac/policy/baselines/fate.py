"""Fate (2025): the next gate, asked early, and a cache that favours shallow layers."""

from __future__ import annotations

import numpy as np

from moespac.policy.base import Counts, Sensor
from moespac.policy.baselines.arc import AdaptiveReplacement
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.order import Active, Order, Recency, Values
from moespac.types import ModelShape


class ShallowFirst:
    """ARC over the deep layers; whole shallow layers come before them and always fit."""

    def __init__(self, shape: ModelShape, slots: int, shallow_share: float) -> None:
        layers = min(int(slots * shallow_share) // shape.experts, shape.layers)
        self._first_deep = layers * shape.experts  # flat id, and the slots that shallow layers take
        self._shallow = Recency(self._first_deep)
        self._deep = AdaptiveReplacement(shape.total, slots - self._first_deep)

    def use(self, active: Active) -> None:
        is_shallow = bool((active.ids < self._first_deep).all())  # all are of one layer
        (self._shallow if is_shallow else self._deep).use(active)

    def values(self) -> Values:
        values = self._deep.values()
        values[: self._first_deep] = values.max() + 1 + self._shallow.values()
        return values


class FatePolicy(CachePolicy):
    """[abs] Layer l's gate input goes through the gate of layer l + 1 too, which is right 97% of the time; slots go
    to shallow layers first; misses run on the device. [recall] ARC decides about the rest.

    Assumed by us: whole shallow layers take up to half of the slots (``BaselineConfig.shallow_share``), one ARC
    over all deep layers has the others; all experts that the gate names are prefetched, those that most tokens
    want first.
    """

    name = "fate"
    sensors = frozenset({Sensor.NEXT_GATE})
    speculates = False

    def foresee_layer(self, layer: int, counts: Counts) -> None:
        ordered = np.argsort(-counts, kind="stable")
        self._foreseen = layer * self.shape.experts + ordered[: np.count_nonzero(counts)]

    def _order(self, slots: int) -> Order:
        return ShallowFirst(self.shape, slots, self._config.shallow_share)
