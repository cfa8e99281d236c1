"""Coverage: what share of the demand the experts held in fast memory would have served, from a routing trace.

No clock and no transfers: before each window an estimator orders all experts, the best of them are held, and
the window's true routing is counted against them. This judges estimators, not systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.sensors import DemandSensor
from moespac.policy.utility import ReferenceLevels, UtilityEstimator
from moespac.trace.schema import Trace
from moespac.types import Ids, ModelShape, Observation, Window

Counts = NDArray[np.int64]  # (layers * experts,) tokens of a window routed to each expert


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
Sequences = Iterable[tuple[Trace, int]]  # each by its trace and its number in it


def coverage(estimator: Estimator, sequences: Sequences, residency: float, window: int = 5) -> Coverage:
    """Judge ``estimator`` on ``sequences``, from which it goes on learning.

    ``window`` tokens a pass, all accepted; ``residency`` is the share of all experts that is held.
    """
    held, demand = np.zeros(2), np.zeros(2)
    for passed in _windows(sequences, window):
        _count(passed[2], estimator.order(passed[0]), residency, held, demand)
        estimator.observe(*passed)
    return Coverage(*(held / demand).tolist())


def warm(estimator: Estimator, sequences: Sequences, window: int = 5) -> None:
    """Let ``estimator`` live through ``sequences``, as the runs did that saved a profile."""
    for passed in _windows(sequences, window):
        estimator.order(passed[0])  # some learn from what they had expected
        estimator.observe(*passed)


def bound(sequences: Sequences, residency: float, window: int = 5) -> Coverage:
    """What no estimator can beat: the coverage if each window's true counts were known before it."""
    held, demand = np.zeros(2), np.zeros(2)
    for _, _, counts in _windows(sequences, window):
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
    "moe-spac": Utility,
    "reference": Reference,
    "moving-average": MovingAverage,
}


def compare(
    trace: Trace,
    residency: float,
    window: int = 5,
    warm_on: Sequence[Trace] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, str | float]]:
    """All estimators, and the bound, on ``trace``, after each has learned from ``warm_on``.

    ``progress`` is told how many sequences of how many have been replayed.
    """
    judged, known = _sequences(trace), [each for other in warm_on for each in _sequences(other)]
    total = len(ESTIMATORS) * (len(known) + len(judged)) + len(judged)
    done = 0

    def replayed(sequences: Sequences) -> Sequences:
        nonlocal done
        for each in sequences:
            yield each
            done += 1
            progress(done, total)

    found = {}
    for name, make in ESTIMATORS.items():
        estimator = make(trace.shape, residency)
        warm(estimator, replayed(known), window)
        found[name] = coverage(estimator, replayed(judged), residency, window)
    found["known-next-window"] = bound(replayed(judged), residency, window)
    return [
        {"estimator": name, "coverage_tokens": share.tokens, "coverage_experts": share.experts}
        for name, share in found.items()
    ]


def _sequences(trace: Trace) -> list[tuple[Trace, int]]:
    return [(trace, sequence) for sequence in range(trace.sequences)]


def _count(counts: Counts, order: NDArray, residency: float, held: NDArray, demand: NDArray) -> None:
    """Add what the best ``residency`` of ``order`` serve to ``held``, and all of ``counts`` to ``demand``."""
    best = np.argsort(-order, kind="stable")[: round(residency * len(order))]
    held += counts[best].sum(), np.count_nonzero(counts[best])
    demand += counts.sum(), np.count_nonzero(counts)


def _windows(sequences: Sequences, size: int) -> Iterator[tuple[Window, Ids, Counts]]:
    """The whole windows of each sequence: the window, its routing (layers, T, k) and its counts."""
    for trace, sequence in sequences:
        shape = trace.shape
        first = np.arange(shape.layers)[:, None, None] * shape.experts
        decoded = trace.decode_tokens(sequence)
        for at in range(0, len(decoded.tokens) - size + 1, size):
            routing = decoded.routing[at : at + size].swapaxes(0, 1)
            counts = np.bincount((routing + first)[routing >= 0], minlength=shape.total)
            yield Window(decoded.tokens[at : at + size], drafted=size - 1), routing, counts
