"""Runs as a Markdown table with the pictures beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moespac.cli.tables import figure, share, size
from moespac.report.runs import Run

_COLUMNS = (
    "run",
    "tokens",
    "tokens/s",
    "hit rate",
    "acceptance",
    "tokens a pass",
    "storage",
    "link",
    "seconds",
)


def markdown(runs: Sequence[Run], pictures: Mapping[str, Path]) -> str:
    """``pictures``: title -> file, in the directory that the text goes to."""
    lines = [_row(_COLUMNS), _row(["---"] + ["---:"] * (len(_COLUMNS) - 1))]
    lines += [_row(_cells(run)) for run in runs]
    for title, file in pictures.items():
        lines += ["", f"![{title}]({file.name})"]
    return "# Runs side by side\n\n" + "\n".join(lines) + "\n"


def _cells(run: Run) -> list[str]:
    return [
        run.name.replace("|", "\\|"),
        str(run.tokens),
        figure(run.tokens_per_second, ".1f"),
        share(run.hit_rate),
        share(run.acceptance),
        figure(run.mean_accepted, ".2f"),
        size(run.bytes_read.get("storage", 0)),
        size(run.bytes_read.get("link", 0)),
        f"{sum(run.causes.values()):.2f}",
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
