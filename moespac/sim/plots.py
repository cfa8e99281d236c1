"""Results as PNG files. matplotlib is an extra and loaded only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moespac.errors import ConfigError
from moespac.sim.result import SimResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]

_INCHES, _DPI = (7.0, 4.8), 150
_BLUE, _ORANGE, _GREY = "#1f77b4", "#d95f02", "0.7"  # told apart by colour-blind readers too
_CAUSES = {  # of the deciding thread's time, in the order of a pass
    "draft": "#7570b3",
    "trunk": "#1b9e77",
    "host_experts": "#1f77b4",
    "wait_for_experts": "#d95f02",
    "wait_for_accelerator": "#e6ab02",
}


def draw_all(results: Sequence[SimResult], directory: Path) -> list[Path]:
    """Speed, time by cause and hits into ``directory``; returns the files. Raises ConfigError where that fails."""
    ordered = sorted(results, key=lambda result: result.tokens_per_second)
    speeds = {result.policy: result.tokens_per_second for result in ordered}
    plots: dict[str, Draw] = {
        "speed": lambda axes: _speed(axes, speeds, {}),
        "time": lambda axes: _time(axes, ordered),
        "hits": lambda axes: _hits(axes, ordered),
    }
    return [draw(plot, directory / f"{name}.png") for name, plot in plots.items()]


def draw_speeds(speeds: Mapping[str, float], published: Mapping[str, float], file: Path) -> Path:
    """Tokens a second by system, the slowest first, and what was published of some of them."""
    return draw(lambda axes: _speed(axes, speeds, published), file)


def draw(plot: Draw, file: Path, inches: tuple[float, float] = _INCHES) -> Path:
    """One plot into one file. Raises ConfigError where that cannot be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: install it with `pip install 'moespac[plots]'`") from None
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=_DPI)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); name another place") from None
    return file


def _speed(axes: Axes, speeds: Mapping[str, float], published: Mapping[str, float]) -> None:
    colours = [
        _GREY if name == "belady" else _ORANGE if name.startswith("moe-spac") else _BLUE for name in speeds
    ]
    bars = axes.barh(list(speeds), list(speeds.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    known = [name for name in speeds if name in published]
    if known:
        values = [published[name] for name in known]
        axes.scatter(values, known, marker="d", color="black", zorder=3, label="published by the paper")
        axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="tokens a second, simulated")


def _time(axes: Axes, results: Sequence[SimResult]) -> None:
    names, left = [result.policy for result in results], [0.0] * len(results)
    for cause, colour in _CAUSES.items():
        width = [1e3 * result.seconds.get(cause, 0.0) / result.tokens for result in results]
        axes.barh(names, width, left=left, color=colour, label=cause.replace("_", " "))
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.legend(loc="upper right", frameon=False)
    axes.set(xlabel="milliseconds a token")


def _hits(axes: Axes, results: Sequence[SimResult]) -> None:
    names = [result.policy for result in results]
    axes.barh(names, [100 * result.token_hit_rate for result in results], color=_GREY, label="by token")
    axes.barh(
        names, [100 * result.hit_rate for result in results], height=0.4, color=_BLUE, label="by expert"
    )
    axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="% found in the fastest tier", xlim=(0, 100))
