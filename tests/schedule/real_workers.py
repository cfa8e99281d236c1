"""The schedule's memory over real threads and arenas, and a store that is not real."""

from __future__ import annotations

import torch

from moespac.config import CostConfig, MemoryConfig
from moespac.experts.accelerator import Accelerator
from moespac.experts.movers import LinkCopier, StorageReader, host_arena
from moespac.experts.workers import Bell
from moespac.policy.cost import CostModel
from moespac.schedule.memory import ExpertMemory
from moespac.schedule.tiers import Tier
from moespac.types import Capacity
from tests.fakes import RECORD_BYTES, FakeStore


class Memory(ExpertMemory):
    """The real thing over real workers; the tests also look at the bytes."""

    def __init__(self, store: FakeStore, host: int, device: int, asynchronous: bool) -> None:
        config = MemoryConfig(
            readers=2, read_ahead=3, queue_depth=3, read_retries=1, asynchronous=asynchronous
        )
        bell = Bell()
        arenas = {"host": host_arena(host, RECORD_BYTES)}
        link = None
        if device:
            self.device = Accelerator(torch.device("cpu"), device, RECORD_BYTES, bell, asynchronous)
            arenas["accelerator"] = self.device.arena
            link = LinkCopier(self.device, arenas["host"], store.shape.experts)
        reader = StorageReader(store, arenas["host"], config, bell)
        costs = CostModel(CostConfig(), RECORD_BYTES)
        super().__init__(store.shape, Capacity(host, device), reader, link, config, costs, bell)
        self.store = store
        self.arenas = arenas

    def record(self, tier: Tier, expert: int) -> torch.Tensor:
        return self.arenas[tier.name][tier.slot(expert)]
