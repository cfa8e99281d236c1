"""Context: what the routing of all layers together says of each expert, learned as a linear map.

The product of averages and token table sees one expert at a time. But routing is redundant: a few directions over
all layers tell the kind of text, and that tells much about each expert. So the views of the demand (expected by the
product, and recent at several speeds) are projected on their principal directions, and a ridge regression from
there learns, window by window, what the product misses. Ours; what it is worth is in docs/log.md.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from moespac.config import ContextConfig
from moespac.types import ModelShape

Rates = NDArray[np.float32]  # (layers * experts,) expected routings per token
Features = NDArray[np.float32]  # (views * directions + 1,)


class Context:
    """A correction of expected rates, learned online in blocks of windows.

    It predicts (true - expected) / sqrt(expected), whose noise is about the same for rare experts as for frequent
    ones, so that one regression matrix serves all experts.
    """

    def __init__(self, shape: ModelShape, views: int, config: ContextConfig) -> None:
        """``views``: how many rates ``features`` will be given. Directions are those of what is expected."""
        self._config = config
        self._views = views
        directions, width = min(config.directions, shape.total), shape.total
        size = views * directions + 1
        self._unit = np.float32((shape.layers * shape.top_k) ** 0.5)  # length of the roots of a token's rates
        self._spread = np.zeros(directions, np.float32)  # weight of each direction in the sketch
        self._basis = np.zeros((directions, width), np.float32)
        self._gram = np.zeros((size, size))
        self._moments = np.zeros((size, width), np.float32)
        self._weights = np.zeros((size, width), np.float32)
        self._block: list[tuple[Features, NDArray, NDArray, int]] = []  # windows to learn from

    def features(self, *views: Rates) -> Features:
        """The views in the principal directions, and a constant. Roots of rates: their noise is even, too."""
        return np.append(self._project(*views), np.float32(1))

    def other_demand(self, features: Features, expected: Rates) -> Features:
        """``features`` with another first view, what is expected; the other views being as they were."""
        first = self._project(expected)
        return np.concatenate([first, features[len(first) :]])

    def correct(self, expected: Rates, features: Features) -> Rates:
        """``expected`` with what the product of sensors misses; a tenth of it at least: that keeps their order."""
        with _one_thread():
            corrected = expected + self._scale(expected) * (features @ self._weights)
        return np.maximum(corrected, expected / 10)

    def learn(self, features: Features, expected: Rates, true: Rates, tokens: int) -> None:
        """``tokens`` of which ``expected`` was foreseen with these ``features`` had the mean routing ``true``."""
        missed = (true - expected) / self._scale(expected)
        self._block.append((features, np.sqrt(expected) / self._unit, missed, tokens))
        if len(self._block) == self._config.block:
            self._learn_block()

    def state(self) -> dict[str, NDArray]:
        """What was learned, without the windows that still wait to fill a block."""
        return {
            "basis": self._basis,
            "spread": self._spread,
            "gram": self._gram,
            "moments": self._moments,
        }

    def restore(self, state: dict[str, NDArray]) -> None:
        """Take over the ``state`` of another one of the same shape."""
        self._basis, self._spread = state["basis"], state["spread"]
        self._gram, self._moments = state["gram"], state["moments"]
        self._solve()

    def _project(self, *views: Rates) -> Features:
        roots = np.sqrt(np.stack(views)) / self._unit
        with _one_thread():
            return np.ravel(roots @ self._basis.T).astype(np.float32, copy=False)

    def _scale(self, expected: Rates) -> Rates:
        return np.sqrt(expected + np.float32(self._config.floor))

    def _learn_block(self) -> None:
        features, roots, missed, tokens = (np.stack(part) for part in zip(*self._block, strict=True))
        self._block.clear()
        weighted = features * tokens[:, None].astype(np.float32)
        self._gram += weighted.T @ features
        self._moments += weighted.T @ missed
        with _one_thread():
            self._turn(roots)
            self._solve()

    def _turn(self, roots: NDArray[np.float32]) -> None:
        """Let the basis follow the principal directions of all ``roots`` (block, width) seen, of which it is a
        sketch, and express what was learned in the new one."""
        sketch = np.concatenate([self._spread[:, None] * self._basis, roots]).astype(np.float64)
        variance, vectors = np.linalg.eigh(sketch @ sketch.T)
        variance, vectors = variance[: -len(self._basis) - 1 : -1], vectors[:, : -len(self._basis) - 1 : -1]
        real = variance > 1e-9 * variance[0]  # a small model has fewer directions than the basis
        self._spread = np.sqrt(np.where(real, variance, 0)).astype(np.float32)
        scaled = vectors * np.divide(1, np.sqrt(variance), where=real, out=np.zeros_like(variance))
        basis = (scaled.T @ sketch).astype(np.float32)
        turn, self._basis = basis @ self._basis.T, basis
        self._gram = self._turned(self._turned(self._gram, turn).T, turn)
        self._moments = self._turned(self._moments, turn)

    def _turned(self, rows: NDArray, turn: NDArray) -> NDArray:
        """``rows`` (views * directions + 1, any), those of each view turned; the constant stays."""
        views = turn @ rows[:-1].reshape(self._views, len(turn), -1)
        return np.concatenate([views.reshape(len(rows) - 1, -1), rows[-1:]])

    def _solve(self) -> None:
        ridge = self._config.ridge * np.eye(len(self._gram))
        self._weights = np.linalg.inv(self._gram + ridge).astype(np.float32) @ self._moments


def _one_thread() -> AbstractContextManager[object]:
    """Small matrices wait longer for a second thread than they take: milliseconds beside other programs."""
    return _blas().limit(limits=1)


@functools.cache
def _blas() -> ThreadpoolController:
    """numpy's linear algebra; looking for its library takes milliseconds."""
    return ThreadpoolController()
