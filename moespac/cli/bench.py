"""``moespac bench``: measurements."""

from __future__ import annotations

import typer

from moespac.cli import (
    bench_ablation,
    bench_decode,
    bench_governor,
    bench_gpu,
    bench_host_path,
    bench_kernels,
    bench_paper,
    bench_plan,
    bench_soak,
    bench_validate,
    bench_validity,
)

app = typer.Typer(help="Measure moespac itself.", no_args_is_help=True)
app.command()(bench_paper.paper)
app.command()(bench_ablation.ablation)
app.command()(bench_validate.validate)
app.command()(bench_validity.validity)
app.command()(bench_kernels.kernels)
app.command()(bench_decode.decode)
app.command()(bench_governor.governor)
app.command()(bench_gpu.gpu)
app.command()(bench_plan.plan)
app.command()(bench_soak.soak)
app.command()(bench_host_path.host_path)


@app.callback()
def _bench() -> None:
    """Measure moespac itself."""


@app.command()
def decisions() -> None:
    """What deciding costs: microseconds a layer for each call of the policy. Needs no model."""
    from moespac.bench.decisions import table

    table()
