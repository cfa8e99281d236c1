"""FreeToken: one LRU for all layers, and misses shared between link and CPU."""

from __future__ import annotations

import numpy as np

from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.order import Active, Order, Recency
from moespac.types import Ids


class FreeTokenPolicy(CachePolicy):
    """[code] One global LRU; of a layer's misses a share of BW_link / BW_cpu is fetched and computed on the device,
    the most recently active first; the CPU computes the others where they are; no prefetch.

    Assumed by us: bandwidths as measured (``costs.link`` against one token's expert on the host), the share rounded
    down; no more is fetched than the device has slots beside the layer's hits. An expert that the CPU computed
    was active, though it was not in the cache.
    """

    name = "freetoken"
    on_demand = True
    speculates = False

    def _order(self, slots: int) -> Order:
        return Recency(self.shape.total)

    def _dispatch(self, active: Active) -> tuple[Ids, Ids]:
        hits, misses = active.ids[active.held], active.ids[~active.held]
        misses = misses[np.argsort(-self._orders["accelerator"].values()[misses], kind="stable")]
        share = min(float(self.costs.host_expert(np.array([1]))[0]) / self.costs.link, 1.0)
        fetched = min(int(share * len(misses)), self._slots - len(hits))
        return misses[fetched:], np.concatenate([hits, misses[:fetched]])
