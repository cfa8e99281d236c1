"""``moespac pack`` and ``moespac inflate``: a checkpoint in, another out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Directory of a Hugging Face checkpoint.")]
Destination = Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="Directory to write.")]


def pack(
    source: Source,
    destination: Destination,
    format: Annotated[
        Literal["f32", "bf16", "int8", "int4"],
        typer.Option(help="How experts are stored; int8 and int4 lose a little, see `moespac eval`."),
    ] = "bf16",
) -> None:
    """Repack a checkpoint so that one expert is one contiguous read; quantise it if wanted.

    The result is a model of its own: --model takes it. A pack that was interrupted goes on where it stopped.
    """
    from moespac.experts.pack import pack as pack_checkpoint
    from moespac.experts.pack import print_report

    print_report(pack_checkpoint(source, destination, format))


def inflate(
    source: Source,
    destination: Destination,
    factor: Annotated[int, typer.Option(min=1, help="How many times as wide each expert becomes.")],
) -> None:
    """Widen the experts of a checkpoint without changing what it computes: real routing at larger sizes."""
    from moespac.model.inflate import inflate as inflate_checkpoint

    inflate_checkpoint(source, destination, factor)
    typer.echo(f"wrote {destination}")
