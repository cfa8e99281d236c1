"""``moespac bench host-path``: what the host spends on a layer while a device computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import waiting
from moespac.cli.files import JsonFile
from moespac.cli.numbers import whole_numbers
from moespac.config import GraphConfig, HostPathConfig

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.host_path import HostTime


def host_path(
    windows: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help=f"Sizes of the windows that are decoded, up to {GraphConfig.most_tokens}."
        ),
    ] = "1,5,17",
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """What the host spends on a layer while a device computes: microseconds, beside the aim. Needs no GPU.

    A model of Qwen3-30B-A3B's layers and experts, all of them tiny, over recordings that do nothing when launched.
    CPU time of the deciding thread, without and with copies of experts to the device, which are over at once. Real
    launches, copies and events come on top, which only a GPU can tell.
    """
    from rich.console import Console

    from moespac.bench.host_path import measure

    sizes = whole_numbers(windows, "--windows", "sizes", 1, GraphConfig().most_tokens, "1,5,17")
    file = JsonFile(json, "--json") if json else None
    with waiting("measuring the host's path"):
        found = measure(sizes)
    aim = HostPathConfig().aim
    Console().print(_table(sizes, found, aim))
    if file:
        each = [{"tokens": size} | time.to_dict() for size, time in zip(sizes, found, strict=True)]
        file.write({"us_per_layer": each, "aim": aim})


def _table(sizes: list[int], found: list[HostTime], aim: float) -> Table:
    from rich.table import Table

    from moespac.bench.host_path import COPIES

    table = Table("us per layer", title="Host time of a layer", title_justify="left")
    for size in sizes:
        table.add_column(f"{size} token{'s' if size > 1 else ''}", justify="right")
    for part in ("trunk", "decide", "dispatch", "total"):
        table.add_row(part, *(f"{getattr(time, part):.0f}" for time in found), end_section=part == "dispatch")
    table.add_row("aim", *(f"{aim:.0f}" for _ in found), end_section=True)
    for number, count in enumerate(COPIES):
        copied = f"total with {count} cop{'ies' if count > 1 else 'y'}"
        table.add_row(copied, *(f"{time.copying[number]:.0f}" for time in found))
    return table
