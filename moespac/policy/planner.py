"""MoE-SpAc: ESTIMATE utility from drafted tokens, BALANCE slots and devices, PREFETCH and EVICT in one order.

Source of the method: arXiv 2603.09983. What is ours beyond it is said in the modules that this one composes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moespac.config import PolicyConfig
from moespac.policy import native, profile
from moespac.policy.balance import (
    Freshening,
    SavedSeconds,
    accelerator_costs,
    choose_thresholds,
    freshen,
    host_costs,
    slots_needed,
)
from moespac.policy.base import PassRetention, Policy, TierName, Turns
from moespac.policy.copies import worth_copying
from moespac.policy.cost import CostModel
from moespac.policy.foresight import Foresight
from moespac.policy.sensors import DemandSensor, Lesson, Rates
from moespac.policy.split import Stakes, place_by_finish
from moespac.policy.utility import UtilityEstimator
from moespac.types import Capacity, Grid, Ids, ModelShape, Observation, Placement, Plan, Residency, Window

Order = NDArray[np.float64]  # (layers * experts,) a value for each expert, the largest first


class MoeSpacPolicy(Policy):
    """Speculative utility estimator, heterogeneous workload balancer, and the one order for every tier."""

    name = "moe-spac"

    def __init__(self, shape: ModelShape, capacity: Capacity, costs: CostModel, config: PolicyConfig) -> None:
        super().__init__(shape, capacity, costs)
        self.lets_hits_pass = not capacity.accelerator  # with one device there is nobody to choose
        self._config = config
        self._demand = DemandSensor(shape, config.sensors)
        scarcest = capacity.accelerator or capacity.host
        self._utility = UtilityEstimator(shape, scarcest / shape.total, config.utility)
        self._foresight = Foresight(config.foresight)
        self._windows = 0
        self._planned = False
        self._lesson: Lesson | None = None
        self._stakes: Stakes | None = None  # of the pass that runs
        self._placer: native.Placer | None = None  # which has to live while it is asked
        self._thresholds: dict[TierName, NDArray[np.int64]] = {}
        self._worth_in_host = np.ones(shape.total)
        self._given_up = np.zeros(0)  # what the accelerator's experts save, the least first
        ahead = np.repeat(np.arange(2 * shape.layers) / shape.layers, shape.experts)
        self._clock = config.utility.pass_discount**ahead  # (2 * layers * experts,) this pass, then the next
        self._pass_tokens = 1.0  # running mean of the tokens that a pass runs
        self._running = 1.0  # tokens of the pass that runs ...
        self._step = self._demand.lasting_step(1.0)  # ... and how far they move what lasts
        self._drafts_ahead = False  # whether the next pass is likely to be drafted first
        self._expect(self._demand.rate(), 1)

    def plan(self, window: Window, residency: Residency) -> Plan:
        """Prefetch what the coming pass will want more than what would have to go."""
        expected = self._demand.expected(window)
        self._expect(expected.per_token, len(window.tokens))
        self._note_copies(residency)
        doubled = self._windows & (self._windows - 1) == 0  # since the last time: at first it learns fast
        if doubled or self._windows % self._config.balance.rebalance_windows == 0:
            self._rebalance(expected.counts, residency)
        self._windows += 1
        self._planned = True
        host = self._reads(residency.host | residency.arriving_host)
        if not self.capacity.accelerator:
            return Plan(host)
        self.counts_on_draft = self._drafts_ahead and not window.drafted and not self.counts_on_draft
        share = self._config.balance.idle_price if self.counts_on_draft else 1.0
        return Plan(host, self._copies(residency, price=share * self.costs.copy_price))

    def place(self, layer: int, counts: NDArray[np.int64], residency: Residency) -> Placement:
        """Split the active experts so that both devices finish early; fetches overlap computing."""
        if layer == 0:
            self._note_copies(residency)  # once a pass is enough: few change within it
        if not self.capacity.accelerator:
            return place_by_finish(layer, counts, residency, self.costs)
        if layer == 0:
            self._note_tokens(counts)
        if self._stakes is None:
            self._stakes = Stakes(self._saved_after, self._given_up, self._freshening())
        return place_by_finish(layer, counts, residency, self.costs, self._stakes)

    def places(self, layer: int, residency: Residency) -> int | None:
        """From the second layer of a pass on: the first one shows how many tokens it has."""
        if (
            layer == 0
            or self._stakes is None
            or getattr(self.place, "__func__", None) is not MoeSpacPolicy.place
        ):
            return None  # who has replaced ``place`` is asked
        placer = self._placer = native.placer(residency, self.costs, self._stakes)
        return None if placer is None else placer.address

    def retention(self, tier: TierName, layer: int) -> Order:
        """Utility discounted by how far ahead the next use is, from the pass's begin: layer order is a clock.

        Layers still to come in this pass are valued by its tokens, those that have run by what a next window
        may bring. The layer that runs is frozen. On the accelerator the value is in seconds saved, and what the
        layer that runs does not use is the first to go.
        """
        if tier == "accelerator" and self.capacity.accelerator:
            return self._saved(ran=layer + 1)
        later, now = self._later, self._now
        if tier == "host" and self.capacity.accelerator:
            later, now = later * self._worth_in_host, now * self._worth_in_host
        return PassRetention(later, now, self._beyond).at(layer, self.shape.experts)

    def turns(self, tier: TierName, layer: int) -> Turns | None:
        if tier != "accelerator" or not self.capacity.accelerator:
            return None
        return Turns(self._saved_after, self._saved_with_now, (layer + 1) * self.shape.experts)

    def pass_retention(self) -> PassRetention | None:
        """With one device there is nothing else to ask."""
        if self.capacity.accelerator:
            return None
        return PassRetention(self._later, self._now, self._beyond, self._foresight)

    def observe(self, observation: Observation) -> None:
        """Teach the sensors; where nobody plans (stock generate), expect what the averages say.

        Without an accelerator, what says little of the very next token is learned once that one is planned: its
        reads need not wait.
        """
        self.learn()
        window = observation.window
        self._lesson = self._demand.follow(observation)
        if self.capacity.accelerator or window.prefill or not self._planned:
            self.learn()
        if not window.prefill:
            self._drafts_ahead = window.drafted > 0
            self._pass_tokens += (
                len(window.tokens) - self._pass_tokens
            ) / self._config.balance.pass_tokens_memory
        if not self._planned:
            self._expect(self._demand.rate(), 1)
        self._planned = False

    def learn(self) -> None:
        if self._lesson is not None:
            self._demand.learn(self._lesson)
            self._lesson = None

    @property
    def levels(self) -> NDArray[np.int8]:
        return self._utility.levels

    def save_profile(self, path: Path, model: str = "") -> None:
        """Keep what was learned; ``model`` may name the checkpoint beyond its shape."""
        self.learn()
        profile.save(path, self._demand, model)

    def load_profile(self, path: Path, model: str = "") -> None:
        """Begin from a kept profile; one that cannot be used is skipped with a warning."""
        if profile.load(path, self._demand, model):
            self._expect(self._demand.rate(), 1)

    def _expect(self, demand: Rates, tokens: int) -> None:
        """``demand``: routings per window token to expect in the pass to come, of so many tokens."""
        self._utility.observe(demand)
        rate = self._demand.rate()
        total = self.shape.total
        self._now = self._clock[:total] * self._utility.order(demand)
        self._later = self._clock[total:] * self._utility.order(rate)
        self._beyond = max(float(self._now.max()), float(self._later.max())) + 1
        if self.capacity.accelerator:
            lasting = self._lasting = self._demand.lasting()
            unknown = max(self._pass_tokens - tokens, 0.0) if self._drafts_ahead else 0.0
            coming = (tokens * demand + unknown * lasting) / (tokens + unknown)
            passes = self._config.balance.horizon_passes
            self._saved_by_rate = SavedSeconds(self._pass_tokens, self.costs, passes)
            self._saved_after = self._saved_by_rate(lasting)  # from the next pass on
            now = SavedSeconds(tokens + unknown, self.costs)(coming)
            self._saved_with_now = self._saved_after * (1 - 1 / passes) + now
            self._stakes = None

    def _freshen(self, layer: int, counts: NDArray[np.int64]) -> None:
        """What the layer's routing has just shown, for what it leaves on the accelerator."""
        if layer == 0:
            self._note_tokens(counts)
        freshen(layer, counts, self._freshening(), self._saved_after)

    def _freshening(self) -> Freshening:
        return Freshening(self._running, self._step, self._saved_by_rate, self._lasting)

    def _note_tokens(self, counts: NDArray[np.int64]) -> None:
        """All layers run the same."""
        self._running = max(int(counts.sum()) / self.shape.top_k, 1.0)
        self._step = self._demand.lasting_step(self._running)
        self._stakes = None

    def _saved(self, ran: int) -> NDArray[np.float64]:
        """(layers * experts,) seconds that each expert on the accelerator saves while it stays there, as far as
        that can be foreseen; the first ``ran`` layers have had their turn in this pass."""
        to_come = ran * self.shape.experts
        return np.concatenate([self._saved_after[:to_come], self._saved_with_now[to_come:]])

    def _copies(self, residency: Residency, price: float) -> Ids:
        """Experts to copy to the accelerator, most useful first; those that replace others are at or above their
        layer's threshold."""
        ids = worth_copying(self._saved(ran=0), residency, price)
        used = residency.accelerator | residency.arriving_accelerator
        free = self.capacity.accelerator - int(np.count_nonzero(used))
        held = self._utility.highest >= self._thresholds["accelerator"][:, None]
        return ids[(np.arange(len(ids)) < free) | held.ravel()[ids]]

    def _note_copies(self, residency: Residency) -> None:
        if self.capacity.accelerator:
            there = residency.accelerator.ravel()
            self._worth_in_host = np.where(there, self._config.utility.copy_worth, 1.0)
            self._given_up = np.sort(self._saved_after[there])
            self._stakes = None

    def _rebalance(self, expected: Rates, residency: Residency) -> None:
        levels, highest = self._utility.levels, self._config.utility.levels
        weights = slots_needed(levels, highest)
        tiers: list[TierName] = ["host", "accelerator"] if self.capacity.accelerator else ["host"]
        for tier in tiers:
            layer_costs = accelerator_costs if tier == "accelerator" else host_costs
            resident = residency.accelerator if tier == "accelerator" else residency.host
            slots = self.capacity.accelerator if tier == "accelerator" else self.capacity.host
            values = layer_costs(levels, expected, resident, self.costs, highest, self._config.balance)
            self._thresholds[tier] = choose_thresholds(values, weights, slots, self._config.balance)

    def _reads(self, present: Grid) -> Ids:
        """Experts to bring into host memory, most useful first: as many as it has free slots, and beyond those
        only experts at or above their layer's threshold that beat the experts they would replace."""
        value = self.retention("host", layer=-1)
        held = self._utility.highest >= self._thresholds["host"][:, None]
        victims = np.sort(value[present.ravel()])
        free = max(self.capacity.host - len(victims), 0)
        absent = ~present
        margin = self._config.utility.prefetch_margin
        if not free:
            absent = absent & held & (value.reshape(held.shape) > margin * victims[0])
        candidates = np.flatnonzero(absent)
        candidates = candidates[np.argsort(-value[candidates], kind="stable")]
        candidates = candidates[(np.arange(len(candidates)) < free) | held.ravel()[candidates]]
        replacing = candidates[free : free + len(victims)]
        beaten = value[replacing] > margin * victims[: len(replacing)]
        return candidates[: free + int(beaten.sum())]
