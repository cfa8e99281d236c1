"""``moespac bench governor``: the governor's K against every fixed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.numbers import whole_numbers
from moespac.config import DecodeBenchConfig, GovernorConfig

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.governor import Comparison


def governor(
    work: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the model goes; that of `bench decode` is used again."),
    ] = Path("bench-results/decode"),
    factor: Annotated[
        int, typer.Option(min=1, help="How many times as wide the experts become.")
    ] = DecodeBenchConfig.factor,
    format: Annotated[
        Literal["f32", "bf16", "int8", "int4"], typer.Option(help="How experts are stored.")
    ] = "int8",
    host_memory: Annotated[
        str, typer.Option(metavar="AMOUNT", help="What experts may take, for each engine: 25%, 2GiB ...")
    ] = "25%",
    windows: Annotated[str, typer.Option(metavar="K", help="Fixed K, with commas between.")] = "0,1,2,4",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Lines of JSON, each with "turns" (the first is asked) or "prompt".',
            show_default="six of our own",
        ),
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="Only so many of them, spread over all.", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Decoded after each prompt.")] = 48,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """Tokens a second with every fixed K and with the governor's, text by text in turn in one process.

    One engine for each, all in memory at once. With more texts the interval becomes narrower: a minute for six.
    Close what else is running.
    """
    from rich.console import Console

    from moespac.bench.decode.files import make_files
    from moespac.bench.decode.prompts import WARMUP, tokenize
    from moespac.bench.governor import compare
    from moespac.cli.bench_decode import read_texts

    most = GovernorConfig().most
    fixed = list(dict.fromkeys(whole_numbers(windows, "--windows", "K", 0, most, "0,1,2")))
    file = JsonFile(json, "--json") if json else None
    chosen = read_texts(prompts)
    chosen = chosen[:: max(1, len(chosen) // texts)][:texts] if texts else chosen
    files = make_files(work, factor, format, gguf=False)
    asked, (warmup,) = tokenize(chosen, files.checkpoint), tokenize([WARMUP], files.checkpoint)
    with counting("texts") as progress:
        found = compare(files.pack, files.draft, host_memory, fixed, asked, warmup, tokens, progress)
    console = Console()
    console.print(_table(found, host_memory))
    if found.left_out:
        console.print(f"longer than the context, left out: {found.left_out}")
    low, high = found.interval()
    console.print(
        f"governed over the best fixed K ({found.best}): {found.ratio:.3f}, 95% of texts drawn anew"
        f" {low:.3f} to {high:.3f}; aim {DecodeBenchConfig.governed_aim}",
        soft_wrap=True,
    )
    if file:
        file.write(found.to_dict() | {"host_memory": host_memory, "aim": DecodeBenchConfig.governed_aim})


def _table(found: Comparison, host_memory: str) -> Table:
    from rich.table import Table

    from moespac.bench.governor import GOVERNED

    title = f"{len(found.seconds)} texts, {found.tokens} tokens each; host memory {host_memory}"
    table = Table("K", title=title, title_justify="left", min_width=len(title))
    table.add_column("tokens/s", justify="right")
    for window in found.seconds[0]:
        name = "governed" if window == GOVERNED else str(window)
        table.add_row(name, f"{found.tokens_per_second(window):.1f}")
    return table
