"""Specter: the target drafts for itself in four bits, and its routing counts say what to fetch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.policy.base import Counts
from moespac.policy.baselines.drafted import DraftedPolicy
from moespac.types import Ids


class SpecterPolicy(DraftedPolicy):
    """[code] LRU slots, what is resident runs first. The routing of an int4 self-draft (K = 8 to 16) is counted;
    the first plan is made after 0.2 K drafted tokens, each plan fetches the most counted experts, the next is made
    when the transfers of the last should be done. Misses run on the device.

    Assumed by us: one plan with the whole draft's counts, as long as all those plans together: what the transfers
    can bring in the 0.8 K tokens after the first; of equal counts, the shallower layer first.
    """

    name = "specter"

    def _choose(self, suggested: Counts, absent: NDArray[np.bool_], seconds: float) -> Ids:
        brought = int(seconds * (1 - self._config.first_plan) / self._fetch_seconds)
        counts, missing = suggested.ravel(), np.flatnonzero(absent)
        resident = np.flatnonzero((counts > 0) & ~absent.ravel())
        most_counted = missing[np.argsort(-counts[missing], kind="stable")][:brought]
        return np.concatenate([resident, most_counted])
