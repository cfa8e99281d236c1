"""A small model and machine that all policy tests share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moespac.config import BaselineConfig, PolicyConfig
from moespac.policy.base import Policy
from moespac.policy.registry import make_policy
from moespac.types import Capacity, ModelShape, Observation, Residency, Window

SHAPE = ModelShape(layers=3, experts=8, top_k=2, record_bytes=1 << 20)


def residency(capacity: Capacity, rng: np.random.Generator, shape: ModelShape = SHAPE) -> Residency:
    """A random legal one: no tier holds more than it can, nothing is there and arriving at once."""

    def tier(slots: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.permutation(shape.total)[: rng.integers(0, slots + 1)]
        there, arriving = np.zeros((2, shape.total), np.bool_)
        cut = rng.integers(0, len(ids) + 1)
        there[ids[:cut]], arriving[ids[cut:]] = True, True
        return there.reshape(shape.layers, -1), arriving.reshape(shape.layers, -1)

    host, arriving_host = tier(capacity.host)
    accelerator, arriving_accelerator = tier(capacity.accelerator)
    return Residency(host, accelerator, arriving_host, arriving_accelerator, capacity)


def make(name: str, capacity: Capacity, **baselines: object) -> Policy:
    """A policy by name; ``baselines`` are fields of its config."""
    config = PolicyConfig(baselines=BaselineConfig(**baselines))
    return make_policy(name, SHAPE, capacity, config, simulated=True)


def resident(
    capacity: Capacity,
    host: Iterable[int] = (),
    accelerator: Iterable[int] = (),
    arriving: Iterable[int] = (),
) -> Residency:
    """Exactly these; ``arriving`` are on their way to the accelerator."""

    def grid(ids: Iterable[int]) -> np.ndarray:
        flat = np.zeros(SHAPE.total, np.bool_)
        flat[list(ids)] = True
        return flat.reshape(SHAPE.layers, -1)

    return Residency(grid(host), grid(accelerator), grid(()), grid(arriving), capacity)


def counts(tokens: dict[int, int] | Iterable[int]) -> np.ndarray:
    """(experts,) by expert; one token each where only the experts are named."""
    row = np.zeros(SHAPE.experts, np.int64)
    for expert, number in tokens.items() if isinstance(tokens, dict) else ((e, 1) for e in tokens):
        row[expert] = number
    return row


def routing(tokens: int, rng: np.random.Generator, shape: ModelShape = SHAPE) -> np.ndarray:
    """(layers, T, k) distinct random experts for each token."""
    return rng.permuted(np.tile(np.arange(shape.experts), (shape.layers, tokens, 1)), axis=-1)[
        ..., : shape.top_k
    ]


def observation(tokens: list[int], experts: list[int], drafted: int = 0, accepted: int = 0) -> Observation:
    """All layers route token i to ``experts[i]`` and to the expert after it."""
    pair = np.stack([experts, (np.array(experts) + 1) % SHAPE.experts], axis=-1)
    window = Window(np.array(tokens), drafted)
    return Observation(window, np.broadcast_to(pair, (SHAPE.layers, *pair.shape)).copy(), accepted)
