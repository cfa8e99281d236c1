"""Lines that somebody types: edited, with a history, over several rows; or simply read where nobody types."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import platformdirs
import typer


class Lines(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message; None when there is no more. Raises KeyboardInterrupt for Ctrl-C."""
        ...


def open_lines(commands: Sequence[str]) -> Lines:
    """For this terminal, or for what is piped in. ``commands`` can be completed."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TypedLines(commands)
    return PipedLines()


class PipedLines:
    """Messages are lines; those that end in a backslash go on in the next one."""

    def read(self) -> str | None:
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


class TypedLines:
    """Enter sends; Alt-Enter, or Enter behind a backslash, begins a new row. What is pasted stays as it is."""

    def __init__(self, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=". ",
            key_bindings=_bindings(),
            history=_history(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
        )

    def read(self) -> str | None:
        try:
            return self._session.prompt()
        except EOFError:
            return None


def _bindings():  # -> KeyBindings, which is imported for terminals only
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_row(event) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _history():  # -> History
    """Kept between conversations where the user's state directory can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file: Path = platformdirs.user_state_path("moespac") / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
