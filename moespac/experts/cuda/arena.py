"""Device memory for expert slots that can be given back in part.

The kernels want one base address; giving memory back wants pieces. CUDA's virtual memory management has both: one
range of addresses, physical memory mapped into it piece by piece, and unmapped from its end. So a shrink frees what
it frees and leaves every other record where it is. A plain allocation can only be exchanged for a smaller one, and
loses all records, as there is no room for both: it is what is left where the driver has no such management.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from moespac.config import DeviceConfig
from moespac.experts.cuda.virtual_memory import CudaVirtualMemory, VirtualMemory, VirtualMemoryError

log = logging.getLogger(__name__)


class DeviceArena(Protocol):
    """Where the records lie."""

    keeps: bool  # whether ``shrink`` leaves what is in the slots that remain

    @property
    def records(self) -> torch.Tensor:
        """(slots, record_bytes) uint8 on the device."""
        ...

    def shrink(self, slots: int) -> None:
        """Keep the first ``slots``. The device does nothing meanwhile, and nobody holds a view."""
        ...

    def close(self) -> None: ...


class PlainArena:
    """One allocation."""

    keeps = False

    def __init__(self, slots: int, record_bytes: int, device: torch.device) -> None:
        self.records = torch.empty(slots, record_bytes, dtype=torch.uint8, device=device)

    def shrink(self, slots: int) -> None:
        record_bytes, device = self.records.shape[1], self.records.device
        self.records = self.records.new_empty(0)  # first: there may be no room for both
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.records = torch.empty(slots, record_bytes, dtype=torch.uint8, device=device)

    def close(self) -> None:
        self.records = self.records.new_empty(0)


class MappedArena:
    """A range of addresses with physical memory behind it, piece by piece."""

    keeps = True

    def __init__(self, slots: int, record_bytes: int, memory: VirtualMemory, piece_bytes: int) -> None:
        """Raises VirtualMemoryError where the driver refuses, torch.OutOfMemoryError where memory is lacking."""
        self._memory = memory
        self._piece = _round_up(piece_bytes, memory.granularity)
        self._range = _round_up(slots * record_bytes, self._piece)
        self._base = memory.reserve(self._range)
        self._mapped = 0  # bytes, from the base on
        try:
            while self._mapped < self._range:
                memory.map(self._base + self._mapped, self._piece)
                self._mapped += self._piece
        except BaseException:
            self.close()
            raise
        self.records = memory.tensor(self._base, slots * record_bytes).view(slots, record_bytes)

    def shrink(self, slots: int) -> None:
        """What cannot be unmapped is the rest of the piece that the last slot ends in."""
        self.records = self.records[:slots]
        self._unmap(_round_up(self.records.numel(), self._piece))

    def close(self) -> None:
        """Nobody holds a view of the records."""
        self.records = torch.empty(0, 0, dtype=torch.uint8)
        self._unmap(0)
        self._memory.free(self._base, self._range)

    def _unmap(self, down_to: int) -> None:
        while self._mapped > down_to:
            self._mapped -= self._piece
            self._memory.unmap(self._base + self._mapped, self._piece)


def open_arena(
    slots: int,
    record_bytes: int,
    device: torch.device,
    config: DeviceConfig,
    open_memory: Callable[[torch.device], VirtualMemory] = CudaVirtualMemory,
) -> DeviceArena:
    """Mapped where that works, plain elsewhere. Raises torch.OutOfMemoryError where there is no room."""
    try:
        arena = MappedArena(slots, record_bytes, open_memory(device), config.arena_piece)
        try:
            _check(arena.records)
        except VirtualMemoryError:
            arena.close()
            raise
        return arena
    except VirtualMemoryError as error:
        log.info("expert slots are one allocation, which a shrink empties: %s", error)
        return PlainArena(slots, record_bytes, device)


def _check(records: torch.Tensor) -> None:
    """Raises VirtualMemoryError unless the ends of the range hold what is written there."""
    for row, value in ((0, 171), (-1, 84)):
        records[row].fill_(value)
    with contextlib.suppress(RuntimeError):
        if bool((records[-1] == 84).all()) and (len(records) == 1 or bool((records[0] == 171).all())):
            return
    raise VirtualMemoryError("mapped memory does not hold what is written to it")


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
