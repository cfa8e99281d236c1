"""``moespac demo``: the same prompt with all experts in host memory and with a quarter of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import moespac
from moespac.cli.generate import DEMO_PROMPT
from moespac.cli.tables import figure, share, size, summary_table

if TYPE_CHECKING:
    from moespac.engine.engine import Generation

BUDGETS = ("100%", "25%")


def demo(
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate in each run.")] = 96,
) -> None:
    """Run the embedded model with all experts in host memory, then with a quarter: same text, less memory.

    Exit code 1 if the texts differ.
    """
    console = Console(highlight=False)
    _warm_up()
    runs = {budget: _run(console, budget, max_new_tokens) for budget in BUDGETS}
    full, quarter = runs.values()

    console.print(Rule(f"what {BUDGETS[1]} cost"))
    console.print(summary_table(quarter.summary))
    console.print(Rule("side by side"))
    console.print(_comparison(runs))
    if full.token_ids != quarter.token_ids:
        console.print("[red]The outputs differ: this is a defect, please report it.[/]")
        raise typer.Exit(1)
    console.print(f"[green]The outputs are identical[/] ({len(full.token_ids)} tokens compared).")


def _warm_up() -> None:
    """torch's first calls take many times as long as later ones; they must not count against the first run."""
    with moespac.load(profile=None) as engine:
        engine.generate(DEMO_PROMPT, max_new_tokens=8)


def _run(console: Console, budget: str, max_new_tokens: int) -> Generation:
    console.print(Rule(f"host memory for experts: {budget}"))
    console.print(DEMO_PROMPT, end="", style="dim", markup=False)
    with moespac.load(host_memory=budget, accelerator_memory="none", profile=None) as engine:
        stream = engine.stream(DEMO_PROMPT, max_new_tokens=max_new_tokens)
        for piece in stream:
            typer.echo(piece, nl=False)
    typer.echo()
    return stream.result


def _comparison(runs: dict[str, Generation]) -> Table:
    table = Table("host memory", "tokens/s", "hit rate", "read from storage", "peak expert memory")
    for budget, run in runs.items():
        summary = run.summary
        table.add_row(
            budget,
            figure(summary.tokens_per_second, ".1f"),
            share(summary.hit_rate),
            size(summary.bytes_read["storage"]),
            size(summary.peak_bytes["host"]),
        )
    return table
