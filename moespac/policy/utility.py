"""ESTIMATE: expected demand -> discrete utility levels, and the order that prefetch and eviction share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.config import UtilityConfig
from moespac.policy.sensors import Rates
from moespac.types import ModelShape

Levels = NDArray[np.int8]  # (layers, experts), 0..U

_BINS = 64  # of the demand histogram: 4 to a factor of two, from 2**-16 to 1
_BINS_PER_OCTAVE = 4


class Calibration:
    """Per-layer boundaries between levels, at quantiles of a running histogram of demand.

    The middle boundary lets through as many experts as memory can hold; the others larger and smaller shares,
    evenly spaced in logits. So levels keep their meaning when K, acceptance or the text shift.
    """

    def __init__(self, shape: ModelShape, held: float, config: UtilityConfig) -> None:
        """``held``: the share of a layer's experts that fast memory holds, 0..1."""
        self._histogram = np.zeros((shape.layers, _BINS))
        self._keep = np.exp(-1 / config.histogram_windows)
        self._row = np.arange(shape.layers)[:, None]
        middle = np.log(np.clip(held, 0.02, 0.98) / (1 - np.clip(held, 0.02, 0.98)))
        offsets = config.spread * (np.arange(1, config.levels + 1) - (config.levels + 1) / 2)
        self._shares = 1 / (1 + np.exp(offsets - middle))  # (U,) of a layer's experts at or above each level

    def levels(self, demand: Rates) -> Levels:
        """The calibrated level of each expert's ``demand`` (layers * experts,); moves the boundaries too."""
        bins = self._bins(demand)
        flat = (bins + self._row * _BINS).ravel()
        self._histogram *= self._keep
        self._histogram += np.bincount(flat, minlength=self._histogram.size).reshape(self._histogram.shape)
        above = np.cumsum(self._histogram[:, ::-1], axis=1)[:, ::-1]
        above -= self._histogram / 2  # a bin counts as where its middle lies
        share = above / above[:, :1]
        level_of_bin = (share[:, :, None] <= self._shares).sum(axis=-1, dtype=np.int8)  # (layers, bins)
        return level_of_bin.ravel()[flat].reshape(bins.shape)

    def _bins(self, demand: Rates) -> NDArray[np.int64]:
        octaves = np.log2(np.maximum(demand, 2.0**-16)) + 16
        bins = np.minimum((octaves * _BINS_PER_OCTAVE).astype(np.int64), _BINS - 1)
        return bins.reshape(len(self._row), -1)


class UtilityEstimator:
    """Levels with inertia: each moves at most one step per observation towards its calibrated level."""

    def __init__(self, shape: ModelShape, held: float, config: UtilityConfig) -> None:
        self.levels: Levels = np.zeros((shape.layers, shape.experts), np.int8)
        self.highest = (
            self.levels
        )  # or the calibrated level where that is higher: demand known to come does not wait
        self._calibration = Calibration(shape, held, config)
        self._config = config

    def observe(self, demand: Rates) -> None:
        """``demand`` (layers * experts,): expected routings per window token."""
        calibrated = self._calibration.levels(demand)
        self.levels = step(self.levels, calibrated, self._config.up, self._config.down)
        self.highest = np.maximum(self.levels, calibrated)

    def order(self, demand: Rates) -> NDArray[np.float64]:
        """(layers * experts,) the utility of each expert: its demand, with its level as the steadier half.

        The weight of the level is small: what the drafted tokens say must win (docs/log.md).
        """
        return demand + self._config.level_weight * self.levels.ravel().astype(np.float64)


class ReferenceLevels:
    """The state machine of the paper's public code, to compare with: raw counts, no calibration."""

    def __init__(self, shape: ModelShape, levels: int = 5, up: float = 5, down: float = 1) -> None:
        self.levels: Levels = np.zeros((shape.layers, shape.experts), np.int8)
        self._most, self._up, self._down = levels, up, down

    def observe(self, counts: NDArray[np.integer]) -> None:
        """``counts`` (layers, experts): tokens of the last window routed to each."""
        self.levels = np.minimum(step(self.levels, counts, self._up, self._down), self._most)


def step(levels: Levels, target: NDArray[np.number], up: float, down: float) -> Levels:
    """Inertial transition: up where ``target - level >= up``, down where ``level - target >= down``."""
    gap = target - levels
    return levels + (gap >= up).astype(np.int8) - (gap <= -down).astype(np.int8)
