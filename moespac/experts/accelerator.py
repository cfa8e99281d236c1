"""A device with memory and workers of its own: one copies records in, one computes.

The same class serves CUDA and the in-process accelerator (a CPU device with its own arena and threads) that
tests and demonstrations use: execution on two devices, transfers in flight and joins are concurrent there too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moespac.experts.workers import Bell, Priority, Ticket, Workers
from moespac.timeline import ACCELERATOR, LINK, Tape


class Accelerator:
    """``slots`` records of ``record_bytes`` on ``device``; not ``asynchronous`` makes every job synchronous."""

    def __init__(
        self,
        device: torch.device,
        slots: int,
        record_bytes: int,
        bell: Bell,
        asynchronous: bool,
        tape: Tape | None = None,
    ) -> None:
        self.device = device
        self.arena = torch.empty(slots, record_bytes, dtype=torch.uint8, device=device)
        threads = 1 if asynchronous else 0
        self.link = Workers(LINK, threads, bell, tape=tape)
        self._compute = Workers(ACCELERATOR, threads, bell, tape=tape)

    def copy_in(self, name: str, source: torch.Tensor, slot: int, priority: Priority) -> Ticket:
        """Copy one host record (record_bytes,) into a slot of the arena."""
        target = self.arena[slot]
        return self.link.submit(name, self._on_device(lambda: target.copy_(source)), priority)

    def compute(self, name: str, job: Callable[[], object]) -> Ticket:
        return self._compute.submit(name, self._on_device(job))

    def close(self) -> None:
        self.link.close()
        self._compute.close()

    def _on_device(self, job: Callable[[], object]) -> Callable[[], None]:
        """A job on CUDA runs on its thread's own stream, and is done when the device is done with it."""

        def run() -> None:
            if self.device.type != "cuda":
                job()
                return
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.default_stream(self.device))
            with torch.cuda.stream(stream):
                job()
            stream.synchronize()

        return run
