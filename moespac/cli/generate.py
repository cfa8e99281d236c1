"""``moespac generate``: a prompt in, text out as it comes, then what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moespac.cli.bars import loaded
from moespac.cli.files import JsonFile, read_text
from moespac.cli.flags import (
    OUTPUT,
    TEXT,
    DraftFlags,
    MemoryFlags,
    Model,
    ProfileFlags,
    TextFlags,
    TimelineFlags,
)
from moespac.cli.spread import spread
from moespac.cli.tables import summary_table
from moespac.errors import ConfigError

DEMO_PROMPT = "It was a dark and stormy night, and the"  # prose is what the embedded model has read most of

Prompt = Annotated[
    str | None,
    typer.Option(
        help="The text to continue.", rich_help_panel=TEXT, show_default="a sample, for the embedded model"
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option(help="A file with the prompt; - for standard input.", rich_help_panel=TEXT)
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write text, tokens and all figures here.", rich_help_panel=OUTPUT
    ),
]


@spread
def generate(
    *,
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    text: TextFlags,
    json: Json = None,
    timeline: TimelineFlags,
    draft: DraftFlags,
    memory: MemoryFlags,
    profile: ProfileFlags,
) -> None:
    """Continue a prompt. Text goes to stdout as it comes, a summary of what it cost to stderr.

    Example: moespac generate --model ./OLMoE-1B-7B --host-memory 2GiB --prompt "The sea"
    """
    wanted = text.arguments()
    settings = draft.arguments() | memory.arguments() | profile.arguments()
    start = _prompt(model, prompt, prompt_file)
    result_file = JsonFile(json, "--json") if json else None

    with timeline.recording() as record, loaded(model, settings) as engine:
        engine.record_timeline(record)
        stream = engine.stream(start, **wanted)
        for piece in stream:
            typer.echo(piece, nl=False)
    result = stream.result

    console = Console(stderr=True)
    if typer.get_text_stream("stdout").isatty():
        typer.echo()  # elsewhere stdout is the text and nothing else
    console.print(summary_table(result.summary))
    if result_file:
        result_file.write(result.summary.to_dict())


def _prompt(model: Path | None, prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file exclude each other: give one of them")
    if prompt_file is not None:
        return read_text(prompt_file, "--prompt-file")
    if prompt is not None:
        return prompt
    if model is None:
        return DEMO_PROMPT
    raise ConfigError("there is no prompt: give --prompt TEXT, or --prompt-file FILE (- for standard input)")
