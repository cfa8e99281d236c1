"""``policy.foresight.Foresight`` for the library, and the memory that it needs."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels import library
from moespac.experts.kernels.decoder import MAX_TOKENS
from moespac.policy.foresight import Foresight
from moespac.types import ModelShape


class NativeForesight:
    """Of passes over a model of this ``shape``."""

    def __init__(self, known: Foresight, shape: ModelShape) -> None:
        config, cells = known.config, (known.config.layers, known.config.layers)
        self.known = known
        self.worth = np.zeros(shape.total)
        self.margins = np.zeros((*cells, MAX_TOKENS, shape.experts), np.float32)
        self._soon, self._urgency = np.zeros(shape.total, np.int64), np.zeros(shape.total)
        self._heard = np.empty(cells, np.int64)
        self._foresight = library.Foresight(
            *(config.layers, shape.experts, MAX_TOKENS, config.least, config.fade, config.step),
            *(known.weights.ctypes.data, self.worth.ctypes.data),
            soon=self._soon.ctypes.data,
            urgency=self._urgency.ctypes.data,
            heard=self._heard.ctypes.data,
            margins=self.margins.ctypes.data,
        )

    @property
    def soon(self) -> NDArray[np.int64]:
        """Experts that wait to be read early, the most urgent first."""
        return self._soon[self._foresight.first : self._foresight.end_soon]

    def begin(self) -> int:
        """A pass begins: nothing was heard of it. Its address."""
        self._heard.fill(-1)
        self._foresight.end = self._foresight.first = self._foresight.end_soon = 0
        return ctypes.addressof(self._foresight)
