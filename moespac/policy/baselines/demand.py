"""How many tokens really wanted each expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.types import ModelShape, Observation


def tokens_by_expert(observation: Observation, shape: ModelShape) -> NDArray[np.int64]:
    """(layers, experts) tokens of the pass routed to each; rejected drafts wanted nothing."""
    kept = len(observation.window.tokens) - observation.window.drafted + observation.accepted
    routed = observation.routing[:, :kept]
    flat = (routed + np.arange(shape.layers)[:, None, None] * shape.experts)[routed >= 0]
    return np.bincount(flat, minlength=shape.total).reshape(shape.layers, shape.experts)
