"""What the CUDA tier asks of CUDA, so that its logic can be run without a card."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A mark in a stream, as ``torch.cuda.Event`` has it."""

    def record(self, stream: Any) -> None:
        """Behind all that was put on the stream so far."""
        ...

    def query(self) -> bool:
        """Whether the device has passed it. Raises when the device failed."""
        ...

    def synchronize(self) -> None:
        """Return once it has; the thread sleeps meanwhile."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds of the device's own clock from here to ``end_event``; both have been passed."""
        ...


class Driver(Protocol):
    """One device's streams."""

    device: torch.device
    copy_stream: Any

    def event(self) -> Event:
        """A new one that takes the time, and whose waiters sleep."""
        ...

    def current_stream(self) -> Any:
        """The calling thread's: where its trunk runs."""
        ...

    def run(self, job: Callable[[], object], stream: Any) -> None:
        """Have ``job`` put its work on ``stream``."""
        ...

    def finish(self) -> None:
        """Wait for all of the device, and give back what the allocator holds unused. For rare events only."""
        ...


class TorchDriver:
    """``Driver`` of a real card."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        self.copy_stream = torch.cuda.Stream(self.device)
        # The arena may lie where kernels of loading still write; from here on events order everything.
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True, blocking=True)

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def run(self, job: Callable[[], object], stream: Any) -> None:
        with contextlib.nullcontext() if stream == self.current_stream() else torch.cuda.stream(stream):
            job()

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
