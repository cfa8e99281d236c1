"""SP-MoE (2025): the drafter's attention outputs through the target's gates, down to a cut-off layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.policy.base import Counts
from moespac.policy.baselines.drafted import DraftedPolicy
from moespac.types import Ids


class SpMoePolicy(DraftedPolicy):
    """[abs] While drafting, the drafter's attention output at layer l goes through the target's gate l; the top k
    are prefetched, for the layers up to a cut-off whose transfers fit the drafting time. LRU; misses run on the
    device.

    Assumed by us: the cut-off counts the transfers of what is absent; whole layers in order, in each of them the
    experts that most drafted tokens want first.
    """

    name = "sp-moe"

    def _choose(self, suggested: Counts, absent: NDArray[np.bool_], seconds: float) -> Ids:
        until = absent.sum(axis=1).cumsum() * self._fetch_seconds  # when each layer's transfers would be done
        layers = int(np.searchsorted(until, seconds, side="right"))
        layer, expert = np.nonzero(suggested[:layers])
        ordered = np.lexsort((-suggested[layer, expert], layer))
        return (layer * self.shape.experts + expert)[ordered]
