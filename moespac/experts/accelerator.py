"""A device with memory of its own, as the engine sees it: somewhere to copy records to, and somebody to compute.

Two stand behind it: ``cuda.CudaAccelerator``, and ``in_process.InProcessAccelerator``, the CPU with an arena and
threads of its own, for tests and demonstrations: execution on two devices, transfers in flight and joins are
concurrent there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moespac.experts.workers import Priority
from moespac.schedule.ports import Ticket
from moespac.schedule.tiers import Move


class Accelerator(Protocol):
    """Slots for records on ``device``, one link to them, and one computer beside them."""

    device: torch.device
    in_order: bool  # jobs run on the stream that the trunk runs on: what follows there finds their results
    keeps: bool  # whether ``shrink`` leaves what is in the slots that remain
    stands_in: bool  # for a card that is not there: what it takes itself is not worth measuring

    @property
    def arena(self) -> torch.Tensor:
        """(slots, record_bytes) uint8 on ``device``; another tensor after ``shrink``."""
        ...

    @property
    def page_locked(self) -> float | None:
        """Share of the host's slots that are copied at the link's full speed; None: there is no such difference."""
        ...

    def copy_in(self, name: str, source: torch.Tensor, slot: int, priority: Priority) -> Ticket:
        """Copy one host record (record_bytes,) into a slot. Both stay as they are until the ticket is done."""
        ...

    def compute(self, name: str, job: Callable[[], object]) -> Ticket:
        """Run ``job``, which computes over records of the arena; they stay until the ticket is done."""
        ...

    def shrink(self, slots: int, moves: Sequence[Move]) -> None:
        """Carry out ``moves``, then keep the first ``slots``, fewer than now, and give the others' memory back.

        Nothing is in flight meanwhile. Where it does not keep records there are no moves.
        """
        ...

    def close(self) -> None:
        """Stop after what is running; what waits is cancelled. Frees the memory."""
        ...
