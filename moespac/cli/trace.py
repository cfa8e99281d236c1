"""``moespac trace``: record, import, show, and judge estimators on routing traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import moespac
from moespac.cli.bars import counting
from moespac.cli.files import JsonFile, ResultFile
from moespac.cli.flags import TEXT, DraftFlags, MemoryFlags, Model, ProfileFlags, TextFlags
from moespac.cli.prompts import Prompt, read_prompts
from moespac.cli.shares import share_of_experts
from moespac.cli.spread import spread
from moespac.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moespac.types import ModelShape

app = typer.Typer(help="Routing traces: what a model routed where, pass by pass.", no_args_is_help=True)

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace (.npz), recorded or imported.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trace to write (.npz).")]


@app.command()
@spread
def record(
    *,
    output: Output,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue.", rich_help_panel=TEXT, show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL",
            help="Texts, one JSON object a line: prompt, or turns (the first is asked as chat); and, if wanted, "
            "benchmark and category.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text: TextFlags,
    draft: DraftFlags,
    memory: MemoryFlags,
    profile: ProfileFlags,
) -> None:
    """Generate, and write what every pass routed where. Flags are those of `moespac generate`.

    Example: moespac trace record --prompts mt_bench.jsonl -o mt_bench.npz
    """
    from moespac.trace.files import to_bytes
    from moespac.trace.recorder import TraceRecorder

    wanted = text.arguments()
    settings = draft.arguments() | memory.arguments() | profile.arguments()
    asked = _asked(prompt, prompts)
    file = ResultFile(output, "--output")

    with moespac.load(model, **settings) as engine, counting("recording") as progress:
        name = "the embedded model" if model is None else model.resolve().name
        source = f"moespac {moespac.__version__}: {name}, {engine.drafter.name}, K = {draft.window}"
        engine.runtime.recorder = recorder = TraceRecorder(engine.shape, source)
        for done, each in enumerate(asked):
            progress(done, len(asked))
            recorder.begin_sequence(each.category)
            engine.generate(each.for_engine(engine), **wanted)
        progress(len(asked), len(asked))
    file.write_bytes(to_bytes(recorder.trace()))
    typer.echo(f"wrote {output}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="An .npz with experts, tokens, offsets.")],
    output: Output,
    meta: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="A line for each sequence, with its dataset and category."),
    ] = None,
) -> None:
    """Convert published decode routing: one token a pass, nothing drafted."""
    from moespac.trace.files import to_bytes
    from moespac.trace.importer import import_trace

    file = ResultFile(output, "--output")
    file.write_bytes(to_bytes(import_trace(source, meta)))
    typer.echo(f"wrote {output}")


@app.command()
def show(
    trace: TraceFile,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw the same here, as PNG; needs matplotlib.")
    ] = None,
) -> None:
    """What a trace says about caching: reuse, skew, overlap of windows, hits of an LRU."""
    from moespac.cli.trace_tables import print_tables
    from moespac.trace.analysis import analyse
    from moespac.trace.importer import load
    from moespac.trace.plots import draw_all

    loaded = load(trace)
    try:
        analysis = analyse(loaded)
    except ValueError as error:
        raise CheckpointError(f"{trace}: shows nothing ({error}); record a longer one") from None
    print_tables(Console(), loaded, analysis)
    if plots is not None:
        for file in draw_all(analysis, plots):
            typer.echo(f"wrote {file}")


@app.command()
def coverage(
    trace: TraceFile,
    slots: Annotated[str, typer.Option(metavar="PERCENT", help="Share of all experts that is held.")] = "25%",
    window: Annotated[int, typer.Option(min=1, help="Tokens a window, all known and accepted.")] = 5,
    warm: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TRACE",
            help="Traces to learn from first, as from a saved profile; may be given several times.",
            show_default="nothing is known at first",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """What share of the demand each estimator would have had in fast memory, beside what is possible.

    Before each window an estimator chooses the experts to hold, anew for the whole model; transfers cost nothing.
    """
    from moespac.bench.coverage import compare
    from moespac.cli.trace_tables import coverage_table
    from moespac.trace.importer import load

    share = share_of_experts(slots, "--slots")
    file = JsonFile(json, "--json") if json else None
    judged, known = load(trace), [(path, load(path)) for path in warm or []]
    if round(share * judged.shape.total) < 1:
        raise ConfigError(
            f"--slots {slots}: holds none of the model's {judged.shape.total} experts; give more"
        )
    for path, other in known:
        if other.shape != judged.shape:
            raise ConfigError(
                f"--warm {path}: has {_describe(other.shape)}, {trace} {_describe(judged.shape)};"
                " warm with traces of the same model"
            )
    if not any(len(judged.decode_tokens(n).tokens) >= window for n in range(judged.sequences)):
        raise ConfigError(f"{trace}: has no sequence of {window} decoded tokens; give a smaller --window")
    with counting("judging") as progress:
        found = compare(judged, share, window, [other for _, other in known], progress)
    Console().print(coverage_table(found))
    if file:
        file.write(found)


def _asked(prompt: str | None, prompts: Path | None) -> list[Prompt]:
    if prompt is not None and prompts is None:
        return [Prompt(prompt)]
    if prompts is not None and prompt is None:
        return read_prompts(prompts, "--prompts")
    raise ConfigError("nothing to record: give either --prompt TEXT or --prompts FILE.jsonl")


def _describe(shape: ModelShape) -> str:
    return f"{shape.layers} layers of {shape.experts} experts, top {shape.top_k}"
