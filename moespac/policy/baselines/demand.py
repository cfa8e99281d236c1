"""Whom tokens wanted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.types import Ids, ModelShape, Observation


def tokens_by_expert(observation: Observation, shape: ModelShape) -> NDArray[np.int64]:
    """(layers, experts) tokens of the pass routed to each; rejected drafts wanted nothing."""
    kept = len(observation.window.tokens) - observation.window.drafted + observation.accepted
    routed = observation.routing[:, :kept]
    flat = (routed + np.arange(shape.layers)[:, None, None] * shape.experts)[routed >= 0]
    return np.bincount(flat, minlength=shape.total).reshape(shape.layers, shape.experts)


def used_in(layer: int, routing: NDArray[np.int64], shape: ModelShape) -> Ids:
    """Experts that layers from ``layer`` on used, in the order of use; ``routing`` (layers, T, k), -1: nobody."""
    first = (layer + np.arange(len(routing))) * shape.experts
    return np.unique((routing + first[:, None, None])[routing >= 0])
