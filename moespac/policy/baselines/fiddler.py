"""Fiddler (Kamahori et al., 2024): each miss where it costs less."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.policy.baselines.order import Active
from moespac.policy.baselines.popularity import PopularPolicy, rank_in_layers
from moespac.types import Ids, Placement


class FiddlerPolicy(PopularPolicy):
    """[code] The most popular experts of a calibration trace are on the device for good. Any other runs on the CPU,
    at a cost proportional to its tokens, or is transferred for this once, whichever costs less (in the source 7 per
    token against 70).

    Assumed by us: the costs as measured; popularity over all layers from the first
    ``BaselineConfig.calibration_passes`` passes, uniform until then; transfers pass through a few slots
    (``streaming_slots``) that are no part of the set.
    """

    name = "fiddler"
    speculates = False
    passes_through = True

    def _rank(self, popularity: NDArray[np.int64]) -> Ids:
        uniform = rank_in_layers(np.zeros_like(popularity))
        return uniform[np.argsort(-popularity.ravel()[uniform], kind="stable")]

    def _dispatch(self, active: Active) -> Placement:
        on_host = active.tokens * self.costs.host_expert(np.array([1]))
        transferred = ~active.held & (on_host > self.costs.link)
        on_accelerator = np.concatenate([active.ids[active.held], active.ids[transferred]])
        return Placement(active.ids[~active.held & ~transferred], on_accelerator)
