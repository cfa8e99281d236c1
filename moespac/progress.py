"""A progress bar for long work over bytes, on a terminal; or a callback; or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

ProgressOption = (
    bool | Callable[[int, int], None]
)  # a bar or none; or a function of (bytes done, bytes in all)


@contextmanager
def progress_over(total: int, title: str, progress: ProgressOption) -> Iterator[Callable[[int], None]]:
    """Yields a function that says that so many bytes more are done."""
    console = Console(stderr=True)
    if callable(progress):
        yield _accumulate(total, progress)
    elif not progress or not console.is_terminal:
        yield lambda nbytes: None
    else:
        columns = (
            TextColumn(title),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)


def _accumulate(total: int, report: Callable[[int, int], None]) -> Callable[[int], None]:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(done, total)

    return advance
