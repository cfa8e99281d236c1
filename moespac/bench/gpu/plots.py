"""The records as PNG files: speed by contender and share, and where this engine's time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moespac.bench.gpu import job
from moespac.bench.gpu.contenders import PROGRAMS
from moespac.bench.gpu.goals import is_ours, speeds_of
from moespac.bench.gpu.job import PAIR, SHAPE
from moespac.bench.gpu.records import GpuRecord
from moespac.sim.plots import Draw, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARES = (
    "#d95f02",
    "#7570b3",
    "#1b9e77",
    "#e6ab02",
)  # the smallest first; all can tell them apart
_CAUSES = ("#1b9e77", "#1f77b4", "#d95f02", "#e6ab02", "#7570b3", "#66a61e", "#a6761d", "#e7298a", "#999999")
_MARKERS = ("o", "s", "^", "D")
_ROW, _MARGIN, _WIDE = 0.27, 1.3, 7.5  # inches: of a contender, around them, across
_SHOWN = 0.005  # of the longest bar: shorter pieces go to "other"
_OTHER = "other"


def draw_all(records: Sequence[GpuRecord], directory: Path) -> list[Path]:
    """All plots that the records are enough for. Raises ConfigError where that fails."""
    files = []
    for model in (SHAPE, PAIR):
        budgets = sorted({r.budget for r in records if r.timed and r.model == model and r.budget < 1})
        if not budgets:
            continue
        speeds = {budget: speeds_of(records, model, budget) for budget in budgets}
        names = _by_speed(speeds)
        plots: dict[str, tuple[Draw, int]] = {
            "speed": (lambda axes, s=speeds, n=names: _speed(axes, s, n), len(names))  # type: ignore[misc]
        }
        engines = sorted(
            (r for r in speeds[budgets[0]].values() if r.kind == job.ENGINE), key=lambda r: -r.rate
        )
        if engines:
            plots["time"] = (lambda axes, e=engines: _time(axes, e), len(engines))  # type: ignore[misc]
        for name, (plot, rows) in plots.items():
            files.append(
                draw(plot, directory / f"{name}-{model}.png", (_WIDE, _MARGIN + _ROW * max(rows, 4)))
            )
    return files


def _by_speed(speeds: dict[float, dict[str, GpuRecord]]) -> list[str]:
    """All contenders, the slowest first, by the smallest share that they ran at."""
    fastest: dict[str, float] = {}
    for budget in sorted(speeds):
        for name, record in speeds[budget].items():
            fastest.setdefault(name, record.rate)
    return sorted(fastest, key=lambda name: fastest[name])


def _speed(axes: Axes, speeds: dict[float, dict[str, GpuRecord]], names: Sequence[str]) -> None:
    """A row a contender, a mark a share, joined so that the gain of more memory is seen."""
    rows = {name: at for at, name in enumerate(names)}
    for name, at in rows.items():
        rates = [found[name].rate for found in speeds.values() if name in found]
        axes.plot([min(rates), max(rates)], [at, at], color="0.8", linewidth=1.5, zorder=1)
    for number, (budget, found) in enumerate(speeds.items()):
        axes.scatter(
            [record.rate for record in found.values()],
            [rows[name] for name in found],
            color=_SHARES[number % len(_SHARES)],
            marker=_MARKERS[number % len(_MARKERS)],
            s=36,
            zorder=2,
            label=f"room for {budget:.0%}",
        )
    axes.set_yticks(range(len(names)), names)
    _mark_labels(axes, names)
    axes.set(
        xscale="log", xlabel="tokens a second (log)", title=_title(next(iter(speeds[min(speeds)].values())))
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.grid(axis="x", which="both", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")


def _mark_labels(axes: Axes, names: Sequence[str]) -> None:
    """Ours in bold, other programs in italics; the rest are policies of this engine."""
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if is_ours(name) else "normal")
        label.set_fontstyle("italic" if name in PROGRAMS else "normal")


def _title(record: GpuRecord) -> str:
    if record.setting.quick:
        return f"{record.model}, a quick run in small"
    name = f"Qwen3-30B-A3B's shape, {record.layers} layers, replayed"
    return name if record.model == SHAPE else "the embedded pair with wide experts"


def _time(axes: Axes, engines: Sequence[GpuRecord]) -> None:
    """Milliseconds a token by cause, a bar a contender, the fastest on top."""
    shown = list(reversed(engines))
    names = [record.contender for record in shown]
    parts = [_parts(record, max(1 / each.rate for each in engines)) for record in shown]
    most = {cause: max(part.get(cause, 0.0) for part in parts) for part in parts for cause in part}
    left = [0.0] * len(shown)
    for number, cause in enumerate(sorted(most, key=lambda cause: (cause == _OTHER, -most[cause]))):
        width = [1e3 * part.get(cause, 0.0) for part in parts]
        colour = "0.75" if cause == _OTHER else _CAUSES[number % len(_CAUSES)]
        axes.barh(names, width, left=left, color=colour, label=cause.replace("_", " "))
        left = [a + b for a, b in zip(left, width, strict=True)]
    _mark_labels(axes, names)
    for at, end in enumerate(left):
        axes.annotate(
            f"{end:.3g}", (end, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.1, y=0.02)
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    budget = engines[0].budget
    axes.set(xlabel="milliseconds a token", title=f"{_title(engines[0])}: room for {budget:.0%}")


def _parts(record: GpuRecord, longest: float) -> dict[str, float]:
    """Seconds a token by cause; together they are what it took. Time on other threads overlaps and is left out."""
    causes = {cause: s for cause, s in record.causes.items() if cause != "accelerator_experts"}
    large = {cause: s for cause, s in causes.items() if s >= _SHOWN * longest and cause != _OTHER}
    return large | {_OTHER: max(1 / record.rate - sum(large.values()), 0.0)}
