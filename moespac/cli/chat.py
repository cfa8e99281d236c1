"""``moespac chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

import moespac
from moespac.cli.files import JsonFile
from moespac.cli.flags import DraftFlags, MemoryFlags, Model, ProfileFlags, TextFlags
from moespac.cli.spread import spread
from moespac.cli.tables import summary_table
from moespac.errors import MoespacError

if TYPE_CHECKING:
    from moespac.engine.engine import Engine
    from moespac.engine.summary import Summary

HELP = """\
/stats      what the last answer cost
/reset      forget the conversation
/save FILE  write the conversation as JSON
/exit       leave (or Ctrl-D)
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer; at the prompt it leaves."""


@spread
def chat(
    *, model: Model = None, text: TextFlags, draft: DraftFlags, memory: MemoryFlags, profile: ProfileFlags
) -> None:
    """Talk to a model, in its own chat template. /help lists what can be typed."""
    wanted = text.arguments()
    settings = draft.arguments() | memory.arguments() | profile.arguments()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() line editing and history
    with moespac.load(model, **settings) as engine:
        Chat(engine, wanted).run()


class Chat:
    """The conversation so far, and what can be done with it."""

    def __init__(self, engine: Engine, settings: dict[str, Any]) -> None:
        self._engine = engine
        self._settings = settings
        self._messages: list[dict[str, str]] = []
        self._summary: Summary | None = None
        self._console = Console(stderr=True)

    def run(self) -> None:
        """Until /exit, the end of input, or Ctrl-C at the prompt."""
        self._say("/help lists the commands, /exit leaves")
        while (line := _read()) not in (None, "/exit"):
            try:
                self._react(line.strip())
            except MoespacError as error:  # one answer failed, not the conversation
                self._say(f"error: {error} (/reset forgets the conversation)")

    def _react(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        elif line:
            self._answer(line)

    def _command(self, name: str, argument: str = "") -> None:
        commands: dict[str, Callable[[], None]] = {
            "/help": lambda: self._say(HELP),
            "/stats": self._show_stats,
            "/reset": self._messages.clear,
            "/save": lambda: self._save(argument),
        }
        commands.get(name, lambda: self._say(f"there is no {name}; /help lists the commands"))()

    def _answer(self, question: str) -> None:
        """Stream the answer; both join the conversation, an answer that was stopped with what there is."""
        asked = [*self._messages, {"role": "user", "content": question}]
        stream = self._engine.stream(self._engine.chat_tokens(asked), **self._settings)
        pieces = []
        try:
            for piece in stream:
                typer.echo(piece, nl=False)
                pieces.append(piece)
            self._summary = stream.result.summary
        except KeyboardInterrupt:
            stream.close()
        typer.echo()
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _show_stats(self) -> None:
        if self._summary is None:
            self._say("nothing was answered in full yet")
        else:
            self._console.print(summary_table(self._summary))

    def _save(self, file: str) -> None:
        if not file:
            self._say("name a file: /save FILE")
        else:
            JsonFile(Path(file).expanduser(), "/save").write(self._messages)
            self._say(f"saved {len(self._messages)} messages to {file}")

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)


def _read() -> str | None:
    """What the user typed, lines joined at a trailing backslash; None when there is no more."""
    lines = []
    try:
        lines.append(input("> "))
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input(". "))
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return "\n".join(lines)
