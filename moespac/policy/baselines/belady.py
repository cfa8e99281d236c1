"""The clairvoyant bound (Belady, 1966), for the cache and for prefetching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.base import Counts, Policy, Sensor, TierName
from moespac.policy.baselines.order import Values
from moespac.policy.copies import worth_copying
from moespac.policy.cost import CostModel, Seconds
from moespac.policy.split import Stakes, place_by_finish
from moespac.types import Capacity, Ids, ModelShape, Observation, Placement, Plan, Residency, Window

_NEVER = 2**30  # the number of a pass that does not come


class BeladyPolicy(Policy):
    """Knows all uses to come. A bound on prediction, not a system.

    Host memory: evicts the expert used farthest ahead, reads those used soonest as fast as the transfers go. A use
    is a layer of a pass, so what is used in the same layer is equally far. Ours: host memory gives up first what
    the accelerator has too.

    Accelerator: a miss there costs little more than its copy, for the host computes it meanwhile, so the order of
    next uses alone would copy too much. Experts are valued in seconds as moe-spac does it, by the passes that will
    use them, each pass further ahead counting ``BaselineConfig.clairvoyant_discount`` of the one before it; misses,
    copies and layers are weighed with that as moe-spac weighs them with what it expects.
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
        self._tokens = [routing.shape[1] for routing in passes]
        self._pass = 0
        if self.capacity.accelerator:
            discount = np.float32(self._config.baselines.clairvoyant_discount)
            self._uses = (turns < _NEVER).astype(
                np.float32
            )  # (passes + 1, layers, experts) from each pass on
            for number in range(len(passes) - 1, -1, -1):
                self._uses[number] += discount * self._uses[number + 1]

    def plan(self, window: Window, residency: Residency) -> Plan:
        if not self.capacity.accelerator:
            return Plan(self._soonest(-1, residency, listed=self.shape.total))
        drafts = self._pass < len(self._tokens) and self._tokens[self._pass] > len(window.tokens)
        price = 0.0 if drafts else self.costs.copy_price  # the host is idle while tokens are drafted
        copies = worth_copying(self._saved(-1), residency, price)
        return Plan(self._soonest(-1, residency, listed=self.shape.total), copies)

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        prefetch = Plan(self._soonest(layer, residency, listed=self._config.baselines.prefetch_list))
        stakes = None
        if self.capacity.accelerator:
            worth = self._saved(layer)
            idle = residency.accelerator.copy()
            idle[layer] &= counts == 0  # nothing is taken from the layer that runs
            stakes = Stakes(worth, np.sort(worth[idle.ravel()]))
        placement = place_by_finish(layer, counts, residency, self.costs, stakes)
        return replace(placement, prefetch=prefetch)

    def retention(self, tier: TierName, layer: int) -> Values:
        if tier == "accelerator" and self.capacity.accelerator:
            return self._saved(layer)
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

    def _saved(self, layer: int) -> Seconds:
        """(layers * experts,) seconds that each saves on the accelerator, ``layer`` having been dispatched."""
        after = min(self._pass + 1, len(self._uses) - 1)
        ran = layer + 1
        discount = self._config.baselines.clairvoyant_discount
        uses = np.concatenate([discount * self._uses[after, :ran], self._uses[self._pass, ran:]])
        one = np.array([1])
        each = float(self.costs.host_expert(one)[0] - self.costs.accelerator_expert(one)[0])
        return uses.ravel().astype(np.float64) * max(each, 0.0)

    def _soonest(self, layer: int, residency: Residency, listed: int) -> Ids:
        """What host memory lacks, by its next use."""
        self._on_accelerator = residency.accelerator.ravel()
        near = residency.accelerator | residency.arriving_accelerator
        absent = ~(residency.host | residency.arriving_host | near)
        return _first(self._next_use(layer), absent.ravel(), min(listed, self.capacity.host))


def _first(next_use: NDArray[np.int64], wanted: NDArray[np.bool_], listed: int) -> Ids:
    """Of the wanted experts that are used again, the first so many by their next use."""
    ids = np.flatnonzero(wanted & (next_use < _NEVER))
    if 0 < listed < len(ids):
        ids = np.sort(ids[np.argpartition(next_use[ids], listed)[:listed]])
    return ids[np.argsort(next_use[ids], kind="stable")][:listed]
