"""What each part of the method is worth: moe-spac with one part taken out at a time, simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.policy.sensors import DemandSensor, Expectation, Lesson, Rates
from moespac.policy.split import place_by_finish
from moespac.policy.utility import Levels, UtilityEstimator, step
from moespac.sim.result import SimResult
from moespac.sim.simulator import PolicyFactory, Setting
from moespac.sim.study import Task, simulate_all
from moespac.trace.schema import Trace
from moespac.types import Capacity, Ids, ModelShape, Observation, Placement, Residency, Window

_KEPT = 0.8  # of the moving average, a pass: the plain one that docs/log.md compares with


class MovingAverage(DemandSensor):
    """In the estimator's place: the routings a token of the passes so far, and nothing of the drafted tokens."""

    def rate(self) -> Rates:
        return self.average.copy()

    def lasting(self) -> Rates:
        return self.average.copy()

    def lasting_step(self, tokens: float) -> float:
        return 1 - _KEPT

    def expected(self, window: Window) -> Expectation:
        tokens = float(self.acceptance.weights(window).sum())
        return Expectation(self.average * np.float32(tokens), tokens)

    def restart(self, rate: Rates, tokens: float) -> None:
        super().restart(rate, tokens)
        self.average = rate.copy()

    def follow(self, observation: Observation) -> Lesson:
        lesson = super().follow(observation)
        routed = lesson.routed
        counts = np.bincount(routed[routed >= 0], minlength=self.shape.total).astype(np.float32)
        self.average = np.float32(_KEPT) * self.average + np.float32((1 - _KEPT) / len(routed)) * counts
        return lesson

    def learn(self, lesson: Lesson) -> None:
        """There is nothing else."""


class NoEstimator(MoeSpacPolicy):
    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._demand = MovingAverage(shape, config.sensors)
        self._expect(self._demand.rate(), 1)


class RawLevels(UtilityEstimator):
    """Levels straight from counts, the boundaries fixed."""

    def observe(self, demand: Rates) -> None:
        level = np.minimum(
            np.rint(demand.reshape(self.levels.shape) * self._config.levels), self._config.levels
        )
        self.levels = step(self.levels, level, self._config.up, self._config.down)
        self.highest: Levels = np.maximum(self.levels, level.astype(np.int8))


class NoCalibration(MoeSpacPolicy):
    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs, config)
        self._utility = RawLevels(shape, 0.5, config.utility)
        self._expect(self._demand.rate(), 1)


class NoBalancer(MoeSpacPolicy):
    def _rebalance(self, expected: Rates, residency: Residency) -> None:
        """The reference code's constant threshold: 1 in every layer."""
        ones = np.ones(self.shape.layers, np.int64)
        self._thresholds = {"host": ones, "accelerator": ones}


class NoSplit(MoeSpacPolicy):
    def place(self, layer: int, counts: NDArray[np.int64], residency: Residency) -> Placement:
        """What is on the accelerator is computed there, all misses on the host."""
        ids = layer * self.shape.experts + np.flatnonzero(counts)
        there = (residency.accelerator | residency.arriving_accelerator).ravel()[ids]
        self._freshen(layer, counts)
        return Placement(ids[~there], ids[there])


class NoStakes(MoeSpacPolicy):
    def place(self, layer: int, counts: NDArray[np.int64], residency: Residency) -> Placement:
        """The split looks at this layer's makespan only."""
        self._freshen(layer, counts)
        return place_by_finish(layer, counts, residency, self.costs)


class NoPrefetch(MoeSpacPolicy):
    def _copies(self, residency: Residency, price: float) -> Ids:
        """Nothing is copied ahead but into free slots."""
        return super()._copies(residency, price=float("inf"))


@dataclass(frozen=True)
class Part:
    """One part, and the world without it."""

    name: str
    replaced_by: str
    factory: PolicyFactory = MoeSpacPolicy
    change: Callable[[Setting], Setting] = lambda setting: setting


def _all_drafts_count(setting: Setting) -> Setting:
    sensors = replace(setting.engine.method.sensors, acceptance_prior=1.0, acceptance_passes=float("inf"))
    method = replace(setting.engine.method, sensors=sensors)
    return replace(setting, engine=replace(setting.engine, method=method))


def _ungoverned(setting: Setting) -> Setting:
    return replace(setting, governed=frozenset())


def _plain(setting: Setting) -> Setting:
    return replace(setting, window=0)


FULL = Part("nothing", "the whole method")
PARTS = (
    FULL,
    Part("estimator", "a moving average of counts", NoEstimator),
    Part("calibration", "levels at fixed counts", NoCalibration),
    Part("balancer", "threshold 1 in every layer", NoBalancer),
    Part("dispatch split", "all misses on the CPU", NoSplit),
    Part("worth of a copy", "a split for this layer alone", NoStakes),
    Part("prefetch", "copies on need only", NoPrefetch),
    Part("governor of K", "K fixed", change=_ungoverned),
    Part("acceptance weights", "every draft counts fully", change=_all_drafts_count),
    Part("speculation", "K = 0", change=_plain),
)


def ablate(
    trace: Trace,
    setting: Setting,
    sequences: Sequence[int],
    jobs: int,
    progress: Callable[[int, int], None],
) -> list[tuple[Part, SimResult]]:
    """Every part's absence, over the same ``sequences``; the first is the whole method."""
    tasks = [Task(MoeSpacPolicy.name, part.change(setting), tuple(sequences), part.factory) for part in PARTS]
    return list(zip(PARTS, simulate_all(trace, tasks, jobs, progress), strict=True))
