"""What experts took, entered into a curve's samples in native code: twin of ``cost._Samples.add_in_python``."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from moespac.experts.kernels.library import Samples, address, load_library


class NativeSamples:
    """Over arrays of its owner, which it holds."""

    def __init__(self, library: ctypes.CDLL, samples: Samples, *held: NDArray) -> None:
        self._observe, self._observe_one = library.moespac_observe, library.moespac_observe_one
        self._held = (samples, held)
        self._address = ctypes.addressof(samples)

    @staticmethod
    def over(
        first: float,
        further: float,
        there: NDArray[np.float64],
        latest: NDArray[np.float64],
        seen: NDArray[np.int64],
    ) -> NativeSamples | None:
        """None: there is no native code."""
        library = load_library()
        if library is None:
            return None
        arrays = (there, latest, seen)
        samples = Samples(*latest.shape, first, further, *(address(array) for array in arrays))
        return NativeSamples(library, samples, *arrays)

    def add(self, tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        assert tokens.dtype == np.int64 and tokens.size == seconds.size
        if not seconds.flags.c_contiguous:
            seconds = seconds.copy()
        self._observe(self._address, address(tokens), address(seconds), tokens.size)

    def add_one(self, tokens: int, seconds: float) -> None:
        self._observe_one(self._address, tokens, seconds)
