"""Published tokens a second beside simulated ones, on machines that we do not own.

One row is fitted on each machine: llama.cpp's, for the bandwidth of a CPU that nobody named (docs/hardware.md). The
others follow from the profile, the model's dimensions and synthetic routing of published locality. What a system
decides is its policy here; what its runtime adds is in the machine (``issued_from_python``), and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moespac.bench.paper import HARDWARE, PUBLISHED, synthetic_trace
from moespac.config import EagerConfig
from moespac.sim.capacity import capacity_of
from moespac.sim.hardware import find_profile
from moespac.sim.runtimes import issued_from_python
from moespac.sim.shapes import find_model
from moespac.sim.simulator import Setting
from moespac.sim.study import Task, simulate_all

PAPER_MODEL, PAPER_CACHE = "qwen3-30b-a3b-f16", 0.17
OTHER_HARDWARE, OTHER_MODEL, OTHER_CACHE = "rtx5070ti-16gb", "qwen3-30b-a3b-q4", 0.5
OTHER_PUBLISHED = {"llama.cpp": 46.3, "freetoken": 118.8}  # FreeToken 0.2.1's own figures


@dataclass(frozen=True)
class Check:
    """One published figure and what the simulator makes of it."""

    machine: str
    system: str
    published: float  # tokens/s
    simulated: float
    remark: str = ""

    @property
    def ratio(self) -> float:
        return self.simulated / self.published

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"ratio": self.ratio}


def check_all(
    tokens: int, sequences: int, seed: int, jobs: int, progress: Callable[[int, int], None]
) -> list[Check]:
    """Every published figure, over ``sequences`` synthetic texts of ``tokens`` decoded tokens."""
    paper, model = find_profile(HARDWARE), find_model(PAPER_MODEL)
    other, other_model = find_profile(OTHER_HARDWARE), find_model(OTHER_MODEL)
    cases = [
        (paper, model, PAPER_CACHE, "llama.cpp", PUBLISHED, "fitted: the CPU's bandwidth"),
        (paper, model, PAPER_CACHE, "llama.cpp+sd", PUBLISHED, "K = 4, acceptance 0.8 assumed"),
        (issued_from_python(paper, EagerConfig()), model, PAPER_CACHE, "hybrimoe", PUBLISHED, "its own runtime"),
        (paper, model, PAPER_CACHE, "hybrimoe", PUBLISHED, "its decisions on a native runtime"),
        (paper, model, PAPER_CACHE, "moe-spac", PUBLISHED, "our policy, not the paper's"),
        (other, other_model, OTHER_CACHE, "llama.cpp", OTHER_PUBLISHED, "fitted: the CPU's bandwidth"),
        (other, other_model, OTHER_CACHE, "freetoken", OTHER_PUBLISHED, ""),
    ]  # fmt: skip
    tasks, trace = [], synthetic_trace(model, tokens + 32, seed)
    for hardware, shape, cache, policy, _, _ in cases:
        capacity = capacity_of(hardware, shape, cache)
        setting = Setting(hardware, shape, capacity, seed=seed, tokens=tokens)
        tasks.append(Task(policy, setting, tuple(range(sequences))))
    results = simulate_all(trace, tasks, jobs, progress)
    return [
        Check(hardware.name, policy, published[policy], result.tokens_per_second, remark)
        for (hardware, _, _, policy, published, remark), result in zip(cases, results, strict=True)
    ]
