"""``moespac plan``: does a model fit, how fast will it be, and what would help most?"""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.tables import size

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.plan.advise import Machine, Option, Plan
    from moespac.plan.model import PlannedModel


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory, or a model's id on the Hugging Face Hub (owner/name)."
        ),
    ],
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Plan for another machine: a name (rtx4090-pcie4 ...), or a file of `moespac profile`.",
            show_default="this machine",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Of the experts: f32, bf16, int8 or int4.", show_default="the best"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine anew (some seconds).")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan here.")] = None,
) -> None:
    """Say before a download whether a model fits, on which tiers, how fast it will be, and what would help most.

    Of the model only its configuration and the headers of its files are read. Exit code 1 if it does not fit.

    Example: moespac plan Qwen/Qwen3-30B-A3B --hardware rtx4090-pcie4
    """
    from rich.console import Console

    from moespac.errors import ConfigError
    from moespac.plan.advise import make_plan
    from moespac.plan.machine import named_machine, this_machine
    from moespac.plan.model import read_planned_model

    if measure and hardware is not None:
        raise ConfigError("--measure is about this machine: leave out --hardware")
    file = JsonFile(json, "--json") if json else None
    found = read_planned_model(model)
    if format is not None and format not in found.formats:
        raise ConfigError(
            f"--format {format}: {model} can be had in {', '.join(found.formats)}; give one of them"
        )
    if hardware is not None:
        machine = named_machine(hardware)
    else:
        directory = Path(model) if Path(model).is_dir() else Path()
        with counting("measuring this machine") as progress:
            machine = this_machine(directory, measure, progress)
    with counting("predicting") as progress:
        plan = make_plan(found, machine, format=format, progress=progress)

    console = Console(highlight=False)
    _show(console, plan, found, machine)
    if file:
        file.write(plan.to_dict())
    if not plan.fits:
        raise typer.Exit(1)


def _show(console, plan: Plan, model: PlannedModel, machine: Machine) -> None:
    console.print(f"{plan.model} on {plan.machine}: {plan.verdict}", markup=False)
    if plan.option is None or plan.speed is None:
        return
    speed, option = plan.speed, plan.option
    stored = (
        ""
        if model.stored_bytes is None
        else f"; as it is: {size(model.stored_bytes)} in {model.stored_format}"
    )
    console.print(
        f"speed        {speed.typical:.3g} tokens/s; {speed.low:.3g} to {speed.high:.3g}, without drafts"
    )
    console.print(
        f"format       {option.format}, {size(option.experts_bytes)} of experts{stored}", markup=False
    )
    console.print(f"budgets      {_flags(option, model)}")
    budgets = option.budgets
    if budgets.needs is not None:
        console.print(
            f"accelerator  {size(machine.accelerator_bytes)} free: {size(budgets.trunk)} for the trunk, "
            f"{budgets.needs}, {size(budgets.accelerator)} for experts"
        )
    if len(plan.options) > 1:
        console.print(_formats(plan))
    if plan.changes:
        console.print("What would help, and how many times as fast:")
        for change in plan.changes:
            console.print(f"  {change.factor:.2f}  {change.name}", markup=False)
    elif not machine.hardware.has_accelerator:
        console.print("Nothing tried here would help noticeably.")


def _flags(option: Option, model: PlannedModel) -> str:
    """As `moespac generate` takes them."""
    total = model.layers * model.experts
    capacity = option.budgets.capacity

    def amount(nbytes: int, slots: int) -> str:
        return "100%" if slots == total else f"{floor(nbytes / 2**20)}MiB"

    flags = f"--host-memory {amount(option.budgets.host, capacity.host)}"
    if capacity.accelerator:
        flags += f" --accelerator-memory {amount(option.budgets.accelerator, capacity.accelerator)}"
    return flags


def _formats(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(title="By format of the experts", title_justify="left")
    for column in ("format", "all experts", "on the accelerator", "in host memory", "tokens/s"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for option in plan.options:
        total = option.experts_bytes
        name = f"{option.format} *" if plan.option == option else option.format
        accelerator, host = (
            f"{share / total:.0%}" for share in (option.budgets.accelerator, option.budgets.host)
        )
        table.add_row(name, size(total), accelerator, host, f"{option.tokens_per_second:.3g}")
    return table
