"""storage -> host where native code decides: threads that wait for reads, and read, without Python in between.

A record is looked at the first time that it is read, and what fails is tried again: both in Python, as
``StorageReader`` does it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np
import torch

from moespac.config import MemoryConfig
from moespac.experts.movers import read_record
from moespac.experts.store import ExpertStore, PackedStore
from moespac.timeline import STORAGE

_CLOSED, _READ, _CHECK = range(3)  # of what reads.c returns


class NativeReader:
    """Implements ``schedule.ports.NativeReads``."""

    def __init__(
        self, library: ctypes.CDLL, store: ExpertStore, arena: torch.Tensor, config: MemoryConfig
    ) -> None:
        """``config.readers`` threads; arena (slots, record_bytes) uint8."""
        self.store = store
        self.errors: dict[int, Exception] = {}
        self._library = library
        self._arena = arena
        self._retries = config.read_retries
        # Of another store nothing is known: its records are read in Python.
        descriptor, known = -1, np.zeros(store.shape.total, dtype=bool)
        if isinstance(store, PackedStore):
            descriptor, known = store.descriptor, store.verified
        self._known = known
        places = known.ctypes.data, arena.data_ptr(), *reversed(arena.shape)
        self.address = library.moespac_reads_new(
            descriptor, *places, config.stripe_bytes, config.stripes_ahead
        )
        if not self.address:
            raise MemoryError("no memory for the reads of experts")
        weakref.finalize(self, library.moespac_reads_free, self.address).atexit = False
        self.lanes = [f"{STORAGE} {i}" for i in range(1, config.readers + 1)]
        self._threads = [
            threading.Thread(target=self._serve, name=f"moespac {lane}", daemon=True) for lane in self.lanes
        ]
        for thread in self._threads:
            thread.start()

    def count(self) -> int:
        """Of ``schedule.ports.Bell``."""
        return self._library.moespac_reads_rings(self.address)

    def wait_beyond(self, count: int) -> None:
        """Of ``schedule.ports.Bell``."""
        self._library.moespac_reads_wait(self.address, count)

    def close(self) -> None:
        """Stop after the reads that are running. Returns when no thread is left."""
        self._library.moespac_reads_close(self.address)
        for thread in self._threads:
            thread.join()
        self.store.close()

    def _serve(self) -> None:
        expert, slot = ctypes.c_int64(), ctypes.c_int64()
        places = ctypes.addressof(expert), ctypes.addressof(slot)
        while (what := self._library.moespac_reads_serve(self.address, *places)) != _CLOSED:
            failed = False
            try:
                record = self._arena[slot.value].numpy()
                if what == _CHECK and isinstance(self.store, PackedStore):
                    self.store.verify(expert.value, record)
                else:
                    read_record(self.store, expert.value, record, self._retries)
            except Exception as error:  # carried to the thread that waits for the record
                self.errors[expert.value], failed = error, True
            self._library.moespac_reads_end(self.address, slot.value, failed)
