"""Sensors that look ahead, with a stated accuracy in place of the hidden states that a trace does not have."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def guess(
    routing: NDArray[np.int64], experts: int, accuracy: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(layers, experts) tokens that a sensor expects at each expert.

    ``routing`` (layers, T, k) is the truth, -1 where a token is not routed. Each choice is right with probability
    ``accuracy``, or any of the other experts.
    """
    layers = len(routing)
    other = (routing + rng.integers(1, experts, routing.shape)) % experts if experts > 1 else routing
    guessed = np.where(rng.random(routing.shape) < accuracy, routing, other)
    flat = (guessed + np.arange(layers)[:, None, None] * experts)[routing >= 0]
    return np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
