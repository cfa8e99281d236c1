"""``moespac bench ablation``: what each part of the method is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.shares import share_of_experts
from moespac.cli.simulate import DrawFlags, ExtentFlags
from moespac.cli.spread import spread


@spread
def ablation(
    *,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace (.npz), recorded or imported.")],
    hardware: Annotated[
        str, typer.Option(metavar="PROFILE", help="A name, or a file of `moespac profile`.")
    ] = "rtx4090-pcie4",
    model_shape: Annotated[
        str, typer.Option(metavar="SHAPE", help="A name, or a checkpoint's config.json.")
    ] = "gpt-oss-20b-f16",
    cache: Annotated[
        list[str],
        typer.Option(metavar="PERCENT", help="Of all experts, in the fastest memory; several times."),
    ] = ["17%", "25%"],  # noqa: B006  # Typer copies it
    draw: DrawFlags,
    extent: ExtentFlags,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table here.")] = None,
) -> None:
    """Simulate moe-spac with one part taken out at a time, and nothing else changed."""
    from rich.console import Console
    from rich.table import Table

    from moespac.bench.ablation import ablate
    from moespac.cli.simulate import processes
    from moespac.sim.capacity import capacity_of
    from moespac.sim.hardware import find_profile
    from moespac.sim.shapes import find_model
    from moespac.sim.simulator import Setting, check_fit
    from moespac.sim.study import assumptions
    from moespac.trace.importer import load

    shares = {text: share_of_experts(text, "--cache") for text in cache}
    file = JsonFile(json, "--json") if json else None
    profile, model = find_profile(hardware), find_model(model_shape)
    loaded = load(trace)
    check_fit(loaded, model)
    console, found = Console(), []
    for text, share in shares.items():
        setting = Setting(
            profile,
            model,
            capacity_of(profile, model, share),
            window=draw.drafts,
            draft=draw.source,
            acceptance=draw.acceptance,
            seed=draw.seed,
            tokens=extent.tokens,
        )
        chosen = extent.choose(range(loaded.sequences))
        with counting(f"{text} cached") as progress:
            results = ablate(loaded, setting, chosen, processes(extent.jobs), progress)
        whole = results[0][1].tokens_per_second
        table = Table("without", "instead", "tokens/s", "of the whole", "hits", "link a token")
        table.title = f"{model.name} on {profile.name}, {text} of the experts cached"
        for part, result in results:
            speed = result.tokens_per_second
            moved = f"{result.link_bytes / result.tokens / 1e9:.2f} GB"
            table.add_row(
                part.name,
                part.replaced_by,
                f"{speed:.2f}",
                f"{speed / whole:.3f}",
                f"{result.hit_rate:.1%}",
                moved,
            )
            found.append({"cache": text, "without": part.name} | result.to_dict())
        console.print(table)
    for line in assumptions(loaded, setting):
        console.print(f"- {line}", markup=False, highlight=False)
    if file:
        file.write(found)
