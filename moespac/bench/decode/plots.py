"""The records as PNG files: speed by contender, by memory, and where this engine's time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moespac.bench.decode.contenders import OURS, Contender
from moespac.bench.decode.records import Record
from moespac.bench.decode.summary import Line, causes_of, lines
from moespac.sim.plots import Draw, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORANGE, _BLUE, _GREEN = (
    "#d95f02",
    "#1f77b4",
    "#1b9e77",
)  # ours, our baselines, peers: all can tell them apart
_FAR = 4  # times the fastest: a bound beyond is not drawn
_MARKERS = {"none": "o", "draft": "s", "lookup": "^"}
_PALETTE = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e6ab02", "#66a61e", "#a6761d", "#999999")


def draw_all(records: Sequence[Record], directory: Path) -> list[Path]:
    """All plots that the records are enough for. Raises ConfigError where that fails."""
    found = lines(records)
    budgets = sorted({line.budget for line in found}, reverse=True)
    plots: dict[str, Draw] = {}
    for budget in budgets:
        here = [line for line in reversed(found) if line.budget == budget]
        plots[f"speed-{budget:.0%}".replace("%", "")] = lambda axes, here=here: _speed(axes, here)  # type: ignore[misc]
    if len(budgets) > 1:
        plots["curve"] = lambda axes: _curve(axes, found)
    engines = [line for line in found if not line.contender.is_peer]
    if engines:
        plots["time"] = lambda axes: _time(axes, engines)
    return [draw(plot, directory / f"{name}.png") for name, plot in plots.items()]


def _speed(axes: Axes, here: Sequence[Line]) -> None:
    """Medians as bars, the rounds' range as whiskers, the bound as a mark."""
    names, rates = [line.name for line in here], [line.rate for line in here]
    ranges = [
        [line.rate - line.spread[0] for line in here],
        [line.spread[1] - line.rate for line in here],
    ]
    axes.barh(
        names, rates, xerr=ranges, color=[_colour(line.contender) for line in here], ecolor="0.3", capsize=2
    )
    for at, line in enumerate(here):
        axes.annotate(
            f"{line.rate:.2f}", (line.spread[1], at), xytext=(4, 0), textcoords="offset points", va="center"
        )
    marks = [(bound, line.name) for line in here if (bound := _near_bound(line, max(rates)))]
    if marks:
        bounds, marked = zip(*marks, strict=True)
        axes.scatter(bounds, marked, marker="|", s=160, color="black", zorder=3, label="bound of the run")
        axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="tokens a second", title=f"memory for {here[0].budget:.0%} of the experts")
    axes.margins(x=0.12)


def _near_bound(line: Line, most: float) -> float | None:
    """The run's bound, unless it is so far off that it would squeeze the bars."""
    bound = line.median_or_none(lambda record: record.bound)
    return bound if bound is not None and bound < _FAR * most else None


def _curve(axes: Axes, found: Sequence[Line]) -> None:
    for number, name in enumerate(dict.fromkeys(line.name for line in found)):
        own = sorted((line for line in found if line.name == name), key=lambda line: line.budget)
        if len(own) > 1:
            ours = own[0].contender.system == OURS
            axes.plot(
                [100 * line.budget for line in own],
                [line.rate for line in own],
                marker=_MARKERS[own[0].contender.draft],
                linewidth=2.5 if ours else 1.2,
                color=_PALETTE[number % len(_PALETTE)],
                linestyle="--" if own[0].contender.is_peer else "-",
                label=name,
            )
    axes.set(xlabel="memory for % of the experts", ylabel="tokens a second", yscale="log")
    axes.legend(frameon=False, fontsize="small")


def _time(axes: Axes, engines: Sequence[Line]) -> None:
    """Milliseconds a token by cause, a bar a contender and budget."""
    shown = list(reversed(engines))
    names = [f"{line.name} {line.budget:.0%}" for line in shown]
    causes = causes_of(shown)
    left = [0.0] * len(shown)
    for number, cause in enumerate(causes):
        width = [1e3 * line.cause(cause) for line in shown]
        axes.barh(
            names, width, left=left, color=_PALETTE[number % len(_PALETTE)], label=cause.replace("_", " ")
        )
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.legend(frameon=False, fontsize="small")
    axes.set(xlabel="milliseconds a decoded token")


def _colour(contender: Contender) -> str:
    return _ORANGE if contender.system == OURS else _GREEN if contender.is_peer else _BLUE
