"""CHECK plans: what `moespac plan` predicts for this machine, and what the engine then reaches.

The model is the embedded one, its experts widened until they cost something, packed in several formats and given
several budgets. The prediction knows what a plan knows: the configuration, and a profile of the machine that was
measured on other experts. Its routing is made up; the engine's is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import moespac
from moespac.bench.machine import measure_machine, to_profile
from moespac.config import MeasureConfig, PlanConfig
from moespac.engine.build import DEMO
from moespac.experts.budget import slots_for
from moespac.experts.pack import pack
from moespac.model.inflate import inflate
from moespac.plan.model import read_planned_model
from moespac.plan.predict import Case, Speed, predict_speed
from moespac.sim.hardware import HardwareProfile
from moespac.types import Capacity

FORMATS = ("f32", "int8", "int4")
BUDGETS = ("100%", "50%", "25%")
_PROMPTS = ("The sea was", "Once upon a time")


@dataclass(frozen=True)
class Checked:
    """One model and budget."""

    format: str
    host_memory: str
    predicted: Speed
    measured: float  # tokens a second

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"inside": self.inside}


def check_plans(
    directory: Path, factor: int, tokens: int, config: MeasureConfig, progress: Callable[[int, int], None]
) -> list[Checked]:
    """``directory`` takes the models, their experts ``factor`` times as wide; ``tokens`` are generated a prompt.

    One thread computes, so that the readers have a core. Raises ConfigError or PackError when the directory cannot
    take it.
    """
    torch.set_num_threads(1)
    total = len(FORMATS) * len(BUDGETS)
    progress(0, total)
    profile = to_profile("this machine", measure_machine(directory, config, lambda done, of: None), config)
    wide = directory / "wide"
    inflate(DEMO / "target", wide, factor, progress=False)
    found: list[Checked] = []
    for format in FORMATS:
        packed = directory / format
        pack(wide, packed, format, progress=False)
        for budget in BUDGETS:
            found.append(_check(packed, format, budget, profile, tokens))
            progress(len(found), total)
    return found


def _check(path: Path, format: str, budget: str, profile: HardwareProfile, tokens: int) -> Checked:
    model = read_planned_model(str(path)).to_sim_model(format, trunk_bytes=4)
    slots = slots_for(budget, model.to_model_shape(), 0, "--host-memory")
    predicted = predict_speed(Case(profile, model, Capacity(slots)), PlanConfig())
    return Checked(format, budget, predicted, _measure(path, budget, tokens))


def _measure(path: Path, budget: str, tokens: int) -> float:
    """Decoding alone; the first text warms memory and sensors and does not count."""
    with moespac.load(path, host_memory=budget, draft="none", window=0, profile=None) as engine:
        engine.generate("It was in the year", max_new_tokens=tokens)
        summaries = [engine.generate(prompt, max_new_tokens=tokens).summary for prompt in _PROMPTS]
    seconds = sum(summary.seconds["total"] - summary.seconds["prefill"] for summary in summaries)
    return sum(summary.passes for summary in summaries) / seconds
