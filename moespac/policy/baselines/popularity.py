"""Static placements of the experts that were popular in a calibration run."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.baselines.demand import tokens_by_expert
from moespac.policy.baselines.static import StaticPolicy
from moespac.policy.cost import CostModel
from moespac.types import Capacity, Ids, ModelShape, Observation


class PopularPolicy(StaticPolicy):
    """Calibrates on its own first passes: a uniform set before, the most popular experts of those after."""

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._popularity = np.zeros((shape.layers, shape.experts), np.int64)  # tokens
        self._observed = 0  # passes
        self._hold(self._rank(self._popularity)[: self._room])

    def observe(self, observation: Observation) -> None:
        if self._observed == self._config.calibration_passes:
            return
        self._observed += 1
        self._popularity += tokens_by_expert(observation, self.shape)
        if self._observed == self._config.calibration_passes:
            self._hold(self._rank(self._popularity)[: self._room])

    @abstractmethod
    def _rank(self, popularity: NDArray[np.int64]) -> Ids:
        """All experts, those to hold first; ``popularity`` (layers, experts)."""


def rank_in_layers(popularity: NDArray[np.int64]) -> Ids:
    """All layers' most popular experts, then all layers' second, and so on: any cut holds as many of each layer."""
    layers, experts = popularity.shape
    ranked = np.argsort(-popularity, axis=1, kind="stable")
    return (ranked + np.arange(layers)[:, None] * experts).T.ravel()
