"""``moespac bench``: measurements."""

from __future__ import annotations

import typer

from moespac.cli import bench_decode, bench_paper, bench_validate

app = typer.Typer(help="Measure moespac itself.", no_args_is_help=True)
app.command()(bench_paper.paper)
app.command()(bench_validate.validate)
app.command()(bench_decode.decode)


@app.callback()
def _bench() -> None:
    """Measure moespac itself."""


@app.command()
def decisions() -> None:
    """What deciding costs: microseconds a layer for each call of the policy. Needs no model."""
    from moespac.bench.decisions import table

    table()
