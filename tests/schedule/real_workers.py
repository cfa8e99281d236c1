"""The schedule's memory over real threads and arenas, and a store that is not real."""

from __future__ import annotations

from dataclasses import replace

import torch

from moespac.config import CostConfig, MemoryConfig
from moespac.experts.accelerator import Accelerator
from moespac.experts.in_process import InProcessAccelerator
from moespac.experts.kernels.library import load_library
from moespac.experts.movers import LinkCopier, StorageReader, host_arena
from moespac.experts.native_reader import NativeReader
from moespac.experts.workers import Bell
from moespac.policy.cost import CostModel
from moespac.schedule.memory import ExpertMemory, Retention
from moespac.schedule.native import NativeMemory
from moespac.schedule.tiers import Tier
from moespac.types import Capacity
from tests.experts.fake_cuda import FakeDriver, fake_cuda
from tests.fakes import RECORD_BYTES, FakeStore

CONFIG = MemoryConfig(read_ahead=3, queue_depth=3, read_retries=1)


class Memory(ExpertMemory):
    """The real thing over real workers; the tests also look at the bytes."""

    def __init__(
        self,
        store: FakeStore,
        host: int,
        device: int,
        asynchronous: bool,
        cuda: FakeDriver | None = None,
        readers: int = 2,
    ) -> None:
        """``cuda``: the accelerator is the CUDA tier, over this in place of a card."""
        config = replace(CONFIG, asynchronous=asynchronous, readers=readers)
        self._bell = Bell()
        self._host_arena = host_arena(host, RECORD_BYTES)
        self._cuda = cuda
        link = None
        if device:
            self.device = self._open(device, asynchronous)
            link = LinkCopier(self.device, self._host_arena, store.shape.experts)
        reader = StorageReader(store, self._host_arena, config, self._bell)
        costs = CostModel(CostConfig(), RECORD_BYTES)
        super().__init__(store.shape, Capacity(host, device), reader, link, config, costs, self._bell)
        self.store = store

    def _open(self, slots: int, asynchronous: bool) -> Accelerator:
        if self._cuda is None:
            return InProcessAccelerator(slots, RECORD_BYTES, self._bell, asynchronous)
        return fake_cuda(self._cuda, self._host_arena, slots, self._bell, asynchronous)

    def shrink(self, slots: int, retention: Retention) -> None:
        """As the runtime does it."""
        moves = self.shrink_accelerator(slots, retention, self.device.keeps)
        self.device.shrink(slots, moves)

    def arena(self, name: str) -> torch.Tensor:
        return self._host_arena if name == "host" else self.device.arena

    def record(self, tier: Tier, expert: int) -> torch.Tensor:
        return self.arena(tier.name)[tier.slot(expert)]

    def close(self) -> None:
        super().close()
        if self._cuda is not None:
            self._cuda.close()


class HostMemory(NativeMemory):
    """The same without an accelerator, its books kept by native code."""

    def __init__(self, store: FakeStore, host: int, readers: int = 2) -> None:
        library = load_library()
        assert library is not None
        self._host_arena = host_arena(host, RECORD_BYTES)
        config = replace(CONFIG, readers=readers)
        reads = NativeReader(library, store, self._host_arena, config)
        costs = CostModel(CostConfig(), RECORD_BYTES)
        super().__init__(store.shape, Capacity(host), reads, config, costs)
        self.store = store

    def arena(self, name: str) -> torch.Tensor:
        return self._host_arena

    def record(self, tier: Tier, expert: int) -> torch.Tensor:
        return self._host_arena[tier.slot(expert)]
