"""The accelerator of a machine that has none: an arena in host memory, a thread that copies, one that computes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import torch

from moespac.experts.workers import Bell, Priority, Ticket, Workers
from moespac.schedule.tiers import Move
from moespac.timeline import ACCELERATOR, LINK, Tape


class InProcessAccelerator:
    """Implements ``accelerator.Accelerator``. Not ``asynchronous``: every job runs where it is submitted."""

    device = torch.device("cpu")
    in_order = False  # a thread of its own computes
    keeps = True
    stands_in = True
    page_locked = None

    def __init__(
        self, slots: int, record_bytes: int, bell: Bell, asynchronous: bool, tape: Tape | None = None
    ) -> None:
        self._memory = mmap.mmap(-1, slots * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.arena = torch.frombuffer(self._memory, dtype=torch.uint8).view(slots, record_bytes)
        threads = 1 if asynchronous else 0
        self.link = Workers(LINK, threads, bell, tape=tape)
        self._compute = Workers(ACCELERATOR, threads, bell, tape=tape)

    def copy_in(self, name: str, source: torch.Tensor, slot: int, priority: Priority) -> Ticket:
        target = self.arena[slot]
        return self.link.submit(name, lambda: target.copy_(source), priority)

    def compute(self, name: str, job: Callable[[], object]) -> Ticket:
        return self._compute.submit(name, job)

    def shrink(self, slots: int, moves: Sequence[Move]) -> None:
        """The pages of the slots that go are the system's again at once; the addresses stay ours."""
        for move in moves:
            self.arena[move.target].copy_(self.arena[move.source])
        record_bytes = self.arena.shape[1]
        begin = slots * record_bytes
        self._memory.madvise(mmap.MADV_DONTNEED, begin, self.arena.numel() - begin)
        self.arena = self.arena[:slots]

    def close(self) -> None:
        self.link.close()
        self._compute.close()
