"""The records as tables of text, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moespac.bench.gpu.contenders import RESIDENT
from moespac.bench.gpu.goals import (
    Goal,
    goals_of,
    is_ours,
    link_bandwidth,
    pair_ratios,
    share_of_link,
    speeds_of,
)
from moespac.bench.gpu.job import PAIR, SHAPE
from moespac.bench.gpu.records import GpuRecord
from moespac.bench.paper import OURS
from moespac.cli.tables import figure, share

_NAMES = {SHAPE: "Qwen3-30B-A3B's shape", PAIR: "the embedded pair, inflated"}


@dataclass(frozen=True)
class TextTable:
    """``rows`` under ``head``; the first column is text, the others are figures."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: Sequence[int] = ()  # rows of moe-spac
    spare: Sequence[str] = ()  # columns that a narrow place does without


def all_tables(records: Sequence[GpuRecord]) -> list[TextTable]:
    """Goals first, then each model and share."""
    tables = [goals_table(goals_of(records), "Goals")]
    if ratios := pair_ratios(records):
        rows = [[goal.text, goal.shown, goal.who] for goal in ratios]
        tables.append(TextTable(f"The same on {_NAMES[PAIR]}", ("moe-spac", "measured", "of"), rows))
    return [*tables, *speed_tables(records)]


def goals_table(goals: Sequence[Goal], title: str) -> TextTable:
    rows = [[goal.text, goal.wanted, goal.shown, goal.verdict, goal.who] for goal in goals]
    return TextTable(title, ("moe-spac", "wanted", "measured", "verdict", "of"), rows, spare=("of",))


def speed_tables(records: Sequence[GpuRecord]) -> list[TextTable]:
    """One for each model and share, the fastest first."""
    settings = dict.fromkeys((r.model, r.budget) for r in records if r.timed)
    bandwidth = link_bandwidth(records)
    tables = []
    for model, budget in sorted(settings, key=lambda each: (each[0] != SHAPE, each[1])):
        speeds = speeds_of(records, model, budget)
        rows = sorted(speeds.values(), key=lambda record: -record.rate)
        leader = speeds.get(OURS) or speeds.get(RESIDENT)
        ours = [at for at, record in enumerate(rows) if is_ours(record.contender)]
        cells = [_row(record, leader, bandwidth) for record in rows]
        tables.append(TextTable(_title(model, budget, rows), _HEAD, cells, ours, _SPARE))
    return tables


_HEAD = (
    "contender",
    "tokens/s",
    "moe-spac over it",
    "hits",
    "accepted",
    "tokens a pass",
    "link GB/s",
    "of the link",
    "device busy",
    "peak GB",
)
_SPARE = ("accepted", "tokens a pass", "of the link")


def _title(model: str, budget: float, rows: Sequence[GpuRecord]) -> str:
    layers = f", {rows[0].layers} layers" if model == SHAPE else ""
    room = "all experts" if budget == 1 else f"{budget:.0%} of the experts"
    return f"{_NAMES[model]}{layers}: room for {room} on the accelerator"


def _row(record: GpuRecord, leader: GpuRecord | None, bandwidth: float | None) -> list[str]:
    gauges = record.gauges
    rate, peak = gauges.link_rate, gauges.peak_bytes
    return [
        record.contender,
        f"{record.rate:.2f}",
        f"{leader.rate / record.rate:.2f}" if leader else "",
        _or_blank(share(record.hit_rate)),
        _or_blank(share(record.acceptance)),
        f"{record.tokens_per_pass:.2f}",
        _or_blank(figure(rate / 1e9 if rate else None, ".1f")),
        _or_blank(share(share_of_link(record, bandwidth))),
        _or_blank(share(gauges.busy_share)),
        _or_blank(figure(peak / 1e9 if peak else None, ".1f")),
    ]


def _or_blank(text: str) -> str:
    return "" if text == "n/a" else text
