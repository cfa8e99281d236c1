"""KTransformers: hybrid inference with a static mask of experts on the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.policy.baselines.popularity import PopularPolicy, rank_in_layers
from moespac.types import Ids


class KTransformersPolicy(PopularPolicy):
    """A static mask, uniform or by frequency: the same number of experts of each layer is on the device, the CPU
    computes the others.

    Assumed by us: uniform for the first ``BaselineConfig.calibration_passes`` passes, then by what they showed.
    """

    name = "ktransformers"
    speculates = False

    def _rank(self, popularity: NDArray[np.int64]) -> Ids:
        return rank_in_layers(popularity)
