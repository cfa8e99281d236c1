"""PREDICT tokens a second: the simulator, on routing that is made up, over a few of the model's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from moespac.config import PlanConfig, SimulationConfig, SyntheticConfig
from moespac.policy.planner import MoeSpacPolicy
from moespac.sim.hardware import HardwareProfile
from moespac.sim.shapes import SimModel
from moespac.sim.simulator import Setting, simulate
from moespac.sim.synthetic import synthetic_routing
from moespac.trace.schema import Trace
from moespac.types import Capacity, ModelShape


@dataclass(frozen=True)
class Speed:
    """Decoded tokens a second: what to expect, and between what."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True)
class Case:
    """One way to run a model on a machine."""

    hardware: HardwareProfile
    model: SimModel
    capacity: Capacity
    acceptance: float | None = None  # of a draft model's drafts; None: nothing is drafted


def predict_speed(case: Case, config: PlanConfig) -> Speed:
    """With a range: routing that is very local, and hardly; and the simulator's own error on both sides."""
    low = predict(case, config, config.scattered)
    high = predict(case, config, config.local)
    typical = predict(case, config)
    return Speed(min(low, typical) * (1 - config.error), typical, max(high, typical) * (1 + config.error))


def predict(case: Case, config: PlanConfig, locality: SyntheticConfig | None = None) -> float:
    """Tokens a second on routing of that locality; None: of Qwen3-30B-A3B's."""
    part = _fewer_layers(case, config.layers)
    trace = _routing(part.model.to_model_shape(), config.tokens, locality or SyntheticConfig())
    setting = Setting(
        part.hardware,
        part.model,
        part.capacity,
        window=0 if case.acceptance is None else config.drafter_window,
        acceptance=case.acceptance or 0.0,
    )
    seconds = simulate(trace, MoeSpacPolicy.name, setting).seconds_per_token
    return part.model.layers / case.model.layers / seconds


def _fewer_layers(case: Case, most: int) -> Case:
    """The first layers only, with their share of everything: a pass takes that share of the time."""
    model = case.model
    layers = min(model.layers, most)
    share = layers / model.layers
    drafter = model.drafter_bytes
    small = replace(
        model,
        layers=layers,
        trunk_weights=max(1, round(model.trunk_weights * share)),
        trunk_bytes=max(1, round(model.trunk_bytes * share)),
        drafter_bytes=max(1, round(drafter * share)) if drafter else 0,
    )

    def slots(of_all: int) -> int:
        return min(max(1, round(of_all * share)), layers * model.experts) if of_all else 0

    return replace(
        case, model=small, capacity=Capacity(slots(case.capacity.host), slots(case.capacity.accelerator))
    )


@lru_cache(maxsize=16)
def _routing(shape: ModelShape, tokens: int, locality: SyntheticConfig) -> Trace:
    length = SimulationConfig().prompt_tokens + tokens
    made = synthetic_routing(shape, [length, length], config=locality)
    return made.to_trace(shape.experts, "synthetic")
