"""Host memory whose books native code keeps too, so that a whole pass runs without Python: its misses and its
prefetches among it (csrc/layer.c, csrc/host_memory.c). For machines without an accelerator.

Here are the moments between passes, and the layers that ask all the same; ``ExpertMemory`` is its twin.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from moespac.config import MemoryConfig
from moespac.experts.kernels.library import HostMemory, Order, load_library
from moespac.policy.base import TierName
from moespac.policy.cost import CostModel
from moespac.schedule.memory import ExpertMemory, Retention
from moespac.schedule.ports import NativeReads
from moespac.timeline import Tape, expert_name
from moespac.types import NO_IDS, Capacity, Ids, ModelShape, Placement, Plan

log = logging.getLogger(__name__)

_BEFORE_ALL = -1  # layers: they are to come

_LANDED = np.dtype(
    [
        *((name, np.int64) for name in ("expert", "slot", "speculative", "failed", "lane")),
        *((name, np.float64) for name in ("start", "seconds", "alone")),
    ]
)  # ``Read`` of csrc/reads.h


class NativeMemory(ExpertMemory):
    """``ExpertMemory`` without an accelerator, over ``reads``."""

    def __init__(
        self,
        shape: ModelShape,
        capacity: Capacity,
        reads: NativeReads,
        config: MemoryConfig,
        costs: CostModel,
        tape: Tape | None = None,
    ) -> None:
        library = load_library()
        assert library is not None and not capacity.accelerator
        super().__init__(shape, capacity, reads, None, config, costs, bell=reads)  # type: ignore[arg-type]
        self._library = library
        self._reads = reads
        self._tape = tape or Tape()
        # What may land in a pass: a plan, and what its layers need; and once more, before anybody is told.
        self._landed = np.empty(4 * shape.total + capacity.host, _LANDED)
        self._books = self.host.books
        self._memory = HostMemory(
            shape.experts,
            capacity.host,
            config.read_ahead,
            *(part.ctypes.data for part in self._books),
            reads.address,
            landed=self._landed.ctypes.data,
            room=len(self._landed),
        )
        self.address = ctypes.addressof(self._memory)
        self._list(NO_IDS)

    # ---- ahead of need -------------------------------------------------------------------------------

    def follow(self, plan: Plan) -> None:
        self._list(plan.host)

    def pump(self, retention: Retention) -> None:
        if self._memory.first < self._memory.end and self._in_flight("host") < self._config.read_ahead:
            self._ask(self._library.moespac_memory_pump, retention)

    def start_layer(self, layer: int, placement: Placement) -> None:
        wanted = placement.host
        self._library.moespac_memory_start_layer(self.address, layer, wanted.ctypes.data, wanted.size)
        if placement.prefetch.host.size:
            rest = self._listed[self._memory.first : self._memory.end]
            self._list(np.concatenate([placement.prefetch.host, rest]))

    # ---- on need -------------------------------------------------------------------------------------

    def demand_host(self, expert: int, retention: Retention) -> bool:
        return bool(self._ask(self._library.moespac_memory_demand, retention, expert))

    def settle(self) -> list[tuple[TierName, int]]:
        self._library.moespac_memory_settle(self.address)
        return self._hear(raising=True)

    def quiesce(self) -> None:
        while True:
            seen = self.bell.count()
            self._library.moespac_memory_settle(self.address)
            self._hear(raising=False)
            if not self._in_flight("host"):
                return
            self.bell.wait_beyond(seen)

    def begin_anew(self, costs: CostModel) -> None:
        super().begin_anew(costs)
        self._list(NO_IDS)

    @property
    def moves(self) -> bool:
        return bool(self._in_flight("host") or self._memory.first < self._memory.end)

    def check_integrity(self) -> None:
        self.host.check_integrity()
        assert self._in_flight("host") == np.count_nonzero(self.host.filling), "a filling slot has one flight"

    # ---- within --------------------------------------------------------------------------------------

    def _ask(self, function: Callable[..., Any], retention: Retention, *arguments: int) -> Any:
        """Of a moment, not of a layer: what is retained is all in ``retention``."""
        value = np.ascontiguousarray(retention("host"), np.float64)
        order = Order(to_come=value.ctypes.data)
        return function(self.address, ctypes.addressof(order), _BEFORE_ALL, *arguments)

    def _list(self, experts: Ids) -> None:
        """These are the prefetches to come."""
        self._listed = np.array(experts, dtype=np.int64)
        self._memory.ahead = self._listed.ctypes.data
        self._memory.first, self._memory.end = 0, experts.size

    def _in_flight(self, name: TierName) -> int:
        return self._library.moespac_reads_count(self._reads.address) if name == "host" else 0

    def _hear(self, raising: bool) -> list[tuple[TierName, int]]:
        """Of the reads that are over: account for them; returns what became ready."""
        landed, self._memory.landings = self._landed[: self._memory.landings].tolist(), 0
        arrived: list[tuple[TierName, int]] = []
        failure: Exception | None = None
        for expert, _, speculative, failed, lane, start, seconds, alone in landed:
            if not failed:
                arrived.append(("host", expert))
                self.bytes_read["storage"] += self.shape.record_bytes
                self._costs.observe_storage(alone)
                self._tape(
                    self._reads.lanes[lane % len(self._reads.lanes)],
                    expert_name(expert, self.shape.experts),
                    start,
                    seconds,
                )
                continue
            error = self._reads.errors[expert]  # which may have failed twice since
            if raising and not speculative:
                failure = error
            else:
                log.info("a prefetch failed: %s", error)
        if failure is not None:
            raise failure
        return arrived
