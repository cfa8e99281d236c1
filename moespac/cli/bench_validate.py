"""``moespac bench validate``: how far the simulator is from this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile, scratch_directory

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.validate import Agreement


def validate(
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="On the disk to measure; the model goes there for a while.")
    ] = Path(),
    factor: Annotated[int, typer.Option(min=1, help="How many times as wide the experts become.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Generated for each prompt.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Runs of each case; the one of median error counts.")
    ] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Measure the machine in seconds only.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table here.")] = None,
) -> None:
    """Run the embedded model here, simulate the same runs on this machine's profile, and compare.

    Takes a few minutes and half a gigabyte. Close what else is running.
    """
    from rich.console import Console

    from moespac.bench.validate import median_error
    from moespac.bench.validate import validate as compare
    from moespac.config import MeasureConfig

    file = JsonFile(json, "--json") if json else None
    config = MeasureConfig.quick() if quick else MeasureConfig()
    with scratch_directory(directory, ".moespac-validate-") as place, counting("validating") as progress:
        found = compare(Path(place), factor, tokens, rounds, config, progress)
    console = Console()
    console.print(_table(found))
    console.print(f"median error {median_error(found):.1%}")
    if file:
        file.write([each.to_dict() for each in found])


def _table(found: Sequence[Agreement]) -> Table:
    from rich.table import Table

    from moespac.cli.tables import share

    table = Table(title="Tokens/s of the engine, and of its simulation", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for column in ("host", "draft", "K", "engine", "sim.", "error", "hits", "sim."):
        table.add_column(column, justify="right")
    for each in found:
        case = each.case
        table.add_row(
            case.policy,
            case.host_memory,
            {"auto": "model"}.get(case.draft, case.draft),
            str(case.window),
            f"{each.measured:.1f}",
            f"{each.simulated:.1f}",
            f"{each.error:+.1%}",
            share(each.measured_hits),
            share(each.simulated_hits),
        )
    return table
