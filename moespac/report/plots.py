"""Runs side by side, as PNG files. matplotlib is an extra and loaded only here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moespac.errors import ConfigError
from moespac.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", Sequence[Run]], None]

_WIDTH, _BESIDE, _A_BAR, _DPI = 7.5, 1.3, 0.42, 150  # inches: of a figure, of its labels, of each run
_BLUE, _ORANGE, _GREY = "#1f77b4", "#d95f02", "0.75"  # told apart by colour-blind readers too
_CAUSES = {  # in the order of a pass
    "prefill": "#999999",
    "draft": "#7570b3",
    "trunk": "#1b9e77",
    "host_experts": "#1f77b4",
    "decide": "#e7298a",
    "verify": "#f4a6cf",
    "wait_for_experts": "#d95f02",
    "wait_for_accelerator": "#e6ab02",
}
_OTHER = "0.88"


def draw_runs(runs: Sequence[Run], directory: Path) -> dict[str, Path]:
    """Title -> file. Raises ConfigError where that cannot be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: install it with `pip install 'moespac[plots]'`") from None
    plots: dict[str, tuple[str, Draw]] = {
        "Tokens a second": ("speed", _speed),
        "Hit rate and acceptance": ("rates", _rates),
        "Seconds by cause": ("time", _time),
        "Bytes read": ("bytes", _bytes),
    }
    files = {}
    for title, (name, draw) in plots.items():
        figure = Figure(
            figsize=(_WIDTH, _BESIDE + _A_BAR * max(len(runs), 2)), dpi=_DPI, layout="constrained"
        )
        axes = figure.add_subplot()
        draw(axes, runs)
        axes.invert_yaxis()  # the first run on top
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left")
        files[title] = directory / f"{name}.png"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(files[title])
        except OSError as error:
            raise ConfigError(
                f"{directory}: cannot be written ({error.strerror}); name another place"
            ) from None
    return files


def _speed(axes: Axes, runs: Sequence[Run]) -> None:
    bars = axes.barh([run.name for run in runs], [run.tokens_per_second or 0.0 for run in runs], color=_BLUE)
    axes.bar_label(
        bars,
        ["n/a" if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}" for run in runs],
        padding=3,
    )
    axes.set(xlabel="tokens a second of decoding")
    axes.margins(x=0.1)


def _rates(axes: Axes, runs: Sequence[Run]) -> None:
    places = range(len(runs))
    for offset, name, colour in ((-0.2, "hit_rate", _BLUE), (0.2, "acceptance", _ORANGE)):
        values = [getattr(run, name) for run in runs]
        bars = axes.barh(
            [at + offset for at in places],
            [100 * (value or 0.0) for value in values],
            height=0.36,
            color=colour,
            label=name.replace("_", " "),
        )
        axes.bar_label(bars, ["n/a" if value is None else f"{value:.0%}" for value in values], padding=3)
    axes.set_yticks(list(places), [run.name for run in runs])
    axes.set(xlabel="% of active experts, % of drafts", xlim=(0, 112))
    _legend_below(axes, 2)


def _time(axes: Axes, runs: Sequence[Run]) -> None:
    known = list(_CAUSES)
    unknown = sorted({cause for run in runs for cause in run.causes} - set(known))
    left = [0.0] * len(runs)
    for cause in (*known, *unknown):
        width = [run.causes.get(cause, 0.0) for run in runs]
        if any(width):
            label = cause.replace("_", " ")
            axes.barh(
                [run.name for run in runs], width, left=left, color=_CAUSES.get(cause, _OTHER), label=label
            )
            left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set(xlabel="seconds")
    _legend_below(axes, 4)


def _bytes(axes: Axes, runs: Sequence[Run]) -> None:
    links = list(dict.fromkeys(link for run in runs for link in run.bytes_read))
    colours: Mapping[str, str] = {"storage": _ORANGE, "link": _BLUE}
    left = [0.0] * len(runs)
    for link in links:
        width = [run.bytes_read.get(link, 0) / 1e6 / max(run.tokens, 1) for run in runs]
        if not any(width):
            continue
        axes.barh([run.name for run in runs], width, left=left, color=colours.get(link, _GREY), label=link)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set(xlabel="MB for each decoded token")
    _legend_below(axes, len(links))


def _legend_below(axes: Axes, columns: int) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False)
