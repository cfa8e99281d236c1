"""What commands read and write: text in UTF-8, results in JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import typer

from moespac.atomic import write_atomically
from moespac.errors import ConfigError


def scratch_directory(directory: Path | None, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A directory on the disk of ``directory`` (None: the system's place for such) that is gone afterwards.

    Raises ConfigError, naming the flag, when there can be none.
    """
    try:
        return tempfile.TemporaryDirectory(dir=directory, prefix=prefix)
    except OSError as error:
        raise ConfigError(
            f"--directory {directory}: cannot be used ({error.strerror}); name another"
        ) from None


def read_text(source: Path, flag: str) -> str:
    """The text of a file, or of standard input for "-". Raises ConfigError, naming ``flag``."""
    try:
        data = typer.get_binary_stream("stdin").read() if str(source) == "-" else source.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {source}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {source}: is not UTF-8 text; convert it") from None


class ResultFile:
    """A place for a result. Making it checks the place, so that no work is done for nothing."""

    def __init__(self, file: Path, flag: str) -> None:
        """Raises ConfigError, naming ``flag``, when ``file`` cannot be written."""
        self._name = f"{flag} {file}"
        self._file = file.resolve()  # a link stays a link
        if self._file.exists() and not self._file.is_file():
            raise ConfigError(f"{self._name}: is not a regular file; name a file")
        probe = self._file.with_name(f"{self._file.name}.probe-{os.getpid()}")
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._error(error) from None

    def write_bytes(self, data: bytes) -> None:
        """Replace the file as a whole."""
        try:
            write_atomically(self._file, data)
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._name}: cannot be written ({error.strerror}); name another place")


class JsonFile(ResultFile):
    """The same for what is written as JSON."""

    def write(self, result: Any, compact: bool = False) -> None:
        """Replace the file as a whole; ``compact`` is for programs, not for people."""
        text = json.dumps(result, indent=None if compact else 2, ensure_ascii=False) + "\n"
        self.write_bytes(text.encode("utf-8"))
