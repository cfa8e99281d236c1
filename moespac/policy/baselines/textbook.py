"""What the textbook caches share: they take every miss in, and foresee nothing."""

from __future__ import annotations

from dataclasses import replace

from moespac.policy.base import Counts
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.order import Active
from moespac.types import Ids, Placement, Residency


class TextbookPolicy(CachePolicy):
    """One global cache per tier. A miss is loaded and computed on the accelerator or, with
    ``BaselineConfig.miss_on = "host"``, computed by the host at once and loaded behind it for the next time."""

    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        placement = super().place(layer, counts, residency)
        if not self.capacity.accelerator:
            return placement
        return replace(placement, prefetch=self._fetch(placement.host, residency))

    def _dispatch(self, active: Active) -> tuple[Ids, Ids]:
        if self._config.miss_on == "host":
            return active.ids[~active.held], active.ids[active.held]
        return super()._dispatch(active)
