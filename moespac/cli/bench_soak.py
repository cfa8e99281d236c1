"""``moespac bench soak``: many clients at once, some of whom leave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import moespac
from moespac.cli.bars import counting
from moespac.cli.files import JsonFile
from moespac.cli.flags import DraftFlags, MemoryFlags, Model
from moespac.cli.spread import spread
from moespac.errors import MoespacError

if TYPE_CHECKING:
    from rich.table import Table

    from moespac.bench.soak import SoakResult

FLAT = 1.05  # memory of the last quarter of the requests over that of the first: more is a leak


@spread
def soak(
    *,
    model: Model = None,
    requests: Annotated[int, typer.Option(min=4, help="In all.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of what is asked, and of who leaves.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
    draft: DraftFlags,
    memory: MemoryFlags,
) -> None:
    """Serve on loopback, and send it requests of mixed length; a third of the clients leave before the end.

    Fails (exit code 2) unless every answer is the one that the request gets alone, no request failed, and memory
    stayed flat.
    """
    from rich.console import Console

    from moespac.bench import soak as bench

    file = JsonFile(json, "--json") if json else None
    config = bench.SoakConfig(requests=requests, clients=clients, seed=seed)
    settings = draft.arguments() | memory.arguments()
    with moespac.load(model, profile=None, **settings) as engine, counting("soak") as progress:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, requests)

        result = bench.soak(engine, config, advance)
    Console().print(_table(result))
    if file:
        file.write(result.to_dict())
    if result.errors or result.wrong or result.memory["ratio"] > FLAT:
        raise MoespacError(
            f"the soak failed: {result.wrong} wrong answers, {len(result.errors)} errors"
            f" ({'; '.join(result.errors[:3])}), memory x {result.memory['ratio']:.3f}"
        )


def _table(result: SoakResult) -> Table:
    from rich.table import Table

    def times(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in values.items()) + " ms"

    streaming = result.streaming
    table = Table(show_header=False, box=None)
    rows = {
        "requests": f"{result.requests} from {result.clients} clients in {result.seconds:.1f} s",
        "left before the end": str(result.cancelled),
        "failed": str(len(result.errors)),
        "differ from the single run": str(result.wrong),
        "time to first token": times(result.first_token),
        "time per token": times(result.per_token),
        "memory, last / first quarter": f"{result.memory['ratio']:.4f}",
        "a token, engine alone": f"{1e3 * streaming['engine_seconds_per_token']:.3f} ms",
        "a token, streamed over HTTP": f"{1e3 * streaming['streamed_seconds_per_token']:.3f} ms",
        "streaming adds": f"{1e3 * streaming['added_seconds_per_token']:.3f} ms a token",
        "a piece, engine to socket": f"median {1e3 * streaming['engine_to_socket_median']:.3f} ms, "
        f"p99 {1e3 * streaming['engine_to_socket_p99']:.3f} ms",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
