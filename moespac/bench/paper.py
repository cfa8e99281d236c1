"""The paper's table (arXiv 2603.09983), simulated: its machine and cache, every policy, on the texts of a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from moespac.config import EagerConfig
from moespac.policy.baselines.belady import BeladyPolicy
from moespac.policy.planner import MoeSpacPolicy
from moespac.policy.registry import SIMULATOR_POLICIES
from moespac.sim.result import SimResult
from moespac.sim.runtimes import EAGER, issued_from_python
from moespac.sim.shapes import SimModel
from moespac.sim.simulator import Setting
from moespac.sim.study import Task, simulate_all
from moespac.sim.synthetic import synthetic_routing
from moespac.trace.schema import Trace

HARDWARE = "rtx4090-pcie4"
BENCHMARKS = 7  # that the paper's means are over

OURS, BOUND = MoeSpacPolicy.name, BeladyPolicy.name
OURS_UNGOVERNED, OURS_PLAIN = f"{OURS}, fixed K", f"{OURS}, K = 0"

PUBLISHED = {OURS: 25.06, "llama.cpp+sd": 17.66, "llama.cpp": 15.23, "hybrimoe": 12.15}  # mean tokens/s
PUBLISHED_OVER_SPECULATIVE, PUBLISHED_OVER_STANDARD = 1.42, 4.04
STANDARD = (  # the baselines that the paper's mean is over
    "accelerate", "vllm-offload", "llama.cpp", "llama.cpp+sd", "mixtral-offloading", "moe-infinity", "sp-moe",
    "fate", "hybrimoe",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One system, on each category of text."""

    name: str
    results: dict[str, SimResult]
    as_built: dict[str, SimResult] | None = None  # with the runtime of its own code, where that is another

    @property
    def speed(self) -> float:
        """Tokens a second, the mean over the categories, as the paper's."""
        return mean(result.tokens_per_second for result in self.results.values())

    @property
    def speed_as_built(self) -> float:
        """The same with the system's own runtime."""
        return mean(result.tokens_per_second for result in (self.as_built or self.results).values())

    @property
    def speculates(self) -> bool:
        return any(result.drafted for result in self.results.values())

    def to_dict(self) -> dict[str, Any]:
        by_category = {category: result.to_dict() for category, result in self.results.items()}
        published = PUBLISHED.get(self.name)
        speeds = {"tokens_per_second": self.speed, "as_built": self.speed_as_built, "published": published}
        return {"policy": self.name} | speeds | {"categories": by_category}


@dataclass(frozen=True)
class Comparison:
    """What moe-spac gains over others."""

    best_speculative: Row
    best_plain: Row
    over_best_speculative: float
    over_best_plain: float
    over_itself_plain: float  # what speculation gains
    over_itself_ungoverned: float  # what the governor gains
    over_mean_of_standard: float  # over the mean of their speeds
    mean_over_standard: float  # the mean of the factors over each
    over_mean_as_built: float  # both once more, each baseline with its own runtime
    mean_over_as_built: float
    share_of_bound: float


def categories_of(trace: Trace) -> dict[str, list[int]]:
    """The sequences of each benchmark, or all of them where the trace names none."""
    found: dict[str, list[int]] = {}
    for sequence, category in enumerate(trace.categories):
        found.setdefault(category.split("/")[0] or "all texts", []).append(sequence)
    return found


def synthetic_trace(model: SimModel, tokens: int, seed: int) -> Trace:
    """As many texts as the paper has benchmarks, with the locality of Qwen3-30B-A3B's routing."""
    made = synthetic_routing(model.to_model_shape(), [tokens] * BENCHMARKS, seed)
    return made.to_trace(model.experts, f"synthetic, with the locality of Qwen3-30B-A3B's, seed {seed}")


def run_paper(
    trace: Trace,
    setting: Setting,
    per_category: int,
    jobs: int,
    progress: Callable[[int, int], None],
) -> list[Row]:
    """Every policy, and moe-spac without its governor and without speculation, over the first ``per_category``
    sequences of each category. The fastest first."""
    systems = {name: (name, setting) for name in SIMULATOR_POLICIES}
    systems[OURS_UNGOVERNED] = (OURS, replace(setting, governed=frozenset()))
    systems[OURS_PLAIN] = (OURS, replace(setting, window=0))
    categories = {name: tuple(found[:per_category]) for name, found in categories_of(trace).items()}
    built = replace(setting, hardware=issued_from_python(setting.hardware, EagerConfig()))
    worlds = [*systems.values(), *((name, built) for name in sorted(EAGER))]
    tasks = [Task(policy, world, sequences) for policy, world in worlds for sequences in categories.values()]
    results = iter(simulate_all(trace, tasks, jobs, progress))
    found = [{category: next(results) for category in categories} for _ in worlds]
    as_built = dict(zip(sorted(EAGER), found[len(systems) :], strict=True))
    rows = [Row(name, each, as_built.get(name)) for name, each in zip(systems, found, strict=False)]
    return sorted(rows, key=lambda row: -row.speed)


def compare(rows: Sequence[Row]) -> Comparison:
    """moe-spac beside all others of ``run_paper``."""
    by_name = {row.name: row for row in rows}
    ours = by_name[OURS].speed
    others = [row for row in rows if row.name not in (OURS, OURS_UNGOVERNED, OURS_PLAIN, BOUND)]
    best_speculative = max((row for row in others if row.speculates), key=lambda row: row.speed)
    best_plain = max((row for row in others if not row.speculates), key=lambda row: row.speed)
    standard = [by_name[name].speed for name in STANDARD]
    as_built = [by_name[name].speed_as_built for name in STANDARD]
    return Comparison(
        best_speculative=best_speculative,
        best_plain=best_plain,
        over_best_speculative=ours / best_speculative.speed,
        over_best_plain=ours / best_plain.speed,
        over_itself_plain=ours / by_name[OURS_PLAIN].speed,
        over_itself_ungoverned=ours / by_name[OURS_UNGOVERNED].speed,
        over_mean_of_standard=ours / mean(standard),
        mean_over_standard=mean(ours / speed for speed in standard),
        over_mean_as_built=ours / mean(as_built),
        mean_over_as_built=mean(ours / speed for speed in as_built),
        share_of_bound=ours / by_name[BOUND].speed,
    )
