"""llama.cpp with the experts of its first layers on the CPU."""

from __future__ import annotations

import numpy as np

from moespac.config import PolicyConfig
from moespac.policy.baselines.order import Active
from moespac.policy.baselines.static import StaticPolicy
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, ModelShape, Placement


class LlamaCppPolicy(StaticPolicy):
    """[code] ``-ncmoe N``: the experts of the first N layers stay with the CPU, which computes them, the others are
    on the device; there is no cache; weights are copied to the device only for batches of at least 32 tokens.

    Assumed by us: as many whole layers as fit. Its buffer for copied weights lies outside of what experts may
    take, but has to lie within it here: batches are copied only where whole layers leave slots over.
    """

    name = "llama.cpp"
    speculates = False

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        whole_layers = self._room // shape.experts
        self._hold(np.arange((shape.layers - whole_layers) * shape.experts, shape.total))

    def _dispatch(self, active: Active) -> Placement:
        batch = active.tokens.sum() / self.shape.top_k
        if batch >= self._config.copy_batch and len(self._set) < self._slots:
            return Placement(NO_IDS, active.ids)
        return super()._dispatch(active)


class LlamaCppSpeculativePolicy(LlamaCppPolicy):
    """The same with a draft model and a fixed K [code]."""

    name = "llama.cpp+sd"
    speculates = True
