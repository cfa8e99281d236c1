"""mixtral-offloading (Eliseev and Mazur, 2023): an LRU cache in each layer and a guess for the next."""

from __future__ import annotations

import numpy as np

from moespac.policy.base import Counts, Sensor
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.layered import prefer_in_each_layer
from moespac.policy.baselines.order import Order, Recency, Values
from moespac.types import ModelShape


class LayeredRecency(Recency):
    """Least recently used first, in each layer for itself."""

    def __init__(self, shape: ModelShape, slots_per_layer: int) -> None:
        super().__init__(shape.total)
        self._grid = (shape.layers, shape.experts)
        self._slots = slots_per_layer

    def values(self) -> Values:
        return prefer_in_each_layer(self._last_use.reshape(self._grid), self._slots)


class MixtralOffloadingPolicy(CachePolicy):
    """[recall] LRU of k slots in each layer; the gate of layer l + 1, applied to layer l's hidden states, names
    one or two experts that are loaded to staging buffers, and enter the cache only when they are used; misses run
    on the device. The public repository lacks the guess.

    Assumed by us: the staging slots come out of the same capacity; of a window of several tokens, the experts that
    most tokens are guessed to want are staged. A staged expert is kept until its layer has run and, unless it was
    used there, is among the first to go: it has not become recent.
    """

    name = "mixtral-offloading"
    sensors = frozenset({Sensor.NEXT_GATE})
    speculates = False

    def foresee_layer(self, layer: int, counts: Counts) -> None:
        guessed = np.argsort(-counts, kind="stable")[: self._config.staged_experts]
        self._foreseen = layer * self.shape.experts + guessed[counts[guessed] > 0]

    def _order(self, slots: int) -> Order:
        cached = max(slots - self._config.staged_experts, 0)
        return LayeredRecency(self.shape, cached // self.shape.layers)
