"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable

from moespac.config import PolicyConfig
from moespac.errors import ConfigError
from moespac.policy.base import Policy
from moespac.policy.baselines.arc import ArcPolicy
from moespac.policy.baselines.belady import BeladyPolicy
from moespac.policy.baselines.fate import FatePolicy
from moespac.policy.baselines.fiddler import FiddlerPolicy
from moespac.policy.baselines.freetoken import FreeTokenPolicy
from moespac.policy.baselines.hybrimoe import HybriMoePolicy
from moespac.policy.baselines.ktransformers import KTransformersPolicy
from moespac.policy.baselines.lfu import LfuPolicy
from moespac.policy.baselines.llama_cpp import LlamaCppPolicy, LlamaCppSpeculativePolicy
from moespac.policy.baselines.lru import LruPolicy
from moespac.policy.baselines.mixtral_offloading import MixtralOffloadingPolicy
from moespac.policy.baselines.moe_infinity import MoeInfinityPolicy
from moespac.policy.baselines.sp_moe import SpMoePolicy
from moespac.policy.baselines.specter import SpecterPolicy
from moespac.policy.baselines.streaming import AcceleratePolicy, VllmOffloadPolicy
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.types import Capacity, ModelShape

Factory = Callable[[ModelShape, Capacity, CostModel, PolicyConfig], Policy]

ENGINE_POLICIES: dict[str, Factory] = {
    MoeSpacPolicy.name: MoeSpacPolicy,
    AcceleratePolicy.name: AcceleratePolicy,
    LlamaCppPolicy.name: LlamaCppPolicy,
    LlamaCppSpeculativePolicy.name: LlamaCppSpeculativePolicy,
    VllmOffloadPolicy.name: VllmOffloadPolicy,
    FiddlerPolicy.name: FiddlerPolicy,
    KTransformersPolicy.name: KTransformersPolicy,
    MixtralOffloadingPolicy.name: MixtralOffloadingPolicy,
    MoeInfinityPolicy.name: MoeInfinityPolicy,
    FatePolicy.name: FatePolicy,
    HybriMoePolicy.name: HybriMoePolicy,
    SpMoePolicy.name: SpMoePolicy,
    SpecterPolicy.name: SpecterPolicy,
    FreeTokenPolicy.name: FreeTokenPolicy,
    LruPolicy.name: LruPolicy,
    LfuPolicy.name: LfuPolicy,
    ArcPolicy.name: ArcPolicy,
}
POLICIES = ENGINE_POLICIES  # what `--policy` takes
SIMULATOR_POLICIES: dict[str, Factory] = ENGINE_POLICIES | {BeladyPolicy.name: BeladyPolicy}


def make_policy(
    name: str, shape: ModelShape, capacity: Capacity, config: PolicyConfig, simulated: bool = False
) -> Policy:
    """The policy called ``name``, with a fresh cost model; ``simulated``: where the future can be known.

    Raises ConfigError for an unknown name.
    """
    known = SIMULATOR_POLICIES if simulated else ENGINE_POLICIES
    if name in SIMULATOR_POLICIES and name not in known:
        raise ConfigError(f"policy {name!r} needs the future: only `moespac simulate` can run it")
    if name not in known:
        raise ConfigError(f"there is no policy {name!r}: choose one of {', '.join(sorted(known))}")
    return known[name](shape, capacity, CostModel(config.cost, shape.record_bytes), config)
