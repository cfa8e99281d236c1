"""What a pack has finished so far, one JSON line a record, so that it goes on after being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moespac.atomic import write_all, write_atomically


class Done(NamedTuple):
    """One record that is safely on disk."""

    record: int  # flat expert id
    checksum: int  # xxh3_64
    squared_error: float  # ||W - Q(W)||^2
    squared_norm: float  # ||W||^2


class Journal:
    """Lines are appended once their records are synced; a torn last line is as good as none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Done]:
        done = []
        for line in self.file.read_bytes().split(b"\n") if self.file.exists() else []:
            try:
                record, checksum, error, norm = json.loads(line)
                done.append(Done(int(record), int(checksum), float(error), float(norm)))
            except (ValueError, TypeError):
                continue
        return done

    def restart(self, done: Iterable[Done]) -> None:
        """Begin anew with what was found good: no torn line is left for the next one to be glued to."""
        write_atomically(self.file, _lines(done))

    def append(self, done: Iterable[Done]) -> None:
        fd = os.open(self.file, os.O_WRONLY | os.O_APPEND)
        try:
            write_all(fd, _lines(done))
        finally:
            os.close(fd)


def _lines(done: Iterable[Done]) -> bytes:
    return b"".join(json.dumps(list(item)).encode() + b"\n" for item in done)
