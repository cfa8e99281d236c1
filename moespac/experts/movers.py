"""Who moves the bytes: readers from storage into host memory, the link from there to the accelerator."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.config import MemoryConfig
from moespac.errors import StorageError
from moespac.experts.accelerator import Accelerator
from moespac.experts.store import ExpertStore
from moespac.experts.workers import Bell, Priority, Workers
from moespac.schedule.ports import Ticket
from moespac.timeline import STORAGE, Tape, expert_name


def host_arena(slots: int, record_bytes: int) -> torch.Tensor:
    """Page-aligned host memory, (slots, record_bytes) uint8; pages cost nothing until they are written.

    O_DIRECT reads want page alignment, which record_bytes (a multiple of 4096) keeps for every slot. In huge pages,
    where the system has them: a direct read pins each page it fills, and takes twice as long in small ones.
    """
    memory = mmap.mmap(-1, slots * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(slots, record_bytes)


class StorageReader:
    """storage -> host: a few threads that read whole records, a demand before all prefetches."""

    def __init__(
        self,
        store: ExpertStore,
        arena: torch.Tensor,
        config: MemoryConfig,
        bell: Bell,
        tape: Tape | None = None,
    ) -> None:
        self.store = store
        self._arena = arena
        self._retries = config.read_retries
        self.sharing = config.readers
        self._workers = Workers(STORAGE, config.readers if config.asynchronous else 0, bell, tape=tape)

    def move(self, expert: int, slot: int, source_slot: int | None, speculative: bool) -> Ticket:
        name = expert_name(expert, self.store.shape.experts)
        return self._workers.submit(name, lambda: self._read(expert, slot), _priority(speculative))

    def close(self) -> None:
        self._workers.close()
        self.store.close()

    def _read(self, expert: int, slot: int) -> None:
        read_record(self.store, expert, self._arena[slot].numpy(), self._retries)


def read_record(store: ExpertStore, expert: int, buffer: NDArray[np.uint8], retries: int) -> None:
    """Raises StorageError when the retries are used up; a corrupt record (CheckpointError) is not retried."""
    for attempts_left in range(retries, -1, -1):
        try:
            store.read_into(expert, buffer)
            return
        except OSError as error:
            if attempts_left == 0:
                layer, number = divmod(expert, store.shape.experts)
                raise StorageError(
                    f"reading expert {number} of MoE layer {layer} failed {retries + 1} times "
                    f"({error}); check the disk, then try again"
                ) from error


class LinkCopier:
    """host -> accelerator: one copy at a time, so that each gets the whole link."""

    sharing = 1

    def __init__(self, accelerator: Accelerator, arena: torch.Tensor, experts: int) -> None:
        """``experts`` in a layer."""
        self._accelerator = accelerator
        self._arena = arena  # the host tier's
        # Rows of it, by slot: indexing a tensor takes as long as asking for a copy.
        self._rows: dict[int, torch.Tensor] = {}
        self._experts = experts

    def move(self, expert: int, slot: int, source_slot: int | None, speculative: bool) -> Ticket:
        assert source_slot is not None
        row = self._rows.get(source_slot)
        if row is None:
            row = self._rows[source_slot] = self._arena[source_slot]
        name = expert_name(expert, self._experts)
        return self._accelerator.copy_in(name, row, slot, _priority(speculative))

    def close(self) -> None:
        self._accelerator.close()


def _priority(speculative: bool) -> Priority:
    return Priority.SPECULATIVE if speculative else Priority.DEMAND
