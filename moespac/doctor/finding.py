"""What an examination found: one line, and one remedy where something is amiss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "bad"]  # as it should be; slower than it need be; will not work


@dataclass(frozen=True)
class Finding:
    topic: str
    status: Status
    what: str
    remedy: str = ""  # nothing to do where it is empty


@dataclass(frozen=True)
class Place:
    """Where to look: the directory that models are in."""

    directory: Path


Check = Callable[[Place], Iterator[Finding]]


def ok(topic: str, what: str) -> Finding:
    return Finding(topic, "ok", what)


def warn(topic: str, what: str, remedy: str) -> Finding:
    return Finding(topic, "warn", what, remedy)


def bad(topic: str, what: str, remedy: str) -> Finding:
    return Finding(topic, "bad", what, remedy)
