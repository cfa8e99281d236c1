"""``moespac doctor``: what this machine has, what is slow, and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.doctor.finding import Finding

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    directory: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="On the disk that models are on; a file is written there and removed.",
            show_default="the current directory",
        ),
    ] = Path(),
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings here.")
    ] = None,
) -> None:
    """Examine this machine: processor, kernel, memory, disk, GPU and software. Takes some seconds.

    Exit code 1 if something will not work.
    """
    from rich.console import Console

    from moespac.doctor.examine import examine
    from moespac.doctor.finding import Place

    file = JsonFile(json, "--json") if json else None
    with counting("examining") as progress:
        found = examine(Place(directory), progress)
    Console(highlight=False).print(_table(found))
    if file:
        file.write([asdict(finding) for finding in found])
    if any(finding.status == "bad" for finding in found):
        raise typer.Exit(1)


def _table(found: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for finding in found:
        what = Text(finding.what)
        if finding.remedy:
            what.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.topic, what)
    return table
