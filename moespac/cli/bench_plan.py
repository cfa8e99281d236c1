"""``moespac bench plan``: what plans predict for this machine, beside what it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile, scratch_directory

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.plan import Checked


def plan(
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="On the disk to measure; the models go there for a while.")
    ] = Path(),
    factor: Annotated[int, typer.Option(min=1, help="How many times as wide the experts become.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Generated for each prompt.")] = 48,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure the machine in seconds, as plans do.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table here.")] = None,
) -> None:
    """Predict the embedded model's speed in several formats and budgets as `moespac plan` does, then run it.

    Takes some minutes and up to two gigabytes. Close what else is running.
    """
    from rich.console import Console

    from moespac.bench.plan import check_plans
    from moespac.config import MeasureConfig

    file = JsonFile(json, "--json") if json else None
    config = MeasureConfig.quick() if quick else MeasureConfig()
    with scratch_directory(directory, ".moespac-plan-") as place, counting("checking plans") as progress:
        found = check_plans(Path(place), factor, tokens, config, progress)
    console = Console()
    console.print(_table(found))
    console.print(f"{sum(each.inside for each in found)} of {len(found)} within the predicted range")
    if file:
        file.write([each.to_dict() for each in found])


def _table(found: Sequence[Checked]) -> Table:
    from rich.table import Table

    table = Table(title="Tokens/s, predicted and measured", title_justify="left")
    for column in ("format", "host", "predicted", "from", "to", "measured", "measured / predicted"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for each in found:
        speed = each.predicted
        figures = (speed.typical, speed.low, speed.high, each.measured)
        ratio = f"{each.measured / speed.typical:.2f}"
        table.add_row(each.format, each.host_memory, *(f"{figure:.1f}" for figure in figures), ratio)
    return table
