"""Foresight: how far the routers of layers to come are believed when they are asked early.

A router that is asked with the residual stream of an earlier layer is mostly right (Fate, 2025: 97% one layer
ahead; the embedded model: 84, 78 and 68% of its choices one, two and three ahead). But of an expert that is
*missing* that is less likely than of others, since history spoke against it. So the log odds of being needed
are learned, by distance, from both: the margin of the router's choice, and what history says. Ours. They are
applied where layers run without asking (csrc/foresight.c), so here is only what is decided and known: what to
ask, and the weights.
"""

from __future__ import annotations

import numpy as np

from moespac.config import ForesightConfig


class Foresight:
    """``weights`` (layers ahead, 3), which whoever asks the routers teaches in place: for the margin, in spreads of
    the layer's logits; for the logarithm of what the expert was worth; and always."""

    def __init__(self, config: ForesightConfig) -> None:
        self.config = config
        self.weights = np.tile(np.array(config.weights), (config.layers, 1))
