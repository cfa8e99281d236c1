"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from moespac.config import PolicyConfig
from moespac.errors import ConfigError
from moespac.policy.base import Policy
from moespac.policy.baselines.lru import LruPolicy
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.types import Capacity, ModelShape

Factory = Callable[[ModelShape, Capacity, CostModel, PolicyConfig], Policy]

POLICIES: dict[str, Factory] = {
    MoeSpacPolicy.name: MoeSpacPolicy,
    LruPolicy.name: lambda shape, capacity, costs, config: LruPolicy(shape, capacity, costs),
}


def make_policy(name: str, shape: ModelShape, capacity: Capacity, config: PolicyConfig) -> Policy:
    """The policy called ``name``, with a fresh cost model. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"there is no policy {name!r}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](shape, capacity, CostModel(config.cost, shape.record_bytes), config)
