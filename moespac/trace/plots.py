"""The figures of an analysis as PNG files. matplotlib is an extra and loaded only here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moespac.errors import ConfigError
from moespac.trace.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES, _DPI = (7.0, 4.2), 150
_BLUE, _ORANGE, _GREY = "#1f77b4", "#d95f02", "0.45"  # told apart by colour-blind readers too


def draw_all(analysis: Analysis, directory: Path) -> list[Path]:
    """Draw every plot into ``directory``; returns the files. Raises ConfigError where that cannot be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: install it with `pip install 'moespac[plots]'`") from None
    plots: dict[str, Callable[[Axes, Analysis], None]] = {
        "reuse": _reuse,
        "skew": _skew,
        "windows": _windows,
        "lru": _lru,
    }
    files = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, draw in plots.items():
            figure = Figure(figsize=_INCHES, layout="constrained")
            axes = figure.add_subplot()
            draw(axes, analysis)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            files.append(directory / f"{name}.png")
            figure.savefig(files[-1], dpi=_DPI)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror}); name another place") from None
    return files


def _reuse(axes: Axes, analysis: Analysis) -> None:
    share = np.cumsum(analysis.reuse[1:]) / analysis.reuse.sum()
    distance = np.arange(1, len(share) + 1)
    axes.plot(distance, 100 * share, color=_BLUE, linewidth=2)
    if (median := analysis.median_reuse) is not None:
        axes.axvline(median, color=_GREY, linestyle=":")
        axes.annotate(f"median {median}", (median, 3), xytext=(4, 0), textcoords="offset points", color=_GREY)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 100)
    axes.set(
        title="How soon an expert is used again",
        xlabel="tokens since its last use, at most",
        ylabel="share of all uses (%)",
    )


def _skew(axes: Axes, analysis: Analysis) -> None:
    rank = np.arange(1, analysis.shape.experts + 1)
    _band(axes, rank, 100 * analysis.frequency)
    even = 100 / analysis.shape.experts
    axes.axhline(even, color=_GREY, linestyle=":", label=f"even use ({even:.1f}%)")
    axes.set_ylim(bottom=0)
    axes.set(
        title="How unevenly the experts of a layer are used",
        xlabel="expert, the most used of its layer first",
        ylabel="share of the layer's routings (%)",
    )
    axes.legend(frameon=False)


def _windows(axes: Axes, analysis: Analysis) -> None:
    experts = analysis.shape.experts
    for values, color, label in (
        (100 * analysis.unique / experts, _BLUE, "distinct experts, of a layer's"),
        (100 * analysis.overlap, _ORANGE, "of these, also used by the window before"),
    ):
        axes.plot(analysis.lengths, values.mean(axis=1), color=color, linewidth=2, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 100)
    axes.set(
        title="What a window of consecutive tokens needs",
        xlabel="tokens in the window",
        ylabel="experts (%), mean over layers",
    )
    axes.legend(frameon=False)


def _lru(axes: Axes, analysis: Analysis) -> None:
    slots = 100 * np.arange(1, analysis.shape.experts + 1) / analysis.shape.experts
    _band(axes, slots, 100 * analysis.lru_hits)
    axes.plot([0, 100], [0, 100], color=_GREY, linestyle=":", label="experts held at random")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set(
        title="What an LRU in each layer would hit",
        xlabel="slots, of a layer's experts (%)",
        ylabel="hits, of all uses (%)",
    )
    axes.legend(frameon=False, loc="lower right")


def _band(axes: Axes, x: NDArray, by_layer: NDArray) -> None:
    """The mean over layers, and what lies between the lowest and the highest."""
    axes.plot(x, by_layer.mean(axis=0), color=_BLUE, linewidth=2, label="mean over layers")
    axes.fill_between(
        x,
        by_layer.min(axis=0),
        by_layer.max(axis=0),
        color=_BLUE,
        alpha=0.18,
        linewidth=0,
        label="between layers",
    )
