"""One cache in each layer, as an order over all experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.policy.baselines.order import Values


def prefer_in_each_layer(worth: NDArray[np.float64], slots: int) -> Values:
    """``worth`` (layers, experts), 0 or more, so raised that each layer's best ``slots`` come before all others.

    An expert worth 0 was never used and is in no cache. What exceeds the caches goes first, by worth.
    """
    experts = worth.shape[1]
    slots = min(slots, experts)
    if slots:
        least = np.partition(worth, experts - slots, axis=1)[:, experts - slots, None]
        worth = worth + (worth.max() + 1) * ((worth >= least) & (worth > 0))
    return worth.ravel().copy()
