"""MoE-Infinity (Xue et al., 2024): sequences that began alike go on alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.demand import tokens_by_expert
from moespac.policy.baselines.order import Active, Order, Values
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Capacity, Ids, ModelShape, Observation, Residency

Matrix = NDArray[np.float64]  # (layers, experts) tokens of a sequence routed to each expert


class InCacheVisits:
    """The fewest visits since the expert came into the cache first; deep layers before shallow ones."""

    def __init__(self, shape: ModelShape) -> None:
        self._visits = np.zeros(shape.total)
        self._decay = np.repeat(1 - np.arange(shape.layers) / shape.layers, shape.experts)

    def use(self, active: Active) -> None:
        self._visits[active.ids] = np.where(active.held, self._visits[active.ids], 0) + 1

    def values(self) -> Values:
        return self._visits * self._decay


class Collection:
    """Activation matrices of past sequences, rows of unit length; a new one replaces the most similar when full."""

    def __init__(self, shape: ModelShape, size: int) -> None:
        self._matrices = np.zeros((size, shape.layers, shape.experts))
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def __getitem__(self, index: int) -> Matrix:
        return self._matrices[index]

    def cosines(self, layer: int, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """(len,) of ``row`` and the row of ``layer`` in each matrix."""
        return self._matrices[: self._filled, layer] @ _units(row)

    def add(self, matrix: Matrix) -> None:
        if self._filled < len(self._matrices):
            place = self._filled
            self._filled += 1
        else:
            cosines = np.einsum("nle,le->n", self._matrices, _units(matrix))
            place = int(cosines.argmax())
        self._matrices[place] = _units(matrix)


class MoeInfinityPolicy(CachePolicy):
    """[code] Per sequence a matrix of how many tokens each expert got; the collection's nearest, by the mean cosine
    of rows up to layer l, tells what layers j > l will want: its row's share times 1 - (j - l) / (L + 1), fetched
    in descending order. (The code masks the wrong rows; this follows the paper.) [code] The expert with the fewest
    visits since it came is evicted, with the paper's layer decay: shallow layers leave no time to prefetch. Misses
    run on the device.

    Assumed by us: a sequence ends when another prefill begins (a driver without prefills has one sequence and
    no prefetches); a full collection gives up its most similar matrix; the decay is 1 - l / L; ahead of each
    layer the first ``BaselineConfig.prefetch_list`` absent experts are listed.
    """

    name = "moe-infinity"
    speculates = False

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._collection = Collection(shape, self._config.sequences)
        self._sequence = np.zeros((shape.layers, shape.experts))
        self._prefilling = False
        self._similarity = np.zeros(0)  # (len(collection),) sum of the cosines of this pass's rows so far

    def observe(self, observation: Observation) -> None:
        if observation.window.prefill and not self._prefilling:
            if self._sequence.any():
                self._collection.add(self._sequence)
            self._sequence[:] = 0
        self._prefilling = observation.window.prefill
        self._sequence += tokens_by_expert(observation, self.shape)

    def _order(self, slots: int) -> Order:
        return InCacheVisits(self.shape)

    def _look_ahead(self, layer: int, active: Active, residency: Residency) -> Ids:
        if not len(self._collection):
            return NO_IDS
        row = self._sequence[layer].copy()
        row[active.ids - layer * self.shape.experts] += active.tokens
        cosines = self._collection.cosines(layer, row)
        self._similarity = cosines if layer == 0 else self._similarity + cosines
        nearest = self._collection[int(self._similarity.argmax())]
        return self._most_urgent(layer, nearest, residency)

    def _most_urgent(self, layer: int, nearest: Matrix, residency: Residency) -> Ids:
        """By priority, with as many absent ones among them as may be listed. Those that are there, are kept."""
        first = layer + 1
        rows = nearest[first:]
        shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-12)
        nearness = 1 - np.arange(1, len(rows) + 1) / (self.shape.layers + 1)
        priority = (shares * nearness[:, None]).ravel()
        absent = priority[~self._held(residency)[first * self.shape.experts :]]
        listed = self._config.prefetch_list
        least = np.partition(absent, -listed)[-listed] if len(absent) > listed else 0.0
        urgent = np.flatnonzero((priority >= least) & (priority > 0))
        return first * self.shape.experts + urgent[np.argsort(-priority[urgent], kind="stable")]


def _units(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (..., experts) of length 1; empty ones stay empty."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
