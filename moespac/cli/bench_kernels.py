"""``moespac bench kernels``: the native CPU kernel beside torch's and llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.kernels import KernelReport

_FORMATS = ["int8", "bf16", "int4", "f32"]


def kernels(
    formats: Annotated[
        list[str], typer.Option(metavar="FORMAT", help="Of the experts; several times.")
    ] = _FORMATS,
    hidden: Annotated[int, typer.Option(min=128, help="Hidden size; a multiple of 128.")] = 2048,
    intermediate: Annotated[int, typer.Option(min=128, help="Width of an expert; a multiple of 128.")] = 768,
    threads: Annotated[int, typer.Option(min=1, help="And experts at once.")] = 1,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the timings here.")
    ] = None,
) -> None:
    """Time one expert by each kernel here, weights from memory, for 1 to 16 tokens.

    llama.cpp's kernels take part when llama-cpp-python is installed. Takes half a minute and two gigabytes.
    """
    from rich.console import Console

    from moespac.bench.kernels import bench_kernels
    from moespac.config import KernelBenchConfig

    for format in formats:
        if format not in _FORMATS:
            raise ConfigError(f"--formats {format}: unknown; give one of {', '.join(_FORMATS)}")
    if hidden % 128 or intermediate % 128:
        raise ConfigError(
            "--hidden and --intermediate must be multiples of 128: torch's int4 product wants it"
        )
    file = JsonFile(json, "--json") if json else None
    with counting("timing") as progress:
        report = bench_kernels(formats, hidden, intermediate, threads, KernelBenchConfig(), progress)
    console = Console()
    for format in formats:
        console.print(_table(report, format))
    for reason in report.left_out:
        console.print(reason, style="dim", highlight=False)
    if file:
        file.write(report.to_dict())


def _table(report: KernelReport, format: str) -> Table:
    from rich.table import Table

    from moespac.bench.kernels import OURS, READ
    from moespac.cli.tables import figure, share

    read = report.find(format, READ, 0)
    assert read is not None
    title = (
        f"{format}, {report.isa}, {report.threads} thread(s); reading memory {read.bandwidth / 1e9:.1f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for column in ("tokens", "ms", "best", "GB/s", "of read", "ours is"):
        table.add_column(column, justify="right")
    for timing in sorted(report.timings, key=lambda timing: timing.tokens):
        if timing.format != format or timing.contender == READ:
            continue
        ours = timing.contender == OURS
        ratio = None if ours else report.ratio(format, timing.contender, timing.tokens)
        table.add_row(
            timing.contender,
            str(timing.tokens),
            f"{timing.median * 1e3:.3f}",
            f"{timing.best * 1e3:.3f}",
            f"{timing.bandwidth / 1e9:.1f}",
            share(report.share(timing)),
            "" if ours else f"{figure(ratio, '.2f')} x",
        )
    return table
