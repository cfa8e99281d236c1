"""The ``moespac`` command: its subcommands, global options and what an error looks like."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import moespac
from moespac.cli import (
    bench,
    chat,
    demo,
    doctor,
    evaluate,
    generate,
    plan,
    prepare,
    profile,
    report,
    serve,
    simulate,
    trace,
)
from moespac.errors import MoespacError

# Typer carries its own click since 0.27 and stands on the package before; its errors share this ancestor.
UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """All commands; an error that the user can act on is one line and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoespacError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except UsageError as error:
            where = error.ctx.command_path if error.ctx else "moespac"
            message = " ".join(error.format_message().split()).removesuffix(".")
            typer.echo(f"error: {message}; see `{where} --help`", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="moespac",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # what is left is a defect: a plain traceback serves its report best
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RUN, _PREPARE, _MEASURE = "Run a model", "Prepare a model", "Measure"
app.command(rich_help_panel=_RUN)(generate.generate)
app.command(rich_help_panel=_RUN)(chat.chat)
app.command(rich_help_panel=_RUN)(serve.serve)
app.command(rich_help_panel=_RUN)(demo.demo)
app.command(rich_help_panel=_PREPARE)(plan.plan)
app.command(rich_help_panel=_PREPARE)(prepare.pack)
app.command(rich_help_panel=_PREPARE)(prepare.inflate)
app.command(rich_help_panel=_MEASURE)(doctor.doctor)
app.command(rich_help_panel=_MEASURE)(profile.profile)
app.command(rich_help_panel=_MEASURE)(report.report)
app.command(rich_help_panel=_MEASURE)(simulate.simulate)
app.command("eval", rich_help_panel=_MEASURE)(evaluate.evaluate)
app.add_typer(trace.app, name="trace", rich_help_panel=_MEASURE)
app.add_typer(bench.app, name="bench", rich_help_panel=_MEASURE)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moespac {moespac.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="What to report on stderr.")
    ] = "warning",
) -> None:
    """Run Mixture-of-Experts language models on machines whose fast memory is too small.

    Without --model, commands run the small model pair that comes with moespac: try `moespac demo`.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("moespac").setLevel(log_level.upper())
    if log_level != "debug":
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, to those who call them: that is us
    # Read when transformers is imported: its warnings are for those who write models, its bars hide ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding cannot
    app()
