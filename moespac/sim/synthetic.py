"""Routing that behaves like a real model's, for models of which there is no trace.

A router's logit for an expert is a sum of four normal variables, each with its own memory: how popular the expert
is, what it likes about the token, what the text is about, and what the phrase is about. Top-k of the sum is the
routing. Their weights and lives are fitted to public locality figures of Qwen3-30B-A3B (docs/hardware.md). Layers
are independent of each other, which real ones are not: a policy that looks a layer ahead learns nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.config import SyntheticConfig
from moespac.errors import ConfigError
from moespac.trace.schema import Trace, compact
from moespac.types import ModelShape

Logits = NDArray[np.float32]  # (layers, experts)


class SyntheticRouting(NamedTuple):
    """Decoded sequences, one after the other; N tokens in all."""

    experts: NDArray[np.unsignedinteger]  # (N, layers, k), the likeliest first
    probs: NDArray[np.float16]  # (N, layers, k), summing to 1 over k
    offsets: NDArray[np.int64]  # (sequences + 1,) where each sequence begins
    tokens: NDArray[np.int32]  # (N,) the token fed at each step

    def to_trace(self, experts: int, source: str) -> Trace:
        """Each token a pass of its own, without drafts; sequences are "text 1", "text 2" ..."""
        count = len(self.tokens)
        return Trace(
            experts=experts,
            tokens=self.tokens,
            routing=compact(self.experts, experts),
            weights=None,
            pass_offsets=np.arange(count + 1),
            drafted=np.zeros(count, np.int32),
            accepted=np.zeros(count, np.int32),
            prefill=np.zeros(count, np.bool_),
            sequence_offsets=self.offsets,
            categories=tuple(f"text {number}" for number in range(1, len(self.offsets))),
            source=source,
        )


def synthetic_routing(
    shape: ModelShape,
    lengths: Sequence[int],
    seed: int = 0,
    model_seed: int = 0,
    config: SyntheticConfig | None = None,
) -> SyntheticRouting:
    """Routing of one sequence for each of ``lengths`` (tokens).

    ``seed`` draws the texts. ``model_seed`` draws the model: which experts are popular, and what each token's
    favourites are, whatever the text, so that what was learned from one text holds for another. Raises ConfigError
    for a shape that has no top-k and for a sequence without tokens.
    """
    config = config or SyntheticConfig()
    if not 1 <= shape.top_k <= shape.experts:
        raise ConfigError(
            f"top-{shape.top_k} of {shape.experts} experts cannot be routed: give 1 to {shape.experts}"
        )
    if not lengths or min(lengths) < 1:
        raise ConfigError("synthetic routing needs sequences of 1 token or more: give their lengths")
    rng = np.random.default_rng(seed)
    router = _Router(shape, model_seed, config)
    texts = [_text(length, rng, config) for length in lengths]
    chosen = [router.route(text, rng) for text in texts]
    return SyntheticRouting(
        experts=np.concatenate([experts for experts, _ in chosen]),
        probs=np.concatenate([probs for _, probs in chosen]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.concatenate(texts),
    )


def _text(length: int, rng: np.random.Generator, config: SyntheticConfig) -> NDArray[np.int32]:
    """Token ids: Zipf's law, and words that come back soon after they were used."""
    frequency = 1 / np.arange(1, config.vocabulary + 1) ** config.zipf
    tokens = rng.choice(config.vocabulary, length, p=frequency / frequency.sum()).astype(np.int32)
    back = rng.integers(1, config.repeat_span + 1, length)
    for at in np.flatnonzero((rng.random(length) < config.repeat) & (back <= np.arange(length))):
        tokens[at] = tokens[at - back[at]]
    return tokens


class _Router:
    """The gates of all layers of one made-up model."""

    def __init__(self, shape: ModelShape, model_seed: int, config: SyntheticConfig) -> None:
        self._shape = shape
        self._seed = model_seed
        self._config = config
        self._popularity = config.popularity * self._draw(np.random.default_rng([model_seed]))
        self._likings: dict[int, Logits] = {}

    def route(
        self, text: NDArray[np.int32], rng: np.random.Generator
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float16]]:
        """Experts and probabilities, (tokens, layers, k) each; topic and phrase begin anew."""
        config, k = self._config, self._shape.top_k
        kind = np.uint8 if self._shape.experts <= 256 else np.uint16
        experts = np.empty((len(text), self._shape.layers, k), dtype=kind)
        probs = np.empty(experts.shape, dtype=np.float16)
        topic, phrase = self._draw(rng), self._draw(rng)
        for at, token in enumerate(text.tolist()):
            topic = self._drift(topic, config.topic_tokens, rng)
            phrase = self._drift(phrase, config.phrase_tokens, rng)
            logits = self._popularity + self._liking(token) + config.topic * topic + config.phrase * phrase
            best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
            chosen = np.take_along_axis(logits, best, axis=1)
            order = np.argsort(-chosen, axis=1)
            experts[at] = np.take_along_axis(best, order, axis=1)
            weights = np.exp(np.take_along_axis(chosen, order, axis=1) - chosen.max(axis=1, keepdims=True))
            probs[at] = weights / weights.sum(axis=1, keepdims=True)
        return experts, probs

    def _liking(self, token: int) -> Logits:
        """What the experts think of a token; drawn from the token's own seed, when it is first met."""
        if token not in self._likings:
            own = np.random.default_rng([self._seed, token])
            self._likings[token] = self._config.token * self._draw(own)
        return self._likings[token]

    def _drift(self, state: Logits, life: float, rng: np.random.Generator) -> Logits:
        """One step of an Ornstein-Uhlenbeck process of mean life ``life`` tokens; its variance stays 1."""
        kept = np.float32(np.exp(-1 / life))
        return kept * state + np.sqrt(1 - kept**2) * self._draw(rng)

    def _draw(self, rng: np.random.Generator) -> Logits:
        return rng.standard_normal((self._shape.layers, self._shape.experts), dtype=np.float32)
