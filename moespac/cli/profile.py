"""``moespac profile``: measure this machine for the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.machine import Measurement
    from moespac.sim.hardware import HardwareProfile


def profile(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Profile to write, JSON.")],
    directory: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Directory on the disk to measure; a file is written there and removed.",
            show_default="the current directory",
        ),
    ] = Path(),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of a minute; rough figures.")
    ] = False,
) -> None:
    """Measure this machine (memory, storage, link, experts) and write a hardware profile.

    `moespac simulate --hardware FILE` takes it. Close what else is running: the profile has what is left.
    """
    from rich.console import Console

    from moespac.bench.machine import measure_machine, to_profile
    from moespac.cli.bars import counting
    from moespac.cli.files import JsonFile
    from moespac.config import MeasureConfig

    result = JsonFile(output, "--output")
    config = MeasureConfig.quick() if quick else MeasureConfig()
    with counting("measuring") as progress:
        measured = measure_machine(directory, config, progress)
    hardware = to_profile(output.stem, measured, config)
    result.write(hardware.to_json())
    console = Console()
    for table in (_figures(measured, hardware), _storage(measured), _experts(measured)):
        console.print(table)
    console.print(f"wrote {output}", markup=False)


def _figures(measured: Measurement, hardware: HardwareProfile) -> Table:
    from rich.table import Table

    from moespac.cli.tables import size

    table = Table("", "measured", title=f"Hardware profile {hardware.name}")
    for threads, rate in measured.memory.items():
        table.add_row(f"memory, {threads} thread{'s' * (threads > 1)}", f"{rate / 1e9:.1f} GB/s")
    storage = (
        f"{hardware.storage_bandwidth / 1e9:.2f} GB/s, {hardware.storage_latency * 1e3:.2f} ms before it"
    )
    reads = "direct" if measured.storage.direct else "buffered: no direct reads here"
    table.add_row(f"storage, reads in flight: {hardware.storage_depth}", f"{storage} ({reads})")
    table.add_row("its reads beside experts", f"{-hardware.storage_slowdown:.0%}")
    table.add_row("experts beside reads", f"{-hardware.expert_slowdown:.0%}")
    table.add_row("arithmetic of experts", f"{hardware.host_flops / 1e9:.0f} G operations/s")
    table.add_row("overhead of an expert", f"{hardware.host_expert_overhead * 1e6:.0f} us")
    table.add_row("overhead of a layer", f"{hardware.layer_overhead * 1e6:.0f} us")
    table.add_row("deciding, a layer", f"{hardware.decide_overhead * 1e6:.0f} us")
    table.add_row("caching, a layer", f"{hardware.cache_overhead * 1e6:.0f} us")
    table.add_row("asking, a layer", f"{hardware.ask_overhead * 1e6:.0f} us")
    cuda = measured.cuda
    if cuda is None:
        table.add_row("accelerator", "none")
    else:
        table.add_row("accelerator", f"{cuda.device}, {size(cuda.memory)}")
        table.add_row("its memory", f"{cuda.bandwidth / 1e9:.0f} GB/s")
        table.add_row("its arithmetic", f"{cuda.flops / 1e12:.0f} T operations/s")
        table.add_row("launching an expert", f"{cuda.launch * 1e6:.0f} us")
        table.add_row("link", f"{cuda.link_bandwidth / 1e9:.1f} GB/s after {cuda.link_latency * 1e6:.0f} us")
    return table


def _storage(measured: Measurement) -> Table:
    from rich.table import Table

    rates = measured.storage.rates
    depths = sorted({depth for _, depth in rates})
    table = Table("reads in flight", *map(str, depths), title="Random reads, GB/s")
    for block in sorted({block for block, _ in rates}):
        row = (f"{rates[block, depth] / 1e9:.2f}" for depth in depths)
        table.add_row(f"{block >> 20} MiB", *row)
    return table


def _experts(measured: Measurement) -> Table:
    from rich.table import Table

    tokens = sorted(next(iter(measured.experts.values())))
    table = Table("tokens", *map(str, tokens), title="One expert on the host, ms")
    for format, seconds in measured.experts.items():
        table.add_row(format, *(f"{seconds[count] * 1e3:.2f}" for count in tokens))
    return table
