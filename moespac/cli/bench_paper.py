"""``moespac bench paper``: the paper's table, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.shares import share_of_experts
from moespac.cli.simulate import DrawFlags
from moespac.cli.spread import spread

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.paper import Comparison, Row

_BAR = 24  # characters of the longest


@spread
def paper(
    *,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Routing of the model shape, best imported with --meta: a column for each benchmark.",
            show_default="synthetic",
        ),
    ] = None,
    model_shape: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="A name, or a checkpoint's config.json.",
            show_default="gpt-oss-20b-f16 with a trace, else the paper's qwen3-30b-a3b-f16",
        ),
    ] = None,
    cache: Annotated[
        list[str], typer.Option(metavar="PERCENT", help="Of all experts, on the accelerator; several times.")
    ] = ["17%", "25%"],  # noqa: B006  # Typer copies it
    draw: DrawFlags,
    sequences: Annotated[int, typer.Option(min=1, help="Of each benchmark.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded of each sequence at most.")] = 128,
    jobs: Annotated[int, typer.Option(min=0, help="Simulations at once; 0: one a core.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the tables here.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw bar charts here; needs matplotlib.")
    ] = None,
) -> None:
    """Simulate the paper's machine (RTX 4090, PCIe 4.0) with every policy, beside the paper's figures."""
    from rich.console import Console

    from moespac.bench import paper as bench
    from moespac.cli.simulate import processes
    from moespac.config import SimulationConfig
    from moespac.sim.capacity import capacity_of
    from moespac.sim.hardware import find_profile
    from moespac.sim.shapes import find_model
    from moespac.sim.simulator import Setting, check_fit
    from moespac.sim.study import assumptions
    from moespac.trace.importer import load

    shares = {text: share_of_experts(text, "--cache") for text in cache}
    file = JsonFile(json, "--json") if json else None
    hardware = find_profile(bench.HARDWARE)
    model = find_model(model_shape or ("gpt-oss-20b-f16" if trace else "qwen3-30b-a3b-f16"))
    prompt = SimulationConfig().prompt_tokens
    routing = load(trace) if trace else bench.synthetic_trace(model, tokens + prompt, draw.seed)
    check_fit(routing, model)
    console, found = Console(), []
    for text, share in shares.items():
        setting = Setting(
            hardware,
            model,
            capacity_of(hardware, model, share),
            window=draw.drafts,
            draft=draw.source,
            acceptance=draw.acceptance,
            seed=draw.seed,
            tokens=tokens,
        )
        with counting(f"{text} cached") as progress:
            rows = bench.run_paper(routing, setting, sequences, processes(jobs), progress)
        compared = bench.compare(rows)
        console.print(
            _table(rows, f"{model.name} on {hardware.name}, {text} of the experts cached: tokens/s")
        )
        console.print(_comparison(compared))
        for line in assumptions(routing, setting):
            console.print(f"- {line}", markup=False, highlight=False)
        found.append(_record(text, rows, compared))
        if plots:
            from moespac.sim.plots import draw_speeds

            speeds = {row.name: row.speed for row in reversed(rows)}
            drawn = draw_speeds(speeds, bench.PUBLISHED, plots / f"paper-{text.strip().rstrip('%')}.png")
            typer.echo(f"wrote {drawn}")
    if file:
        file.write(found)


def _table(rows: Sequence[Row], title: str) -> Table:
    from rich.console import Console
    from rich.table import Table

    from moespac.bench.paper import PUBLISHED
    from moespac.cli.tables import figure

    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    texts = list(rows[0].results)
    wide = Console().width >= 2 * _BAR + 12 * len(texts)  # else the means alone; --json has all texts
    for column in (*(texts if wide else ()), "mean", "as built", "paper"):
        table.add_column(column, justify="right")
    table.add_column("", min_width=_BAR, no_wrap=True)
    fastest = max(row.speed for row in rows)
    for row in rows:
        speeds = [f"{result.tokens_per_second:.1f}" for result in row.results.values()] if wide else []
        bar = "█" * max(round(_BAR * row.speed / fastest), 1)
        built = f"{row.speed_as_built:.2f}" if row.as_built else ""
        table.add_row(
            row.name, *speeds, f"{row.speed:.2f}", built, figure(PUBLISHED.get(row.name), ".2f"), bar
        )
    return table


def _comparison(found: Comparison) -> Table:
    from rich.table import Table

    from moespac.bench.paper import PUBLISHED_OVER_SPECULATIVE, PUBLISHED_OVER_STANDARD

    table = Table("moe-spac's tokens/s over", "simulated", "paper")
    over_standard = f"{PUBLISHED_OVER_STANDARD:.2f}"  # "on average": it does not say in which of these ways
    rows = (
        (f"the best baseline that drafts ({found.best_speculative.name})", found.over_best_speculative,
         f"{PUBLISHED_OVER_SPECULATIVE:.2f}"),
        ("the mean of the paper's baselines", found.over_mean_of_standard, over_standard),
        ("each of the paper's baselines, the mean factor", found.mean_over_standard, over_standard),
        ("the mean, each with the runtime of its own code", found.over_mean_as_built, over_standard),
        ("each with its own runtime, the mean factor", found.mean_over_as_built, over_standard),
        (f"the best baseline that does not draft ({found.best_plain.name})", found.over_best_plain, ""),
        ("itself without speculation", found.over_itself_plain, ""),
        ("itself with fixed K", found.over_itself_ungoverned, ""),
        ("belady, the bound", found.share_of_bound, ""),
    )  # fmt: skip
    for label, factor, published in rows:
        table.add_row(label, f"{factor:.2f}", published)
    return table


def _record(cache: str, rows: Sequence[Row], found: Comparison) -> dict[str, Any]:
    from moespac.bench.paper import Row

    factors = {name: value.name if isinstance(value, Row) else value for name, value in vars(found).items()}
    return {"cache": cache} | factors | {"rows": [row.to_dict() for row in rows]}
