"""The clairvoyant bound (Belady, 1966), for the cache and for prefetching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.base import Counts, Policy, Sensor, TierName
from moespac.policy.baselines.order import Values
from moespac.policy.cost import CostModel
from moespac.policy.split import place_by_finish
from moespac.types import Capacity, Ids, ModelShape, Observation, Placement, Plan, Residency, Window

_NEVER = 2**30  # the number of a pass that does not come


class BeladyPolicy(Policy):
    """Evicts the expert used farthest ahead, prefetches those used soonest as fast as the transfers go, and splits
    each layer between the devices as moe-spac does. A bound on prediction, not a system.

    A use is a layer of a pass, so what is used in the same layer is equally far. Ours: host memory gives up first
    what the accelerator has too.
    """

    name = "belady"
    sensors = frozenset({Sensor.FUTURE})

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs)
        self._config = config
        self._pass = 0  # the one that runs, or comes
        self._on_accelerator = np.zeros(shape.total, np.bool_)
        self.reveal([])

    def reveal(self, passes: Sequence[NDArray[np.int64]]) -> None:
        turns = np.full((len(passes) + 1, self.shape.layers, self.shape.experts), _NEVER, np.int32)
        for number, routing in enumerate(passes):
            layer, token, slot = np.nonzero(routing >= 0)
            turns[number, layer, routing[layer, token, slot]] = number
        # (passes + 1, layers, experts) the pass of the first use, from each pass on
        self._next_pass = np.minimum.accumulate(turns[::-1])[::-1]
        self._pass = 0

    def plan(self, window: Window, residency: Residency) -> Plan:
        return self._soonest(-1, residency, listed=self.shape.total)

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        prefetch = self._soonest(layer, residency, listed=self._config.baselines.prefetch_list)
        return replace(
            place_by_finish(layer, counts, residency, self.costs, self._config.balance), prefetch=prefetch
        )

    def retention(self, tier: TierName, layer: int) -> Values:
        values = -self._next_use(layer).astype(np.float64)
        if tier == "host":
            values[self._on_accelerator] = values.min() - 1
        return values

    def observe(self, observation: Observation) -> None:
        self._pass = min(self._pass + 1, len(self._next_pass) - 1)

    def _next_use(self, layer: int) -> NDArray[np.int64]:
        """(layers * experts,) when each is used after ``layer`` of this pass has been dispatched, in layers."""
        after = min(self._pass + 1, len(self._next_pass) - 1)
        ran = layer + 1
        passes = np.concatenate([self._next_pass[after, :ran], self._next_pass[self._pass, ran:]])
        layers = np.arange(self.shape.layers)[:, None]
        return (passes.astype(np.int64) * self.shape.layers + layers).ravel()

    def _soonest(self, layer: int, residency: Residency, listed: int) -> Plan:
        self._on_accelerator = residency.accelerator.ravel()
        next_use = self._next_use(layer)
        near = (residency.accelerator | residency.arriving_accelerator).ravel()
        in_host = (residency.host | residency.arriving_host).ravel()
        host = _first(next_use, ~(in_host | near), min(listed, self.capacity.host))
        return Plan(host, _first(next_use, ~near, min(listed, self.capacity.accelerator)))


def _first(next_use: NDArray[np.int64], wanted: NDArray[np.bool_], listed: int) -> Ids:
    """Of the wanted experts that are used again, the first so many by their next use."""
    ids = np.flatnonzero(wanted & (next_use < _NEVER))
    if 0 < listed < len(ids):
        ids = np.sort(ids[np.argpartition(next_use[ids], listed)[:listed]])
    return ids[np.argsort(next_use[ids], kind="stable")][:listed]
