"""The one interface between deciding and doing. The engine and the simulator drive the same objects.

A decode step calls, in this order, all from one thread:

    foresee_window(counts)               the draft's own routing, for policies with Sensor.DRAFT_ROUTING
    plan(window, residency)              before the pass, the drafted tokens are known
    learn()                              once the plan's transfers are on their way
    for each MoE layer, when its router has fired:
        foresee_layer(layer + 1, counts)     the next gate's guess, for policies with Sensor.NEXT_GATE
        placement(layer, counts, residency)  place(), unless that may be left out; or, later, ran()
        retention(tier, layer)               whenever a slot is needed: the lowest value is evicted
    observe(observation)                 after verification, acceptance is known
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.policy.cost import CostModel
from moespac.policy.foresight import Foresight
from moespac.types import Capacity, ModelShape, Observation, Placement, Plan, Residency, Window

TierName = Literal["host", "accelerator"]
Counts = NDArray[np.int64]


class Sensor(Enum):
    """What a policy wants to be told beyond routing and drafted tokens. It costs time, so only who asks gets it."""

    NEXT_GATE = "the next layer's gate, applied to this layer's hidden states"
    DRAFT_ROUTING = "the routing that the drafter's own hidden states suggest for the window"
    FUTURE = "all routing to come: a bound, not a system; only where a trace is replayed"


class PassRetention(NamedTuple):
    """``retention("host", layer)`` of all layers of a pass at once: an expert is worth ``ran`` once its layer has
    run, ``runs`` while it runs, and ``to_come`` before; (layers * experts,) both. ``foresight``: who runs the pass
    asks routers early, if it can, and what they say comes in place of ``to_come``."""

    ran: NDArray[np.float64]
    to_come: NDArray[np.float64]
    runs: float
    foresight: Foresight | None = None

    def at(self, layer: int, experts: int) -> NDArray[np.float64]:
        """While ``layer`` runs (-1: before the first), in layers of so many ``experts``."""
        value = np.concatenate([self.ran[: (layer + 1) * experts], self.to_come[(layer + 1) * experts :]])
        if layer >= 0:
            value[layer * experts : (layer + 1) * experts] = self.runs
        return value


class CacheRetention(NamedTuple):
    """``PassRetention`` of a cache that only uses change: an expert is worth ``value`` until its layer routes to
    it, and ``once_used`` from then on; (layers * experts,) both, the caller's own."""

    value: NDArray[np.float64]
    once_used: NDArray[np.float64]


class Turns(NamedTuple):
    """Values of the experts of layers that have had their turn, and of those that are to come, (layers * experts,)
    both; the latter begin with the expert ``first``."""

    ran: NDArray[np.float64]
    to_come: NDArray[np.float64]
    first: int


class Policy(ABC):
    """Decides which experts are where, and who computes them. Never touches a tensor, a clock or a thread."""

    name: str
    sensors: ClassVar[frozenset[Sensor]] = frozenset()
    speculates: ClassVar[bool] = True  # whether the system it stands for decodes speculatively
    lets_hits_pass: bool = (
        False  # place() need not be asked about layers whose experts are all in host memory
    )
    counts_on_draft: bool = False  # the last plan did: it is made anew if the pass begins without one

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel) -> None:
        self.shape = shape
        self.capacity = capacity
        self.costs = costs

    def plan(self, window: Window, residency: Residency) -> Plan:
        """What to fetch ahead of this pass. By default nothing: misses are fetched on demand."""
        return Plan()

    @abstractmethod
    def place(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        """Who computes the active experts of ``layer``; ``counts`` (experts,) window tokens sent to each."""

    def placement(self, layer: int, counts: Counts, residency: Residency) -> Placement:
        """``place``, unless nobody has to be asked: who runs a layer calls this one."""
        if self.lets_hits_pass:
            active = np.flatnonzero(counts)
            if residency.host[layer, active].all():
                return Placement(layer * self.shape.experts + active)
        return self.place(layer, counts, residency)

    def places(self, layer: int, residency: Residency) -> int | None:
        """Where native code finds what ``place`` would go by in ``layer`` (``Places`` of csrc/place.h), for windows
        of less than ``cost.TABLE`` tokens: who runs the layer may ask that in its place. None: it has to be
        ``place``."""
        return None

    @abstractmethod
    def retention(self, tier: TierName, layer: int) -> NDArray[np.float64]:
        """The value of keeping each expert in ``tier``, (layers * experts,), while ``layer`` runs (-1:
        between passes). The resident expert with the lowest value is the next victim; a prefetch never evicts
        an expert worth as much as itself or more."""

    def turns(self, tier: TierName, layer: int) -> Turns | None:
        """``retention`` without putting it together, for who needs few of its values. None: ask that."""
        return None

    def pass_retention(self) -> PassRetention | CacheRetention | None:
        """What ``retention`` will say of host memory in the pass to come, whatever its layers show. None: it does
        not know, or there is more to ask in a layer than what makes way; then each layer asks."""
        return None

    def ran(self, layer: int, routing: NDArray[np.int64]) -> None:
        """Layers from ``layer`` on have run as ``pass_retention`` said, in place of ``place``: (layers, T, k) whom
        they routed to, -1 for nobody. By default there is nothing to learn of it before ``observe``."""

    def observe(self, observation: Observation) -> None:
        """Learn from a completed pass. By default nothing."""

    def learn(self) -> None:
        """There is time now for what ``observe`` put off: the next plan need not know it, a second one of the same
        pass does. By default nothing was put off."""

    def foresee_window(self, counts: Counts) -> None:
        """``counts`` (layers, experts): what the drafter suggests for the pass to come."""

    def foresee_layer(self, layer: int, counts: Counts) -> None:
        """``counts`` (experts,): what the gate of ``layer`` says to the hidden states of the layer before it."""

    def reveal(self, passes: Sequence[NDArray[np.int64]]) -> None:
        """Each pass to come as its routing (layers, T, k)."""

    def resize(self, capacity: Capacity) -> None:
        """A tier has become smaller: the accelerator, and not less than one slot. A policy that keeps another
        figure of it, or a fixed set, may go on with those: what does not fit is evicted in its own order."""
        self.capacity = capacity

    @property
    def levels(self) -> NDArray[np.int8] | None:
        """Utility levels (layers, experts), 0 to the method's highest, to be looked at; None: it has none."""
        return None

    def load_profile(self, path: Path) -> None:
        """Start from what an earlier run learned. By default nothing is kept."""

    def save_profile(self, path: Path) -> None:
        """Keep what was learned for the next run."""
