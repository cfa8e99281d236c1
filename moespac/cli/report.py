"""``moespac report``: runs side by side, as a table and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moespac.cli.files import ResultFile


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN.json...", help="Written by `generate --json` or `simulate --json`."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for report.md and its pictures.")
    ] = Path("report"),
) -> None:
    """Show runs side by side: speed, hit rate, acceptance, seconds by cause and bytes. Needs matplotlib.

    Example: moespac report quarter.json half.json -o report
    """
    from moespac.errors import ConfigError
    from moespac.report.markdown import markdown
    from moespac.report.plots import draw_runs
    from moespac.report.runs import read_runs

    found = read_runs(runs)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be made ({error.strerror}); name another place"
        ) from None
    text = ResultFile(output / "report.md", "--output")
    pictures = draw_runs(found, output)
    text.write_bytes(markdown(found, pictures).encode())
    for file in (output / "report.md", *pictures.values()):
        typer.echo(f"wrote {file}")
