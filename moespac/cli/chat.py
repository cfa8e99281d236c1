"""``moespac chat``: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from moespac.cli.bars import loaded
from moespac.cli.files import JsonFile
from moespac.cli.flags import TEXT, DraftFlags, MemoryFlags, Model, ProfileFlags, TextFlags
from moespac.cli.interrupts import Interrupts
from moespac.cli.spread import spread
from moespac.cli.tables import summary_table
from moespac.cli.terminal import Lines, open_lines
from moespac.errors import MoespacError

if TYPE_CHECKING:
    from moespac.engine.engine import Engine
    from moespac.engine.summary import Summary

HELP = """\
/stats         what the last answer cost
/system TEXT   what the model is told before everything; without TEXT: show it; /system off: nothing
/reset         forget the conversation, and keep what /system said
/save FILE     write the conversation as JSON
/help          this list
/exit          leave (or Ctrl-D)
Enter sends. Alt-Enter, or a \\ at the end of a line, begins a new line; what is pasted may have several.
Ctrl-C stops an answer; a second one at once, while a prompt is read. The arrows find earlier messages."""


@spread
def chat(
    *,
    model: Model = None,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before everything.", rich_help_panel=TEXT),
    ] = None,
    text: TextFlags,
    draft: DraftFlags,
    memory: MemoryFlags,
    profile: ProfileFlags,
) -> None:
    """Talk to a model, in its own chat template. /help lists what can be typed."""
    wanted = text.arguments()
    settings = draft.arguments() | memory.arguments() | profile.arguments()
    with loaded(model, settings) as engine:
        Chat(engine, wanted, system).run()


class Chat:
    """The conversation so far, and what can be done with it."""

    def __init__(self, engine: Engine, settings: dict[str, Any], system: str | None = None) -> None:
        self._engine = engine
        self._settings = settings
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._summary: Summary | None = None
        self._console = Console(stderr=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/stats": lambda _: self._show_stats(),
            "/system": self._set_system,
            "/reset": lambda _: self._messages.clear(),
            "/save": self._save,
        }

    def run(self) -> None:
        """Until /exit or the end of input."""
        self._say("/help lists the commands, /exit leaves")
        lines = open_lines([*self._commands, "/exit"])
        while (line := self._read(lines)) not in (None, "/exit"):
            try:
                self._react(line.strip())
            except MoespacError as error:  # one answer failed, not the conversation
                self._say(f"error: {error} (/reset forgets the conversation)")

    def _read(self, lines: Lines) -> str | None:
        while True:
            try:
                return lines.read()
            except KeyboardInterrupt:
                self._say("Ctrl-D or /exit leaves")

    def _react(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            unknown = f"there is no {name}; /help lists the commands"
            self._commands.get(name, lambda _: self._say(unknown))(argument.strip())
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        """Stream the answer; both join the conversation, an answer that was stopped with what there is."""
        asked = [*self._messages, {"role": "user", "content": question}]
        stream = self._engine.stream(self._engine.chat_tokens(self._with_system(asked)), **self._settings)
        pieces = []
        with Interrupts() as interrupts:
            try:
                for piece in stream:
                    typer.echo(piece, nl=False)
                    pieces.append(piece)
                    if interrupts.wanted:
                        break
            except KeyboardInterrupt:
                pass
            finally:
                stream.close()
        typer.echo()
        self._summary = stream.result.summary
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}, *messages] if self._system else messages

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text == "off" else text
        self._say(f"system: {self._system}" if self._system else "there is no system message")

    def _show_stats(self) -> None:
        if self._summary is None:
            self._say("nothing was answered yet")
        else:
            self._console.print(summary_table(self._summary))

    def _save(self, file: str) -> None:
        if not file:
            self._say("name a file: /save FILE")
        else:
            messages = self._with_system(self._messages)
            JsonFile(Path(file).expanduser(), "/save").write(messages)
            self._say(f"saved {len(messages)} messages to {file}")

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False)
