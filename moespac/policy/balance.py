"""BALANCE over layers: per layer an integer threshold t in 1..U+1; experts at level t or above are worth a
slot of the faster tier, the others are computed, or read, where they lie."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.config import BalanceConfig
from moespac.policy import native
from moespac.policy.cost import CostModel, Seconds
from moespac.policy.sensors import Rates
from moespac.policy.utility import Levels
from moespac.types import Grid

Thresholds = NDArray[np.int64]  # (layers,), 1..U+1
Table = NDArray[np.float64]  # (layers, U+1): a column for each threshold

_STEPS = 64
_RATES = np.arange(_STEPS + 1) / _STEPS  # routings a token at which ``SavedSeconds`` is exact


def slots_needed(levels: Levels, highest: int) -> NDArray[np.int64]:
    """(layers, U+1) experts at or above each threshold 1..U+1; none at the last."""
    return _at_or_above(levels, np.ones(levels.shape), highest).astype(np.int64)


def accelerator_costs(
    levels: Levels, expected: Rates, resident: Grid, costs: CostModel, highest: int, config: BalanceConfig
) -> Table:
    """(layers, U+1) seconds a layer takes if the accelerator holds the experts at or above each threshold.

    The makespan of both devices, and what the transfers of the missing exceed it by: a layer's transfers hide
    behind the computing of another.
    """
    active, tokens = _activity(expected)
    on_accelerator = _at_or_above(levels, active * costs.accelerator_expert(tokens), highest)
    on_host = _below(levels, active * costs.host_expert(tokens), highest)
    moving = _at_or_above(levels, ~resident, highest) * costs.link / config.residency_windows
    return np.maximum(np.maximum(on_accelerator, on_host), moving)


def host_costs(
    levels: Levels, expected: Rates, resident: Grid, costs: CostModel, highest: int, config: BalanceConfig
) -> Table:
    """The same for the host over storage: the layer waits for its misses to be read, then computes."""
    active, tokens = _activity(expected)
    computing = (active * costs.host_expert(tokens)).reshape(levels.shape).sum(axis=1, keepdims=True)
    waiting = computing + _below(levels, active, highest) * costs.storage
    moving = _at_or_above(levels, ~resident, highest) * costs.storage / config.residency_windows
    return np.maximum(waiting, moving)


class SavedSeconds:
    """Seconds that an expert takes off the host in some passes while the accelerator has it, by how often a token
    is routed to it; a curve, since it is asked in every layer."""

    def __init__(self, tokens: float, costs: CostModel, passes: float = 1.0) -> None:
        """In ``passes`` of ``tokens`` (1 or more)."""
        active = 1 - (1 - _RATES) ** tokens
        each = np.maximum(_RATES * tokens / np.maximum(active, 1e-9), 1)
        saved = np.maximum(costs.host_expert(each) - costs.accelerator_expert(each), 0)
        self.curve = passes * active * saved
        self._rise = np.diff(self.curve)

    def __call__(self, rates: NDArray[np.floating]) -> NDArray[np.float64]:
        """For each of the ``rates``, 0 to 1."""
        steps = rates * np.float64(_STEPS)
        whole = np.minimum(steps.astype(np.int64), _STEPS - 1)
        return self.curve[whole] + (steps - whole) * self._rise[whole]


class Freshening(NamedTuple):
    """How what a layer's routing shows is learned in its pass."""

    tokens: float  # that are routed
    step: float  # how far they move a rate
    curve: SavedSeconds
    lasting: Rates  # (layers * experts,) the rates


def freshen(layer: int, counts: NDArray[np.int64], freshening: Freshening, saved: Seconds) -> None:
    """What the routing of ``layer`` has just shown: its experts' lasting rates move by a step towards it, and what
    they save (layers * experts,) follows; both in place. ``counts`` (experts,): how many tokens went to each."""
    if not native.freshen(layer, counts, freshening, saved):
        freshen_in_python(layer, counts, freshening, saved)


def freshen_in_python(layer: int, counts: NDArray[np.int64], freshening: Freshening, saved: Seconds) -> None:
    mine = slice(layer * len(counts), (layer + 1) * len(counts))
    tokens, step, curve, lasting = freshening
    rates = lasting[mine]
    rates += np.float32(step) * ((counts / tokens).astype(np.float32) - rates)
    saved[mine] = curve(rates)


def choose_thresholds(
    values: Table, weights: NDArray[np.int64], slots: int, config: BalanceConfig
) -> Thresholds:
    """The threshold of each layer: least sum of ``values`` while the sum of ``weights`` is at most ``slots``.

    A multiple-choice knapsack: exact by dynamic programming while layers x thresholds x slots is at most
    ``config.exact_cells``; beyond that greedy along the convex hulls, off by less than one step of one layer.
    ``weights`` (layers, U+1) fall along a row and end in 0, so there always is a solution.
    """
    slots = min(slots, int(weights.max(axis=1).sum()))
    if values.size * (slots + 1) <= config.exact_cells:
        return _by_dynamic_programming(values, weights, slots)
    return _along_hulls(values, weights, slots)


def _by_dynamic_programming(values: Table, weights: NDArray[np.int64], slots: int) -> Thresholds:
    layers, options = values.shape
    best = np.zeros(slots + 1)  # best[s]: least cost of the layers so far with at most s slots
    chosen = np.zeros((layers, slots + 1), np.int8)
    for layer in range(layers):
        least = best + values[layer, -1]  # the last option takes no slots
        chosen[layer] = options - 1
        for option in range(options - 1):
            weight = weights[layer, option]
            cost = best[: max(slots + 1 - weight, 0)] + values[layer, option]
            better = cost < least[weight:]
            least[weight:][better] = cost[better]
            chosen[layer, weight:][better] = option
        best = least
    thresholds = np.empty(layers, np.int64)
    for layer in range(layers - 1, -1, -1):
        thresholds[layer] = chosen[layer, slots] + 1
        slots -= weights[layer, thresholds[layer] - 1]
    return thresholds


def _along_hulls(values: Table, weights: NDArray[np.int64], slots: int) -> Thresholds:
    thresholds = np.full(len(values), values.shape[1])
    steps = [step for layer in range(len(values)) for step in _hull(layer, values[layer], weights[layer])]
    stopped: set[int] = set()
    for _, layer, option, weight in sorted(steps):
        if layer in stopped:
            continue
        if weight > slots:
            stopped.add(layer)
            continue
        thresholds[layer] = option + 1
        slots -= weight
    return thresholds


def _hull(layer: int, values: NDArray, weights: NDArray[np.int64]) -> list[tuple[float, int, int, int]]:
    """Steps (seconds per slot, layer, option, slots) down the convex hull, from the option without slots."""
    steps: list[tuple[float, int, int, int]] = []
    here = len(values) - 1
    while True:
        gains = [
            ((values[to] - values[here]) / max(weights[to] - weights[here], 0.5), to)
            for to in range(here - 1, -1, -1)
            if values[to] < values[here]
        ]
        if not gains:
            return steps
        slope, to = min(gains)
        steps.append((float(slope), layer, to, int(weights[to] - weights[here])))
        here = to


def _activity(expected: Rates) -> tuple[NDArray, NDArray]:
    """Probability that each expert is needed at all, and how many tokens it then has (at least 1)."""
    active = -np.expm1(-expected.astype(np.float64))
    return active, np.maximum(expected / np.maximum(active, 1e-9), 1)


def _at_or_above(levels: Levels, amounts: NDArray, highest: int) -> Table:
    """(layers, U+1) sum of ``amounts`` over the experts at or above each threshold 1..U+1."""
    layers, options = len(levels), highest + 2  # levels 0..U, and none at U+1
    cell = levels + np.arange(layers)[:, None] * options
    by_level = np.bincount(cell.ravel(), amounts.ravel(), layers * options).reshape(layers, options)
    return np.cumsum(by_level[:, ::-1], axis=1)[:, ::-1][:, 1:].astype(np.float64)


def _below(levels: Levels, amounts: NDArray, highest: int) -> Table:
    return amounts.reshape(levels.shape).sum(axis=1, keepdims=True) - _at_or_above(levels, amounts, highest)
