"""``moespac plan``: does a model fit, how fast will it be, and what would help most?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.tables import rate, size
from moespac.config import DeviceConfig, PlanConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moespac.plan.advise import Budgets, Option, Plan, Workload
    from moespac.plan.predict import Speed

_LABELS = len("accelerator")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory, or a model's id on the Hugging Face Hub (owner/name)."
        ),
    ],
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A draft model to have beside it: a directory, or an id on the Hub.",
            show_default="none",
        ),
    ] = None,
    accelerator_context: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Prompt and answer whose KV caches fit beside the experts: on the GPU, or in host memory without "
            "one.",
        ),
    ] = DeviceConfig.context,
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
    host_free: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory that is free: 20GiB, 500MB.",
            show_default=f"as now; of another machine {PlanConfig.host_free:.0%} of all",
        ),
    ] = None,
    accelerator_free: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The same on the GPU.",
            show_default=f"as now; of another machine {PlanConfig.accelerator_free:.0%} of all",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine anew (some seconds).")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan here.")] = None,
) -> None:
    """Say before a download whether a model fits, on which tiers, how fast it will be, and what would help most.

    Of the model only its configuration and the headers of its files are read. Exit code 1 if it does not fit.

    Example: moespac plan Qwen/Qwen3-30B-A3B --draft Qwen/Qwen3-0.6B --hardware rtx4090-pcie4
    """
    from rich.console import Console

    from moespac import host_memory
    from moespac.errors import ConfigError
    from moespac.experts.budget import parse_bytes
    from moespac.plan.advise import Workload, make_plan
    from moespac.plan.draft import read_planned_draft
    from moespac.plan.machine import named_machine, this_machine, with_free
    from moespac.plan.model import read_planned_model

    if measure and hardware is not None:
        raise ConfigError("--measure is about this machine: leave out --hardware")
    for amount, flag in ((host_free, "--host-free"), (accelerator_free, "--accelerator-free")):
        if amount is not None:
            parse_bytes(amount, flag)  # before anything is asked or measured
    file = JsonFile(json, "--json") if json else None
    found = read_planned_model(model)
    if format is not None and format not in found.formats:
        raise ConfigError(
            f"--format {format}: {model} can be had in {', '.join(found.formats)}; give one of them"
        )
    beside = read_planned_draft(draft, model, found) if draft is not None else None
    if hardware is not None:
        machine = with_free(named_machine(hardware), host_free, accelerator_free, host_most=None)
    else:
        directory = Path(model) if Path(model).is_dir() else Path()
        with counting("measuring this machine") as progress:
            machine = this_machine(directory, measure, progress)
        machine = with_free(machine, host_free, accelerator_free, host_memory.total_bytes())
    work = Workload(found, beside, accelerator_context)
    with counting("predicting") as progress:
        plan = make_plan(work, machine, format=format, progress=progress)

    console = Console(highlight=False)
    _show(console, plan, work, draft)
    if file:
        file.write(plan.to_dict())
    if not plan.fits:
        raise typer.Exit(1)


def _show(console: Console, plan: Plan, work: Workload, draft: str | None) -> None:
    """``draft``: as it was given."""
    from rich.table import Table
    from rich.text import Text

    console.print(f"{plan.model} on {plan.machine}: {plan.verdict}", markup=False)
    if plan.option is None or plan.speed is None:
        return
    rows = Table.grid(padding=(0, 2))
    rows.add_column(min_width=_LABELS)
    rows.add_column(overflow="fold")
    for label, text in _rows(plan, plan.option, plan.speed, work):
        rows.add_row(label, Text(text))
    console.print(rows)
    # In one line, however long, to be copied.
    console.print(f"{'flags':{_LABELS}}  {_flags(plan.option, work, draft)}", markup=False, soft_wrap=True)
    if len(plan.options) > 1:
        console.print(_formats(plan))
    if plan.changes:
        console.print("What would help, and how many times as fast:")
        for change in plan.changes:
            console.print(f"  {change.factor:.2f}  {change.name}", markup=False)
    else:
        console.print("Nothing tried here would help noticeably.")


def _rows(plan: Plan, option: Option, speed: Speed, work: Workload) -> Iterator[tuple[str, str]]:
    model, free = work.model, plan.free
    typical, low, high = (rate(each) for each in (speed.typical, speed.low, speed.high))
    yield "speed", f"{typical} tokens/s without drafts; between {low} and {high}"
    if work.draft:
        stored = "" if work.draft.stored_bytes is None else f" ({size(work.draft.stored_bytes)})"
        yield "draft model", f"{work.draft.name}{stored}: {_by_acceptance(plan)}"
    stored = (
        ""
        if model.stored_bytes is None
        else f"; as it is: {size(model.stored_bytes)} in {model.stored_format}"
    )
    made = (
        f"; `moespac pack --format {option.format}` makes it" if option.format != model.stored_format else ""
    )
    yield "format", f"{option.format}, {size(option.experts_bytes)} of experts{stored}{made}"
    budgets = option.budgets
    beside, reserve = _beside(budgets, work), size(PlanConfig.reserve_bytes)
    if budgets.capacity.accelerator:
        yield (
            "accelerator",
            f"{size(free.accelerator)} free ({free.accelerator_source}): {size(budgets.accelerator)} for experts, "
            f"{beside}",
        )
        beside = f"{reserve} in reserve"
    yield "host", f"{size(free.host)} free ({free.host_source}): {size(budgets.host)} for experts, {beside}"
    if plan.measured:
        yield "machine", f"measured on {plan.measured}; --measure measures it anew"


def _by_acceptance(plan: Plan) -> str:
    first, *others = ((rate(each.tokens_per_second), f"{each.acceptance:.0%}") for each in plan.drafting)
    more = "".join(f", {speed} if {share}" for speed, share in others)
    return f"{first[0]} tokens/s if {first[1]} of its drafts are accepted{more}; that depends on the text"


def _beside(budgets: Budgets, work: Workload) -> str:
    """What lies with the trunk."""
    needs, longest = budgets.needs, work.model.kv_cache.longest or work.context
    tokens = (
        f"{work.context:,} tokens" if work.context <= longest else f"{longest:,} tokens (the model's most)"
    )
    draft = f"{size(budgets.draft)} for the draft model, " if work.draft else ""
    graphs = f"{size(needs.graphs)} for CUDA graphs, " if needs.graphs else ""
    return (
        f"{size(budgets.trunk)} for the trunk, {draft}{size(needs.kv_cache)} for KV caches of {tokens}, "
        f"{graphs}{size(needs.reserve)} in reserve"
    )


def _flags(option: Option, work: Workload, draft: str | None) -> str:
    """As `moespac generate` takes them; a draft model of the Hub is to be downloaded before."""
    total = work.model.layers * work.model.experts
    capacity = option.budgets.capacity

    def amount(nbytes: int, slots: int) -> str:
        return "100%" if slots == total else f"{floor(nbytes / 2**20)}MiB"

    flags = f"--host-memory {amount(option.budgets.host, capacity.host)}"
    if capacity.accelerator:
        flags += f" --accelerator-memory {amount(option.budgets.accelerator, capacity.accelerator)}"
        if work.context != DeviceConfig.context:
            flags += f" --accelerator-context {work.context}"
    if draft:
        flags += f" --draft {shlex.quote(draft) if Path(draft).is_dir() else 'DIRECTORY'}"
    return flags


def _formats(plan: Plan) -> Table:
    from rich.table import Table

    on_accelerator = any(option.budgets.accelerator for option in plan.options)
    table = Table(title="By format of the experts", title_justify="left")
    columns = ["format", "all experts", "in host memory", "tokens/s"]
    if on_accelerator:
        columns.insert(2, "on the accelerator")
    for column in columns:
        table.add_column(column, justify="left" if column == "format" else "right")
    for option in plan.options:
        total, budgets = option.experts_bytes, option.budgets
        tiers = (budgets.accelerator, budgets.host) if on_accelerator else (budgets.host,)
        table.add_row(
            f"{option.format} *" if plan.option == option else option.format,
            size(total),
            *(f"{share / total:.0%}" for share in tiers),
            rate(option.tokens_per_second),
        )
    return table
