"""VALIDATE: the engine measured on this machine, and the simulator on the traces of the very same runs.

The model is the embedded one, its experts inflated until they cost something. The hardware profile is measured
just before, in each round, with experts and blocks of this model's size, and so is one token of the draft model,
which is too small for its bytes to say what it takes. Nothing is fitted to the runs that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

import moespac
from moespac.bench.machine import measure_machine, to_profile
from moespac.config import MeasureConfig, MemoryConfig
from moespac.engine.build import DEMO
from moespac.engine.engine import Engine
from moespac.experts.pack import pack
from moespac.model.inflate import inflate
from moespac.policy.registry import make_policy
from moespac.sim.hardware import HardwareProfile
from moespac.sim.shapes import SimModel, read_model
from moespac.sim.simulator import Setting, run
from moespac.trace.recorder import TraceRecorder
from moespac.trace.schema import Trace

Progress = Callable[[int, int], None]

_FORMAT = "f32"  # what is computed in on a CPU: reading a record is then all that the store does
_PROMPTS = ("The sea was", "Once upon a time", "It was in the year", "She said that")


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    policy: str
    host_memory: str
    draft: str  # "auto" (the embedded drafter), "lookup" or "none"
    window: int


CASES = (
    Case("moe-spac", "100%", "none", 0),
    Case("moe-spac", "50%", "none", 0),
    Case("moe-spac", "25%", "none", 0),
    Case("moe-spac", "50%", "lookup", 4),
    Case("moe-spac", "50%", "auto", 4),
    Case("moe-spac", "25%", "auto", 2),
    Case("lru", "50%", "none", 0),
    Case("lru", "25%", "auto", 4),
    Case("llama.cpp", "50%", "none", 0),
    Case("hybrimoe", "50%", "none", 0),
)


@dataclass(frozen=True)
class Agreement:
    """Tokens a second of one case, in both worlds."""

    case: Case
    measured: float
    simulated: float
    measured_hits: float | None
    simulated_hits: float

    @property
    def error(self) -> float:
        """Of the simulation, as a share of what was measured."""
        return self.simulated / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        return vars(self.case) | {
            "measured_tokens_per_second": self.measured,
            "simulated_tokens_per_second": self.simulated,
            "error": self.error,
            "measured_hit_rate": self.measured_hits,
            "simulated_hit_rate": self.simulated_hits,
        }


def median_error(found: Sequence[Agreement]) -> float:
    return median(abs(each.error) for each in found)


def validate(
    directory: Path, factor: int, tokens: int, rounds: int, config: MeasureConfig, progress: Progress
) -> list[Agreement]:
    """Run all ``CASES`` in both worlds.

    ``directory`` takes the model, its experts ``factor`` times as wide; ``tokens`` are generated for each prompt.
    Each of the ``rounds`` measures the machine and then runs each case once: a shared machine's speed changes
    within minutes, and what is compared has to be of the same ones. Of a case the round of median error counts,
    the lower one of two. One thread computes, so that the readers have a core: what two threads of one small
    product do to each other is not what is simulated. Raises ConfigError or PackError when the directory cannot
    take it.
    """
    torch.set_num_threads(1)
    model, path = _make_model(directory, factor)
    config = _of_this_size(config, model)
    steps = count(1)
    total = rounds * len(CASES)
    progress(0, total)
    found: dict[Case, list[Agreement]] = {case: [] for case in CASES}
    for _ in range(rounds):
        measured = measure_machine(directory, config, lambda done, of: None)
        profile, draft_seconds = to_profile("this machine", measured, config), _draft_seconds(path, tokens)
        for case, each in found.items():
            each.append(_compare(case, path, model, profile, draft_seconds, tokens))
            progress(next(steps), total)
    return [sorted(each, key=lambda one: one.error)[(len(each) - 1) // 2] for each in found.values()]


def _make_model(directory: Path, factor: int) -> tuple[SimModel, Path]:
    """Inflated, and packed so that reads are direct ones: the page cache would hide the storage."""
    wide, path = directory / "wide", directory / "packed"
    inflate(DEMO / "target", wide, factor, progress=False)
    pack(wide, path, _FORMAT, progress=False)
    return read_model(wide, _FORMAT), path


def _of_this_size(config: MeasureConfig, model: SimModel) -> MeasureConfig:
    """Measure experts such as the model has, and blocks such as are read: a record in stripes."""
    width = model.expert_weights // (3 * model.hidden)
    block = min(model.expert_bytes, MemoryConfig().stripe_bytes)
    return replace(config, block_bytes=(block,), expert_hidden=model.hidden, expert_width=width)


def _draft_seconds(path: Path, tokens: int) -> float:
    """Of one token of the embedded drafter, all experts being in memory."""
    with _load(Case("moe-spac", "100%", "auto", 4), path) as engine:
        run = _run(engine, tokens)
    return run.draft_seconds / int(run.trace.drafted.sum())


def _compare(
    case: Case, path: Path, model: SimModel, profile: HardwareProfile, draft_seconds: float, tokens: int
) -> Agreement:
    with _load(case, path) as engine:
        seen = _run(engine, tokens)
        setting = Setting(
            profile,
            replace(model, expert_bytes=engine.shape.record_bytes),
            engine.runtime.memory.residency.capacity,
            window=case.window,
            governed=frozenset(),
            draft="lookup" if case.draft == "lookup" else "model",
            draft_seconds=draft_seconds,
            warm=False,
            engine=engine.config,
        )
        policy = make_policy(case.policy, engine.shape, setting.capacity, engine.config.method)
    simulated = run(policy, seen.trace, setting, range(seen.trace.sequences))
    return Agreement(
        case, seen.tokens_per_second, simulated.tokens_per_second, seen.hit_rate, simulated.hit_rate
    )


def _load(case: Case, path: Path) -> Engine:
    return moespac.load(
        path,
        draft=DEMO / "draft" if case.draft == "auto" else case.draft,
        window=case.window,
        host_memory=case.host_memory,
        policy=case.policy,
        profile=None,
    )


@dataclass(frozen=True)
class _Run:
    trace: Trace
    tokens_per_second: float
    hit_rate: float | None
    draft_seconds: float


def _run(engine: Engine, tokens: int) -> _Run:
    """All prompts, from empty memories on. Prefills are recorded, but their time is not counted."""
    recorder = engine.runtime.recorder = TraceRecorder(engine.shape, "this machine")
    decoded = seconds = draft_seconds = 0.0
    for prompt in _PROMPTS:
        recorder.begin_sequence()
        summary = engine.generate(prompt, max_new_tokens=tokens).summary
        spent = summary.seconds["total"] - summary.seconds["prefill"]
        seconds += spent
        decoded += spent * (summary.tokens_per_second or 0.0)
        draft_seconds += summary.seconds.get("draft", 0.0)
    return _Run(recorder.trace(), decoded / seconds, engine.runtime.stats.hit_rate, draft_seconds)
