"""Sensors: from the routing seen so far and the tokens to come, the demand to expect of each expert.

Rates are per token, never per window, so windows of any size (a prefill too) feed the same averages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.config import SensorConfig
from moespac.policy.context import Context, Features
from moespac.policy.pairs import PairMemory
from moespac.policy.token_table import TokenTable
from moespac.types import Ids, ModelShape, Observation, Window

Rates = NDArray[np.float32]  # (layers * experts,) expected routings per token, 0..1
Chances = NDArray[np.float32]  # (T, layers * experts) the same, token by token

_CHUNK = 64  # tokens learned at once: bounds the memory that a prefill takes


class Expectation(NamedTuple):
    """The demand that a window will make."""

    counts: Rates  # (layers * experts,) tokens to expect at each expert
    tokens: float  # that share it; drafts count as far as they tend to be accepted

    @property
    def per_token(self) -> Rates:
        return self.counts / np.float32(self.tokens)


class Foreseen(NamedTuple):
    """The window that was expected last."""

    tokens: Ids
    chances: Chances  # of its tokens
    features: Features  # of the context, which learns only once the window has run


class Lesson(NamedTuple):
    """A pass that has run, to be learned from."""

    window: Window
    routed: Ids  # (kept tokens, layers * k) flat ids
    foreseen: Foreseen | None  # of it; None: nobody planned


class Acceptance:
    """The running probability that the token at each window position is accepted."""

    def __init__(self, config: SensorConfig) -> None:
        self._config = config
        self._each = [config.acceptance_prior]  # P(draft j accepted | drafts before it were)

    def weights(self, window: Window) -> NDArray[np.float32]:
        """(T,) probability that each token of ``window`` is kept; 1 for those that are not drafts."""
        weights = np.ones(len(window.tokens), np.float32)
        if window.drafted:
            each = self._each + self._each[-1:] * (window.drafted - len(self._each))
            weights[-window.drafted :] = np.cumprod(each[: window.drafted])
        return weights

    def observe(self, drafted: int, accepted: int) -> None:
        """``accepted`` of ``drafted`` tokens were right; the one after them, if there was one, was wrong."""
        for position in range(min(accepted + 1, drafted)):
            if position == len(self._each):
                self._each.append(self._each[-1])
            step = (position < accepted) - self._each[position]
            self._each[position] += step / self._config.acceptance_passes


class RoutingRate:
    """How often a token is routed to each expert: an exponential average token by token."""

    def __init__(self, start: Rates, mean_life: float) -> None:
        self.rate = start.copy()
        self._decay = np.exp(-1 / mean_life)

    def observe(self, routed: Ids, tokens: int) -> None:
        """``routed`` (tokens, any): the flat ids that each of the next tokens went to; -1: none."""
        ages = self._decay ** np.arange(tokens - 1, -1, -1)
        weights = np.broadcast_to(((1 - self._decay) * ages)[:, None], routed.shape)
        self.rate *= self._decay**tokens
        self.rate += _tally(routed, len(self.rate), weights)


class DemandSensor:
    """Fuses the sensors into one expected count per expert: (token table, pairs) x recent / long-run rate, and what
    the context adds."""

    def __init__(self, shape: ModelShape, config: SensorConfig) -> None:
        self.shape = shape
        self.acceptance = Acceptance(config)
        self.table = TokenTable(shape, config)
        self.pairs = PairMemory(shape, config)
        self.context = Context(shape, views=4, config=config.context)
        self._config = config
        self._foreseen: Foreseen | None = None
        self.restart(np.full(shape.total, shape.top_k / shape.experts, np.float32), config.rate_prior)

    def restart(self, rate: Rates, tokens: float) -> None:
        """Begin from a known long-run rate, learned over ``tokens`` tokens."""
        self.long_run = rate.copy()
        self.tokens = tokens
        self._last = RoutingRate(rate, self._config.last_tokens)
        self._fast = RoutingRate(rate, self._config.fast_tokens)
        self._slow = RoutingRate(rate, self._config.slow_tokens)
        self._passage = RoutingRate(rate, self._config.passage_tokens)

    def rate(self) -> Rates:
        """(layers * experts,) routings to expect of a token that is not known."""
        share, floor = self._config.fast_share, self._config.floor
        recent = share * self._fast.rate + (1 - share) * self._slow.rate
        return (1 - floor) * recent + floor * self.long_run

    def lasting(self) -> Rates:
        """(layers * experts,) routings to expect of each of the next dozens of tokens, none of which is known."""
        fast, passage = self._config.lasting_fast, self._config.lasting_passage
        return (
            fast * self._fast.rate
            + passage * self._passage.rate
            + np.float32(1 - fast - passage) * self.long_run
        )

    def lasting_step(self, tokens: float) -> float:
        """How far ``tokens`` tokens move ``lasting``."""
        config = self._config
        fast = config.lasting_fast * (1 - np.exp(-tokens / config.fast_tokens))
        return float(fast + config.lasting_passage * (1 - np.exp(-tokens / config.passage_tokens)))

    def expected(self, window: Window) -> Expectation:
        """What ``window`` will need, by its tokens, the recent routing and the long-run rate."""
        weights = self.acceptance.weights(window)[-self._config.plan_tokens :]
        tokens = window.tokens[-self._config.plan_tokens :]
        chances = self._chances(tokens)
        total = weights.sum()
        product = weights @ chances / total
        views = product, self._last.rate, self._fast.rate, self._slow.rate
        features = self.context.features(*views)
        self._foreseen = Foreseen(tokens, chances, features)
        per_token = self._to_top_k(self.context.correct(product, features))
        return Expectation(per_token * total, float(total))

    def observe(self, observation: Observation) -> None:
        """Take in a pass; tokens after the accepted ones were no real demand and do not count."""
        lesson = self.follow(observation)
        self.learn(lesson)

    def follow(self, observation: Observation) -> Lesson:
        """The part of ``observe`` that bears on the very next token; ``learn`` is the rest, of what is returned."""
        window = observation.window
        self.acceptance.observe(window.drafted, observation.accepted)
        kept = len(window.tokens) - window.drafted + observation.accepted
        routed = self._flat(observation.routing[:, :kept])  # (kept, layers * k)
        for average in (self._last, self._fast, self._passage, self._slow):
            average.observe(routed, kept)
        foreseen, self._foreseen = self._foreseen, None
        return Lesson(window, routed, foreseen)

    def learn(self, lesson: Lesson) -> None:
        """What a token is routed to, in which company, and how far what was foreseen was right."""
        window, routed, foreseen = lesson
        kept = len(routed)
        self._compare(window.tokens, routed, foreseen)
        for start in range(0, kept, _CHUNK):
            self._learn(window.tokens[start : min(start + _CHUNK, kept)], routed[start : start + _CHUNK])
        self.pairs.learn(window.tokens[:kept], routed)

    def _chances(self, tokens: Ids) -> Chances:
        """What each of the ``tokens`` to come is expected to need."""
        chances = self.pairs.blend(self.table.lookup(tokens, self.long_run), tokens)
        chances *= self.rate() / self.long_run
        return self._to_top_k(chances)

    def _to_top_k(self, rates: NDArray[np.float32]) -> NDArray[np.float32]:
        """``rates`` (..., layers * experts), at most 1 each and (nearly) top-k in each layer."""
        by_layer = rates.reshape(-1, self.shape.layers, self.shape.experts)
        for _ in range(2):  # what is clipped goes to the layer's other experts; a second round settles it
            by_layer *= self.shape.top_k / by_layer.sum(axis=-1, keepdims=True)
            np.minimum(by_layer, 1, out=by_layer)
        return rates

    def _compare(self, tokens: Ids, routed: Ids, foreseen: Foreseen | None) -> None:
        """Show the context what was expected of the window that has run, and what came."""
        if foreseen is None or not np.array_equal(foreseen.tokens, tokens):
            return  # nobody planned this pass, or it is a long prefill
        product = foreseen.chances[: len(routed)].mean(axis=0)
        true = _tally(routed, self.shape.total) / np.float32(len(routed))
        features = self.context.other_demand(foreseen.features, product)
        self.context.learn(features, product, true, len(routed))

    def _learn(self, tokens: Ids, routed: Ids) -> None:
        distinct, row, times = np.unique(tokens, return_inverse=True, return_counts=True)
        width = self.shape.total
        cells = np.where(routed < 0, -1, row[:, None] * width + routed)
        counts = _tally(cells, len(distinct) * width).reshape(len(distinct), width)
        self.table.learn(distinct, counts, times)
        self.tokens = min(self.tokens + len(tokens), self._config.rate_tokens)
        self.long_run += (counts.sum(axis=0) / len(tokens) - self.long_run) * (len(tokens) / self.tokens)

    def _flat(self, routing: Ids) -> Ids:
        """(layers, T, k) experts -> (T, layers * k) flat ids, -1 kept."""
        first = np.arange(self.shape.layers)[:, None, None] * self.shape.experts
        return np.where(routing < 0, -1, routing + first).swapaxes(0, 1).reshape(routing.shape[1], -1)


def _tally(ids: Ids, size: int, weights: NDArray[np.floating] | None = None) -> NDArray[np.float32]:
    """(size,) sum of the weights (1 without) of each id; -1 is skipped."""
    real = ids >= 0
    return np.bincount(ids[real], None if weights is None else weights[real], size).astype(np.float32)
