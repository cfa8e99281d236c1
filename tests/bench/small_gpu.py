"""A gpu bench in miniature, and records of one that never ran, in round figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moespac.bench.decode.task import Decoded
from moespac.bench.gpu.job import ENGINE, LINK_JOB, SHAPE, Gauges, Job, Result, Setting
from moespac.bench.gpu.records import OK, GpuRecord

SETTING = Setting(
    device="cpu",
    quick=True,
    layers=3,
    format="bf16",
    tokens=8,
    acceptance=0.7,
    draft="lookup",
    trace="synthetic",
    seed=0,
)
ON_A_CARD = replace(SETTING, device="cuda", quick=False, layers=48)


def job(work: Path, kind: str = ENGINE, runs: tuple[str, ...] = ("moe-spac",), **more: Any) -> Job:
    fields: dict[str, Any] = {
        "model": SHAPE,
        "budget": 0.25,
        "seconds": 60.0,
        "layers": SETTING.layers,
        "tokens": SETTING.tokens,
        "setting": SETTING,
        "work": str(work),
    }
    return Job(kind, runs=runs, **fields | more)


def record(contender: str, rate: float, drafted: int = 0, budget: float = 0.17, **more: Any) -> GpuRecord:
    """Ten tokens at ``rate`` a second."""
    causes = {"trunk": 6 / rate, "decide": 3 / rate, "other": 1 / rate}
    decoded = Decoded(
        token_ids=list(range(11)),
        first_seconds=0.5,
        seconds=10 / rate,
        read_bytes=0,
        passes=10,
        drafted=drafted,
        accepted=drafted // 2,
        hit_rate=0.5,
        causes=causes,
    )
    fields: dict[str, Any] = {
        "kind": ENGINE,
        "model": SHAPE,
        "status": OK,
        "setting": ON_A_CARD,
        "layers": 48,
        "wanted": 10,
        "versions": {"moespac": "0"},
        "started": "2026-11-25T12:00:00",
        "seconds": 1.0,
        "result": Result((decoded,), Gauges(link_bytes=900, link_seconds=1.0, busy_share=0.4)),
    }
    return GpuRecord(contender=contender, budget=budget, **fields | more)


def figures(kind: str = LINK_JOB, **found: Any) -> GpuRecord:
    """A run that gave figures and no text."""
    return record(kind, 1.0, kind=kind, result=Result(figures=found))
