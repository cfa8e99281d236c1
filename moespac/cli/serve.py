"""``moespac serve``: OpenAI's API and a page, over HTTP."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import moespac
from moespac.cli.flags import DraftFlags, MemoryFlags, Model, ProfileFlags, TimelineFlags
from moespac.cli.spread import spread
from moespac.config import ServeConfig
from moespac.errors import ConfigError

SERVER = "Server"
EMBEDDED = "moespac-demo"  # what the embedded model is asked for by

log = logging.getLogger(__name__)


@spread
def serve(
    *,
    model: Model = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.", rich_help_panel=SERVER),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0: any that is free.", rich_help_panel=SERVER)
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MOESPAC_API_KEY",
            help="Answer only to clients that send this key. Other users of this machine see an option, not the "
            "environment.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more are refused.", rich_help_panel=SERVER)
    ] = ServeConfig.queue,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Answers that take turns; each needs memory for its context.", rich_help_panel=SERVER
        ),
    ] = ServeConfig.parallel,
    max_tokens_limit: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of one answer at most; 0: what the context holds.", rich_help_panel=SERVER
        ),
    ] = ServeConfig.max_tokens_limit,
    draft: DraftFlags,
    memory: MemoryFlags,
    profile: ProfileFlags,
    timeline: TimelineFlags,
) -> None:
    """Serve a model: OpenAI's API at /v1, a page to chat and to watch memory at /, metrics at /metrics.

    Example: moespac serve --model ./Qwen3-30B-A3B --host-memory 16GiB
    """
    settings = draft.arguments() | memory.arguments() | profile.arguments()
    config = replace(ServeConfig(), queue=queue, parallel=parallel, max_tokens_limit=max_tokens_limit)
    _check_key(api_key)
    try:
        from moespac.serve import server
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is missing: pip install 'moespac[serve]'"
        ) from None
    listener = server.bind(host, port)  # before the model: loading may take minutes
    signal.signal(signal.SIGTERM, _exit)  # until the server has its own way: nothing to lose yet
    if api_key is None and not server.is_loopback(listener):
        log.warning(
            "anybody who reaches %s may use this server: set MOESPAC_API_KEY, or leave --host out", host
        )

    with timeline.recording() as record, moespac.load(model, **settings) as engine:
        name = EMBEDDED if model is None else _name(model)
        service = server.Service(engine, name, config, api_key, record)

        def say() -> None:
            typer.echo(f"{name}: {server.url(listener)}/ (page), {server.url(listener)}/v1 (API)", err=True)

        server.Server(service, listener, say).run_until_stopped()


def _name(model: Path) -> str:
    """The directory's, without the path to it."""
    return model.resolve().name


def _check_key(key: str | None) -> None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ConfigError("--api-key: give printable ASCII characters, without spaces around them")


def _exit(number: int, frame: object) -> None:
    raise SystemExit(0)
