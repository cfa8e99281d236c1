"""``moespac bench validity``: published figures beside simulated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile


def validity(
    tokens: Annotated[int, typer.Option(min=1, help="Decoded of each synthetic text.")] = 128,
    sequences: Annotated[int, typer.Option(min=1, max=7, help="Synthetic texts.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of texts, acceptance and sensors.")] = 0,
    jobs: Annotated[int, typer.Option(min=0, help="Simulations at once; 0: one a core.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table here.")] = None,
) -> None:
    """Simulate what others have published of their systems, and compare.

    On each machine the CPU's bandwidth is fitted on llama.cpp's row; nothing else is.
    """
    from rich.console import Console
    from rich.table import Table

    from moespac.bench.validity import check_all
    from moespac.cli.simulate import processes

    file = JsonFile(json, "--json") if json else None
    with counting("simulating") as progress:
        found = check_all(tokens, sequences, seed, processes(jobs), progress)
    table = Table("machine", "system", "published", "simulated", "ratio", "remark")
    for each in found:
        figures = (f"{each.published:.2f}", f"{each.simulated:.2f}", f"{each.ratio:.2f}")
        table.add_row(each.machine, each.system, *figures, each.remark)
    Console().print(table)
    if file:
        file.write([each.to_dict() for each in found])
