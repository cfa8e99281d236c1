"""What is to hold, and what the records say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from moespac.bench.gpu import job
from moespac.bench.gpu.contenders import COMPILED, OFFLOAD, RESIDENT
from moespac.bench.gpu.job import PAIR, SHAPE
from moespac.bench.gpu.records import GpuRecord
from moespac.bench.paper import OURS, OURS_PLAIN, OURS_UNGOVERNED, STANDARD

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"

SHARE = 0.17  # of the experts, that the goals are about
OVER_SPECULATIVE, OVER_STANDARD, OVER_OFFLOAD = 1.42, 4.04, 10.0
BEHIND_COMPILED = 1.3
OF_LINK = 0.85
LAYER_SECONDS = 150e-6


@dataclass(frozen=True)
class Goal:
    """``value`` is None where the records do not have it; ``who``: what it is of, or why there is none."""

    text: str
    wanted: str
    value: float | None
    holds: bool | None
    who: str
    format: str = ".2f"

    @property
    def verdict(self) -> str:
        return NOT_MEASURED if self.holds is None else MET if self.holds else NOT_MET

    @property
    def shown(self) -> str:
        return "" if self.value is None else f"{self.value:{self.format}}"


def goals_of(records: Sequence[GpuRecord]) -> list[Goal]:
    """All of them. Without a GPU, and in a quick run, none is measured, whatever the figures."""
    speeds = speeds_of(records, SHAPE, SHARE)
    found = [
        over_speculative(speeds),
        over_standard(speeds),
        over_offload(speeds),
        behind_compiled(records),
        of_link(records),
        layer_seconds(records),
        *_exactness(records),
    ]
    setting = records[0].setting
    if setting.device == "cuda" and not setting.quick:
        return found
    why = "a quick run" if setting.quick else "no GPU"
    return [replace(goal, holds=None, who=f"{why}: {goal.who}") for goal in found]


def speeds_of(records: Sequence[GpuRecord], model: str, budget: float) -> dict[str, GpuRecord]:
    """By contender, the latest of each that decoded something."""
    return {r.contender: r for r in records if r.timed and r.model == model and r.budget == budget}


def over_speculative(speeds: Mapping[str, GpuRecord]) -> Goal:
    goal = Goal(
        "over the best speculative baseline", f"≥ {OVER_SPECULATIVE}", None, None, "no baseline drafted"
    )
    best = best_speculative(speeds)
    if OURS not in speeds or best is None:
        return goal
    factor = speeds[OURS].rate / best.rate
    return replace(goal, value=factor, holds=factor >= OVER_SPECULATIVE, who=best.contender)


def best_speculative(speeds: Mapping[str, GpuRecord]) -> GpuRecord | None:
    """The fastest baseline of those that drafted."""
    others = [r for name, r in speeds.items() if r.speculated and not is_ours(name)]
    return max(others, key=lambda record: record.rate, default=None)


def over_standard(speeds: Mapping[str, GpuRecord]) -> Goal:
    """All of the paper's baselines have to be there: the mean without its slowest is another figure."""
    there = [speeds[name].rate for name in STANDARD if name in speeds]
    missing = [name for name in STANDARD if name not in speeds]
    goal = Goal("over the mean of the standard baselines", f"≥ {OVER_STANDARD}", None, None, "none ran")
    if OURS not in speeds or not there:
        return goal
    factor = speeds[OURS].rate / mean(there)
    if missing:
        return replace(goal, value=factor, who=f"the mean of {len(there)}; without {', '.join(missing)}")
    return replace(goal, value=factor, holds=factor >= OVER_STANDARD, who=f"the mean of {len(there)}")


def over_offload(speeds: Mapping[str, GpuRecord]) -> Goal:
    goal = Goal(f"over {OFFLOAD}", f"≥ {OVER_OFFLOAD:g}", None, None, "it did not run")
    if OURS not in speeds or OFFLOAD not in speeds:
        return goal
    factor = speeds[OURS].rate / speeds[OFFLOAD].rate
    return replace(goal, value=factor, holds=factor >= OVER_OFFLOAD, who=OFFLOAD)


def behind_compiled(records: Sequence[GpuRecord]) -> Goal:
    speeds = speeds_of(records, SHAPE, 1.0)
    goal = Goal(f"{COMPILED}, over ours, all resident", f"≤ {BEHIND_COMPILED}", None, None, "not both ran")
    if RESIDENT not in speeds or COMPILED not in speeds:
        return goal
    factor = speeds[COMPILED].rate / speeds[RESIDENT].rate
    layers = speeds[RESIDENT].layers
    return replace(goal, value=factor, holds=factor <= BEHIND_COMPILED, who=f"{layers} layers")


def of_link(records: Sequence[GpuRecord]) -> Goal:
    goal = Goal("copies, of the link's bandwidth", f"≥ {OF_LINK:.0%}", None, None, "not both known", ".0%")
    ours = speeds_of(records, SHAPE, SHARE).get(OURS)
    share = share_of_link(ours, link_bandwidth(records)) if ours else None
    return goal if share is None else replace(goal, value=share, holds=share >= OF_LINK, who=OURS)


def link_bandwidth(records: Sequence[GpuRecord]) -> float | None:
    """Bytes/s, as it was measured alone."""
    return _figure(records, job.LINK_JOB, "link_bandwidth")


def share_of_link(record: GpuRecord, bandwidth: float | None) -> float | None:
    rate = record.gauges.link_rate
    return rate / bandwidth if rate and bandwidth else None


def layer_seconds(records: Sequence[GpuRecord]) -> Goal:
    text, wanted = "host time of a layer's critical path, us", f"< {LAYER_SECONDS * 1e6:.0f}"
    goal = Goal(text, wanted, None, None, "the engine does not say", ".0f")
    ours = speeds_of(records, SHAPE, SHARE).get(OURS)
    seconds = ours.gauges.layer_seconds if ours else None
    if seconds is None:
        return goal
    return replace(goal, value=seconds * 1e6, holds=seconds < LAYER_SECONDS, who=OURS)


def _exactness(records: Sequence[GpuRecord]) -> list[Goal]:
    same, of = (_figure(records, job.EXACT_JOB, name) for name in ("tokens_same", "tokens_of"))
    tokens = Goal("float32: greedy tokens equal transformers'", "all", None, None, "not compared", ".0%")
    if same is not None and of:
        tokens = replace(tokens, value=same / of, holds=same == of, who=f"{same:.0f} of {of:.0f} tokens")
    off, rounding = (_figure(records, job.EXACT_JOB, n) for n in ("logits_off", "logits_rounding"))
    most = records[0].setting.config.logits_tolerance
    wanted = f"≤ {most:g} x rounding"
    logits = Goal("bfloat16: logits beside transformers'", wanted, None, None, "not compared")
    if off is not None and rounding:
        value = off / rounding
        who = f"off by {off:.3f} of their spread, rounding by {rounding:.3f}"
        logits = replace(logits, value=value, holds=value <= most, who=who)
    return [tokens, logits]


def _figure(records: Sequence[GpuRecord], kind: str, name: str) -> Any:
    found = [record.result.figures.get(name) for record in records if record.kind == kind and record.ok]
    return found[-1] if found else None


def is_ours(name: str) -> bool:
    return name in (OURS, OURS_PLAIN, OURS_UNGOVERNED, RESIDENT)


def pair_ratios(records: Sequence[GpuRecord]) -> list[Goal]:
    """The same ratios on the pair, with real routing and acceptance: nobody asked for a figure there."""
    speeds = speeds_of(records, PAIR, SHARE)
    found = [over_speculative(speeds), over_offload(speeds)]
    return [replace(goal, wanted="", holds=None) for goal in found if goal.value is not None]
