"""Progress on stderr, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import moespac

if TYPE_CHECKING:
    from moespac.engine.engine import Engine


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that is told how many of how many are done. Silent where there is no terminal."""
    columns = TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Something turns while work of unknown length is done."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        yield


@contextmanager
def loaded(model: Path | None, settings: dict[str, Any]) -> Iterator[Engine]:
    """``moespac.load``, which takes a while."""
    with waiting("loading the model"):
        engine = moespac.load(model, **settings)
    with engine:
        yield engine
