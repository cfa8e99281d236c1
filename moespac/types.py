"""The plain records that travel between deciding (policy) and doing (experts, engine). numpy only, no torch.

Experts are named by a flat id, ``layer * num_experts + expert``, wherever several are handled at once:
one int64 array then stands for any set or order of experts. Layers count MoE layers only, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]  # flat expert ids
Grid = NDArray[np.bool_]  # (layers, experts)

NO_IDS: Ids = np.empty(0, dtype=np.int64)


class ExpertId(NamedTuple):
    layer: int
    expert: int


@dataclass(frozen=True)
class ModelShape:
    """What a policy needs to know of a model: its experts, and how large one is."""

    layers: int  # MoE layers
    experts: int  # experts in each of them
    top_k: int  # experts a token is routed to
    record_bytes: int  # one stored expert, as it moves between tiers

    @property
    def total(self) -> int:
        return self.layers * self.experts


@dataclass(frozen=True)
class Capacity:
    """How many experts each fast tier holds. An absent accelerator has 0 slots."""

    host: int
    accelerator: int = 0


@dataclass(frozen=True)
class Window:
    """The tokens that one pass of the target runs: the last accepted token, then the drafted ones.

    A prefill runs the prompt and has no drafts. Token ids below 0 are unknown (a pass of stock generate()).
    """

    tokens: Ids  # (T,) token ids
    drafted: int = 0  # how many of them, at the end, are drafts that may be rejected
    prefill: bool = False


@dataclass(frozen=True)
class Residency:
    """Which experts are where, at one moment; all of shape (layers, experts).

    ``arriving_*`` are in flight: their slot is taken, their bytes are not complete.
    """

    host: Grid
    accelerator: Grid
    arriving_host: Grid
    arriving_accelerator: Grid
    capacity: Capacity


@dataclass(frozen=True)
class Plan:
    """What should move before it is needed, most useful first."""

    host: Ids = field(default_factory=lambda: NO_IDS)  # storage -> host
    accelerator: Ids = field(default_factory=lambda: NO_IDS)  # host -> accelerator


@dataclass(slots=True)  # not frozen: one is made in every layer, and that takes several times as long
class Placement:
    """Who computes this layer's active experts, each list in order of execution.

    An expert that is not resident where it is placed is fetched on demand; one in flight is waited for.
    The two lists hold each active expert exactly once. Ids are flat.
    """

    host: Ids
    accelerator: Ids = field(default_factory=lambda: NO_IDS)
    prefetch: Plan = field(default_factory=Plan)  # for policies that look a layer ahead
    load: Ids = field(default_factory=lambda: NO_IDS)  # must be on the accelerator too, used or not


@dataclass(frozen=True)
class Observation:
    """What one pass showed, given to the policy once acceptance is known."""

    window: Window
    routing: NDArray[np.int64]  # (layers, T, k) expert chosen; -1 where a layer did not route the token
    accepted: int  # drafted tokens that were accepted; tokens after them were not real demand
    weights: NDArray[np.float32] | None = None  # (layers, T, k) the router's, where somebody records them
