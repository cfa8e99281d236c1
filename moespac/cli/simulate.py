"""``moespac simulate``: a trace on a machine that need not be there, under any policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.shares import share_of_experts
from moespac.cli.spread import spread
from moespac.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.sim.result import SimResult
    from moespac.sim.simulator import DraftSource, Setting
    from moespac.trace.schema import Trace

_MACHINE, _DRAFT, _TEXT, _OUTPUT = "Machine and model", "Speculation", "Text", "Output"


@dataclass(frozen=True)
class DrawFlags:
    """What is assumed of speculation."""

    window: Annotated[
        int,
        typer.Option(
            min=0,
            help="Drafted tokens a pass (K); 0: none. The most for moe-spac, whose governor chooses.",
            rich_help_panel=_DRAFT,
        ),
    ] = 4
    acceptance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Of each draft, where the trace does not say.", rich_help_panel=_DRAFT
        ),
    ] = 0.8
    draft: Annotated[
        Literal["model", "lookup", "none"],
        typer.Option(
            help="A draft model of the model shape's, or lookup, which is free.", rich_help_panel=_DRAFT
        ),
    ] = "model"
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.", rich_help_panel=_DRAFT)] = 0

    @property
    def drafts(self) -> int:
        return 0 if self.draft == "none" else self.window

    @property
    def source(self) -> DraftSource:
        return "lookup" if self.draft == "lookup" else "model"


@dataclass(frozen=True)
class ExtentFlags:
    """How much is simulated."""

    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Decoded of each sequence at most.", show_default="all", rich_help_panel=_TEXT
        ),
    ] = None
    sequences: Annotated[
        int,
        typer.Option(min=0, help="How many, spread over the trace; 0: all.", rich_help_panel=_TEXT),
    ] = 8
    jobs: Annotated[
        int, typer.Option(min=0, help="Simulations at once; 0: one a core.", rich_help_panel=_OUTPUT)
    ] = 0

    def choose(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Of a trace's sequences."""
        if not 0 < self.sequences < len(numbers):
            return tuple(numbers)
        return tuple(numbers[i * len(numbers) // self.sequences] for i in range(self.sequences))


@spread
def simulate(
    *,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace (.npz), recorded or imported.")],
    hardware: Annotated[
        str,
        typer.Option(
            metavar="PROFILE", help="A name, or a file of `moespac profile`.", rich_help_panel=_MACHINE
        ),
    ],
    model_shape: Annotated[
        str,
        typer.Option(
            metavar="SHAPE", help="A name, or a checkpoint's config.json.", rich_help_panel=_MACHINE
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="Of the experts, with a config.json.", rich_help_panel=_MACHINE, show_default="bf16"
        ),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            metavar="PERCENT", help="Of all experts, in the fastest memory.", rich_help_panel=_MACHINE
        ),
    ] = "25%",
    host_cache: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Of all experts, in host memory behind an accelerator.",
            rich_help_panel=_MACHINE,
            show_default="what fits",
        ),
    ] = None,
    policies: Annotated[str, typer.Option(help="Names with commas between them, or all.")] = "all",
    draw: DrawFlags,
    extent: ExtentFlags,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write a list of records here.", rich_help_panel=_OUTPUT),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Draw PNGs here; needs matplotlib.", rich_help_panel=_OUTPUT),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Of one policy, for ui.perfetto.dev (JSON).", rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> None:
    """Replay a routing trace on a machine in virtual time, with the engine's own policies and schedule.

    Example: moespac simulate trace.npz --hardware rtx4090-pcie4 --model-shape gpt-oss-20b-f16 --cache 17%
    """
    from rich.console import Console

    from moespac.sim.capacity import capacity_of
    from moespac.sim.hardware import find_profile
    from moespac.sim.shapes import find_model
    from moespac.sim.simulator import Setting, check_fit
    from moespac.sim.study import assumptions, records
    from moespac.trace.importer import load

    share = share_of_experts(cache, "--cache")
    host_share = None if host_cache is None else share_of_experts(host_cache, "--host-cache")
    names = policy_names(policies)
    if timeline is not None and len(names) > 1:
        raise ConfigError("--timeline shows one policy: name it with --policies")
    profile, model = find_profile(hardware), find_model(model_shape, format)
    result_file = JsonFile(json, "--json") if json else None
    timeline_file = JsonFile(timeline, "--timeline") if timeline else None
    loaded = load(trace)
    check_fit(loaded, model)
    setting = Setting(
        profile,
        model,
        capacity_of(profile, model, share, host_share),
        window=draw.drafts,
        draft=draw.source,
        acceptance=draw.acceptance,
        seed=draw.seed,
        tokens=extent.tokens,
    )
    chosen = extent.choose(range(loaded.sequences))
    if timeline_file:
        results = [_with_timeline(loaded, names[0], setting, chosen, timeline_file)]
    else:
        results = _simulate(loaded, names, setting, chosen, processes(extent.jobs))
    console = Console()
    console.print(results_table(results, f"{model.name} on {profile.name}, {cache} of the experts cached"))
    for line in assumptions(loaded, setting):
        console.print(f"- {line}", markup=False, highlight=False)
    if result_file:
        result_file.write(records(results, setting))
    if plots:
        from moespac.sim.plots import draw_all

        for file in draw_all(results, plots):
            typer.echo(f"wrote {file}")


def processes(jobs: int) -> int:
    """How many run at once: ``--jobs``, or one on each core that is ours."""
    return jobs or len(os.sched_getaffinity(0))


def policy_names(wanted: str) -> list[str]:
    """The policies that ``--policies`` names. Raises ConfigError for one that there is not."""
    from moespac.policy.registry import SIMULATOR_POLICIES

    if wanted.strip() == "all":
        return list(SIMULATOR_POLICIES)
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        if name not in SIMULATOR_POLICIES:
            raise ConfigError(
                f"--policies: there is no policy {name!r}; give all, or some of {', '.join(SIMULATOR_POLICIES)}"
            )
    return names


def results_table(results: Sequence[SimResult], title: str) -> Table:
    """The fastest first; with belady among them, how near to it each comes."""
    from rich.table import Table

    from moespac.cli.tables import share, size
    from moespac.sim.study import share_of_bound

    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for column in ("tokens/s", "belady", "hits", "by token", "a pass", "link", "storage"):
        table.add_column(column, justify="right")
    for result in sorted(results, key=lambda result: -result.tokens_per_second):
        table.add_row(
            result.policy,
            f"{result.tokens_per_second:.2f}",
            share(share_of_bound(result, results)),
            share(result.hit_rate),
            share(result.token_hit_rate),
            f"{result.mean_accepted:.2f}",
            size(result.link_bytes // result.tokens),
            size(result.storage_bytes // result.tokens),
        )
    table.caption = (
        "a pass: tokens that it yields; link and storage: moved a token; hits: in the fastest tier"
    )
    return table


def _simulate(
    trace: Trace, names: Sequence[str], setting: Setting, sequences: tuple[int, ...], jobs: int
) -> list[SimResult]:
    from moespac.sim.study import Task, simulate_all

    tasks = [Task(name, setting, sequences) for name in names]
    with counting("simulating") as progress:
        return simulate_all(trace, tasks, jobs, progress)


def _with_timeline(
    trace: Trace, name: str, setting: Setting, sequences: tuple[int, ...], file: JsonFile
) -> SimResult:
    from moespac.sim.simulator import simulate
    from moespac.timeline import Timeline

    timeline = Timeline()
    result = simulate(trace, name, setting, sequences, timeline.record)
    file.write(timeline.to_chrome(), compact=True)
    return result
