"""What deciding costs: microseconds a layer for each of the policy's calls, on synthetic routing.

CPU time of this thread, so that a busy machine does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moespac.config import PolicyConfig
from moespac.policy.base import Policy
from moespac.policy.registry import make_policy
from moespac.types import Capacity, ModelShape, Observation, Residency, Window

_CALLS = ("plan", "place", "retention", "observe")


def measure(
    policy: str = "moe-spac",
    layers: int = 48,
    experts: int = 128,
    top_k: int = 8,
    window: int = 5,
    passes: int = 50,
    accelerator: bool = True,
    config: PolicyConfig | None = None,
) -> dict[str, float]:
    """Microseconds per layer of each call in the median pass of ``window`` tokens, and their ``total``.

    Half of the experts are in host memory and, with an ``accelerator``, 17% there as in the paper.
    """
    shape = ModelShape(layers, experts, top_k, record_bytes=10 << 20)
    capacity = Capacity(shape.total // 2, round(shape.total * 0.17) if accelerator else 0)
    decider = make_policy(policy, shape, capacity, config or PolicyConfig())
    rng = np.random.default_rng(0)
    residency = _residency(shape, capacity, rng)
    seconds = [_one_pass(decider, window, residency, rng) for _ in range(passes)]
    each = {call: float(np.median([spent[call] for spent in seconds])) * 1e6 / layers for call in _CALLS}
    return each | {"total": sum(each.values())}


def table(**arguments: Any) -> None:
    """Print ``measure(**arguments)``, with and without an accelerator."""
    columns = {
        name: measure(accelerator=on, **arguments)
        for name, on in (("host only", False), ("accelerator", True))
    }
    shown = Table("us per layer", *columns, title="Decision time")
    for call in (*_CALLS, "total"):
        shown.add_row(call, *(f"{column[call]:.1f}" for column in columns.values()))
    Console().print(shown)


def _one_pass(policy: Policy, size: int, residency: Residency, rng: np.random.Generator) -> dict[str, float]:
    """Seconds spent in each call; retention is asked once a layer."""
    seconds = dict.fromkeys(_CALLS, 0.0)

    def timed(call: str, decide: Callable[..., object], *arguments: object) -> None:
        start = thread_time()
        decide(*arguments)
        seconds[call] += thread_time() - start

    window = Window(rng.zipf(1.3, size).clip(max=50_000), drafted=size - 1)
    routing = _route(policy.shape, size, rng)
    timed("plan", policy.plan, window, residency)
    for layer in range(policy.shape.layers):
        counts = np.bincount(routing[layer].ravel(), minlength=policy.shape.experts)
        timed("place", policy.place, layer, counts, residency)
        timed("retention", policy.retention, "host", layer)
    timed("observe", policy.observe, Observation(window, routing, accepted=size - 1))
    return seconds


def _route(shape: ModelShape, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(layers, T, k) distinct experts for each token, some likelier than others as in real models."""
    liking = rng.gumbel(size=(shape.layers, tokens, shape.experts)) + np.linspace(0, 2, shape.experts)
    return np.argpartition(-liking, shape.top_k, axis=-1)[..., : shape.top_k]


def _residency(shape: ModelShape, capacity: Capacity, rng: np.random.Generator) -> Residency:
    """Full tiers, nothing in flight."""

    def some(held: int) -> NDArray[np.bool_]:
        return (rng.permutation(shape.total) < held).reshape(shape.layers, shape.experts)

    nothing = np.zeros((shape.layers, shape.experts), np.bool_)
    return Residency(some(capacity.host), some(capacity.accelerator), nothing, nothing, capacity)
