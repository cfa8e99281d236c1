"""HybriMoE (Zhong et al., 2025): scores for the cache, simulated schedules for everything else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moespac.config import BaselineConfig
from moespac.policy.baselines.caching import CachePolicy
from moespac.policy.baselines.layered import prefer_in_each_layer
from moespac.policy.baselines.order import Active, Order, Values
from moespac.policy.cost import CostModel
from moespac.types import NO_IDS, Ids, ModelShape, Residency


class Scores:
    """S <- a * TopP(s) + (1 - a) * S, with s the tokens routed to each expert of the layer, all but the greatest p
    of them set to 0; in each layer the least score first."""

    def __init__(self, shape: ModelShape, slots_per_layer: int, config: BaselineConfig) -> None:
        self.scores = np.zeros((shape.layers, shape.experts))
        self._slots = slots_per_layer
        self._config = config

    def use(self, active: Active) -> None:
        new, experts = self._config.score_new, self.scores.shape[1]
        top = np.argsort(-active.tokens, kind="stable")[: self._config.score_top]
        self.scores[active.ids[:1] // experts] *= 1 - new  # no layer, where nothing is active
        self.scores.ravel()[active.ids[top]] += new * active.tokens[top]

    def values(self) -> Values:
        return prefer_in_each_layer(self.scores, self._slots)


class HybriMoePolicy(CachePolicy):
    """[code] The score, a = 0.5 and p = 12, and evicting the least score in the layer. [recall] The device
    computes what is cached by load descending, the CPU what is not by load ascending, while the link takes the
    largest; each step goes to who is done first. The next layer's top k by score are prefetched in the order
    of the time that having them would save, simulated in the same way.

    Assumed by us: the score takes the counts of the window's tokens for the router's probabilities; a layer's cache
    has an equal share of the slots; an expert foreseen has its score as its load, at least one token; records that
    are in storage are scheduled as if they were in host memory.
    """

    name = "hybrimoe"
    speculates = False

    def _order(self, slots: int) -> Order:
        return Scores(self.shape, slots // self.shape.layers, self._config)

    def _dispatch(self, active: Active) -> tuple[Ids, Ids]:
        host, accelerator, _ = schedule(active.tokens, active.held, self.costs, self._slots)
        return active.ids[host], active.ids[accelerator]

    def _look_ahead(self, layer: int, active: Active, residency: Residency) -> Ids:
        following = layer + 1
        if following == self.shape.layers:
            return NO_IDS
        order = self._orders[self._fast]
        assert isinstance(order, Scores)
        scores = order.scores[following]
        likely = np.argsort(-scores, kind="stable")[: self.shape.top_k]
        likely = likely[scores[likely] > 0]
        ids = following * self.shape.experts + likely
        if not self.capacity.accelerator:
            return ids  # one device: each saves one read, the likeliest most often
        return ids[self._by_impact(np.maximum(scores[likely], 1), self._held(residency)[ids])]

    def _by_impact(self, tokens: NDArray[np.float64], held: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The order of these experts by what it would save to have each of them cached, those that are first."""
        _, _, as_is = schedule(tokens, held, self.costs, self._slots)
        saving = np.full(len(held), np.inf)
        for expert in np.flatnonzero(~held):
            with_it = held.copy()
            with_it[expert] = True
            saving[expert] = as_is - schedule(tokens, with_it, self.costs, self._slots)[2]
        return np.argsort(-saving, kind="stable")


def schedule(
    tokens: NDArray, held: NDArray[np.bool_], costs: CostModel, slots: int
) -> tuple[list[int], list[int], float]:
    """Greedy by earliest finish: indices for the host and for the accelerator in order, and the makespan.

    ``tokens``, ``held`` (n,) of the experts; at most ``slots`` go to the accelerator. Plain floats: at these sizes
    faster than arrays.
    """
    ordered = np.argsort(-tokens, kind="stable")
    accelerator = ordered[held[ordered]].tolist()
    missing = ordered[~held[ordered]].tolist()
    on_host = costs.host_expert(tokens).tolist()
    on_accelerator = costs.accelerator_expert(tokens).tolist()
    host: list[int] = []
    host_done, link_done = 0.0, 0.0
    accelerator_done = float(sum(on_accelerator[expert] for expert in accelerator))
    while missing:
        by_host = host_done + on_host[missing[-1]]
        copied = link_done + costs.link
        by_accelerator = max(accelerator_done, copied) + on_accelerator[missing[0]]
        if by_host <= by_accelerator or len(accelerator) >= slots:
            host.append(missing.pop())
            host_done = by_host
        else:
            accelerator.append(missing.pop(0))
            link_done, accelerator_done = copied, by_accelerator
    return host, accelerator, max(host_done, accelerator_done)
