"""Coverage: what share of the demand the experts held in fast memory would have served, from a routing trace.

No clock and no transfers: before each window an estimator orders all experts, the best of them are held, and
the window's true routing is counted against them. This judges estimators, not systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.sensors import DemandSensor
from moespac.policy.utility import ReferenceLevels, UtilityEstimator
from moespac.types import Ids, ModelShape, Observation, Window

Counts = NDArray[np.int64]  # (layers * experts,) tokens of a window routed to each expert


class RoutingTrace(NamedTuple):
    """Decoded sequences, one after the other."""

    tokens: Ids  # (N,) the token fed at each step
    routing: NDArray[np.integer]  # (N, layers, k) the experts it was routed to
    offsets: Ids  # (sequences + 1,) where each sequence begins
    experts: int  # experts per layer

    @property
    def shape(self) -> ModelShape:
        return ModelShape(self.routing.shape[1], self.experts, self.routing.shape[2], record_bytes=1)


class Coverage(NamedTuple):
    """Shares of the demand that was held, 0..1."""

    tokens: float  # of the (token, expert) routings
    experts: float  # of the distinct experts that each window needs: the rest had to be moved


class Estimator(Protocol):
    """What is judged."""

    def order(self, window: Window) -> NDArray[np.floating]:
        """(layers * experts,) the value of holding each expert for ``window``."""

    def observe(self, window: Window, routing: Ids, counts: Counts) -> None:
        """What the window showed: ``routing`` (layers, T, k), and the same as counts."""


Make = Callable[[ModelShape, float], Estimator]  # for the shape of a model and the share of experts held


def coverage(trace: RoutingTrace, make: Make, residency: float, window: int = 5, folds: int = 5) -> Coverage:
    """Judge ``make(shape, residency)`` by leaving out: for each fold of the sequences a fresh one observes
    all others, then is measured. With one fold nothing is left to warm up on: it is measured cold, over all.

    ``window`` tokens a pass, all accepted; ``residency`` is the share of all experts that is held.
    """
    held, demand = np.zeros(2), np.zeros(2)
    for fold in range(folds):
        estimator = make(trace.shape, residency)
        sequences = range(len(trace.offsets) - 1)
        for seen in (s for s in sequences if s % folds != fold):
            for passed in _windows(trace, seen, window):
                estimator.observe(*passed)
        for judged in sequences[fold::folds]:
            for passed in _windows(trace, judged, window):
                _count(passed[2], estimator.order(passed[0]), residency, held, demand)
                estimator.observe(*passed)
    return Coverage(*(held / demand).tolist())


def bound(trace: RoutingTrace, residency: float, window: int = 5) -> Coverage:
    """What no estimator can beat: the coverage if each window's true counts were known before it."""
    held, demand = np.zeros(2), np.zeros(2)
    for sequence in range(len(trace.offsets) - 1):
        for _, _, counts in _windows(trace, sequence, window):
            _count(counts, counts, residency, held, demand)
    return Coverage(*(held / demand).tolist())


class MovingAverage:
    """The plainest sensor: a moving average of the counts."""

    def __init__(self, shape: ModelShape, residency: float, keep: float = 0.8) -> None:
        self._average = np.zeros(shape.total)
        self._keep = keep

    def order(self, window: Window) -> NDArray[np.floating]:
        return self._average

    def observe(self, window: Window, routing: Ids, counts: Counts) -> None:
        self._average = self._keep * self._average + (1 - self._keep) * counts


class Reference:
    """The state machine of the paper's public code."""

    def __init__(self, shape: ModelShape, residency: float) -> None:
        self._machine = ReferenceLevels(shape)

    def order(self, window: Window) -> NDArray[np.floating]:
        return self._machine.levels.ravel().astype(np.float64)

    def observe(self, window: Window, routing: Ids, counts: Counts) -> None:
        self._machine.observe(counts.reshape(self._machine.levels.shape))


class Fused:
    """Our sensors' expected counts, without levels."""

    def __init__(self, shape: ModelShape, residency: float, config: PolicyConfig | None = None) -> None:
        self._sensor = DemandSensor(shape, (config or PolicyConfig()).sensors)

    def order(self, window: Window) -> NDArray[np.floating]:
        return self._sensor.expected(window).counts

    def observe(self, window: Window, routing: Ids, counts: Counts) -> None:
        self._sensor.observe(Observation(window, routing, accepted=window.drafted))


class Utility(Fused):
    """The same with levels: the order that the policy prefetches and evicts in."""

    def __init__(self, shape: ModelShape, residency: float, config: PolicyConfig | None = None) -> None:
        super().__init__(shape, residency, config)
        self._utility = UtilityEstimator(shape, residency, (config or PolicyConfig()).utility)

    def order(self, window: Window) -> NDArray[np.floating]:
        demand = self._sensor.expected(window).per_token
        self._utility.observe(demand)
        return self._utility.order(demand)


ESTIMATORS: dict[str, Make] = {
    "reference": Reference,
    "moving-average": MovingAverage,
    "fused": Fused,
    "utility": Utility,
}


def _count(counts: Counts, order: NDArray, residency: float, held: NDArray, demand: NDArray) -> None:
    """Add what the best ``residency`` of ``order`` serve to ``held``, and all of ``counts`` to ``demand``."""
    best = np.argsort(-order, kind="stable")[: round(residency * len(order))]
    held += counts[best].sum(), np.count_nonzero(counts[best])
    demand += counts.sum(), np.count_nonzero(counts)


def _windows(trace: RoutingTrace, sequence: int, size: int) -> Iterator[tuple[Window, Ids, Counts]]:
    """The whole windows of a sequence: the window, its routing (layers, T, k) and its counts."""
    shape = trace.shape
    first = np.arange(shape.layers)[:, None, None] * shape.experts
    begin, end = trace.offsets[sequence : sequence + 2].tolist()
    for at in range(begin, end - size + 1, size):
        routing = trace.routing[at : at + size].swapaxes(0, 1).astype(np.int64)
        counts = np.bincount((routing + first).ravel(), minlength=shape.total)
        yield Window(trace.tokens[at : at + size].astype(np.int64), drafted=size - 1), routing, counts
