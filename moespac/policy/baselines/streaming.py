"""Systems that stream whole layers through the device, routed or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moespac.config import PolicyConfig
from moespac.policy.base import Counts, Policy, TierName
from moespac.policy.baselines.order import Active, Values
from moespac.policy.baselines.static import StaticPolicy, absent
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, Ids, ModelShape, Placement, Plan, Residency, Window


class AcceleratePolicy(Policy):
    """[recall] Hugging Face Accelerate's offloading: all E experts of a layer are loaded before its forward, on the
    device, and dropped after it.

    Dropping is left to eviction, the layer that ran last going last: the next scan of the layers finds nothing of
    it unless all of them fit. Assumed by us: without an accelerator only the routed experts are read.
    """

    name = "accelerate"
    speculates = False

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs)

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        first = layer * self.shape.experts
        ids = first + np.flatnonzero(counts)
        if not self.capacity.accelerator:
            return Placement(ids)
        return Placement(NO_IDS, ids, load=np.arange(first, first + self.shape.experts))

    def retention(self, tier: TierName, layer: int) -> Values:
        return _latest_first(layer, self.shape)


class VllmOffloadPolicy(StaticPolicy):
    """[recall] vLLM's weight offloading: a static share of every layer is on the device, the rest of it is streamed
    in each pass, routed or not, the next layer's while this one runs.

    Assumed by us: the device holds as large a share as leaves room for the rest of two layers, the one that runs
    and the one that comes. Without an accelerator only the routed experts are read.
    """

    name = "vllm-offload"
    speculates = False

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._share = self._largest_share()  # experts of each layer that stay
        first = np.arange(shape.layers)[:, None] * shape.experts
        self._hold((first + np.arange(self._share)).ravel())

    def plan(self, window: Window, residency: Residency) -> Plan:
        plan = super().plan(window, residency)
        if not self.capacity.accelerator:
            return plan
        coming = absent(self._rest(0), residency.accelerator | residency.arriving_accelerator)
        return Plan(accelerator=np.concatenate([plan.accelerator, coming])[: self._slots])

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        placement = super().place(layer, counts, residency)
        if not self.capacity.accelerator:
            return placement
        following = self._rest((layer + 1) % self.shape.layers)
        coming = absent(following, residency.accelerator | residency.arriving_accelerator)
        return replace(placement, prefetch=Plan(accelerator=coming[: self._slots]), load=self._rest(layer))

    def retention(self, tier: TierName, layer: int) -> Values:
        values = _latest_first(layer + 1, self.shape)
        if tier == self._fast:
            values[self._set] += values.max() + 1
        return values

    def pass_retention(self) -> None:
        """Layers change it, not uses."""

    def _dispatch(self, active: Active) -> Placement:
        return Placement(NO_IDS, active.ids)

    def _largest_share(self) -> int:
        layers, experts = self.shape.layers, self.shape.experts
        if not self.capacity.accelerator or self._slots >= self.shape.total:
            return self._room // layers
        # The largest with layers * share + 2 * (experts - share) <= slots; of two layers or fewer, all is streamed.
        return max(self._slots - 2 * experts, 0) // (layers - 2) if layers > 2 else 0

    def _rest(self, layer: int) -> Ids:
        """Experts of the layer that are streamed."""
        return layer * self.shape.experts + np.arange(self._share, self.shape.experts)


def _latest_first(layer: int, shape: ModelShape) -> Values:
    """The longer ago an expert's layer had its turn in the endless round of layers, the less it is worth; ``layer``
    has it now, and that after it had it longest ago."""
    ago = (layer - np.arange(shape.layers)) % shape.layers
    return np.repeat((shape.layers - ago).astype(np.float64), shape.experts)
