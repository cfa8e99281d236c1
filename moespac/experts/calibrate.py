"""MEASURE what experts cost here, with the engine's own parts: its records, movers, slots and kernels.

A second or two before the first token; what is observed while decoding refines it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moespac.config import CalibrationConfig
from moespac.experts.devices import Computers, LayerTensors
from moespac.experts.groups import Groups
from moespac.experts.store import ExpertStore
from moespac.experts.workers import Bell
from moespac.policy.cost import MeasuredCosts
from moespac.schedule.ports import Mover, Ticket


@dataclass(frozen=True)
class Workbench:
    """Everything that moves and computes records, before anybody else uses it. There is an accelerator."""

    store: ExpertStore
    reader: Mover
    link: Mover
    computers: Computers
    bell: Bell
    hidden: int
    dtype: torch.dtype  # that the trunk computes in

    @torch.inference_mode()
    def measure(self, config: CalibrationConfig) -> MeasuredCosts:
        """Reads some experts of the first layer into the first slots of both tiers, and computes them on both.

        What is in the slots then is in nobody's books. Raises the mover's error (StorageError, CheckpointError)
        when a record cannot be had, torch.OutOfMemoryError when the accelerator has no room to compute.
        """
        experts = range(self._number(config))
        start = time.perf_counter()
        self._finish([self.reader.move(e, e, None, True) for e in experts])
        storage = (time.perf_counter() - start) / len(experts)
        copies: list[Ticket] = []
        for _ in range(2):  # the first round touches everything for the first time
            copies = [self.link.move(e, e, e, False) for e in experts]
            self._finish(copies)
        host, accelerator = self._curves(experts, config)
        return MeasuredCosts(host, accelerator, statistics.median_low(t.seconds for t in copies), storage)

    def _number(self, config: CalibrationConfig) -> int:
        """Records: as many as caches cannot hold, if slots and the layer have them."""
        accelerator = self.computers.accelerator
        assert accelerator is not None
        most = max(1, config.records_bytes // self.store.shape.record_bytes)
        slots = len(self.computers.host), len(accelerator.arena)
        return min(self.store.shape.experts, *slots, config.experts_most, most)

    def _curves(
        self, experts: Sequence[int], config: CalibrationConfig
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of one expert by tokens, on the host and on the accelerator."""
        host = dict.fromkeys(config.tokens, np.inf)
        accelerator = dict.fromkeys(config.tokens, np.inf)
        start = time.perf_counter()
        self._compute(experts[:1], 1)  # compiles kernels and wakes threads
        for _ in range(config.repeats):
            for tokens in config.tokens:
                spent = self._compute(experts, tokens)
                host[tokens] = min(host[tokens], spent[0])
                accelerator[tokens] = min(accelerator[tokens], spent[1])
            if time.perf_counter() - start > config.seconds:
                break
        return host, accelerator

    def _compute(self, experts: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds of one expert on the host and on the accelerator, as many at once as a token has."""
        on_host = on_accelerator = 0.0
        for batch in _batches(experts, self.store.shape.top_k):
            tensors = self._layer(batch, tokens)
            on_host += float(tensors.compute_on_host(batch, batch).sum())
            job = self._layer(batch, tokens).compute_on_accelerator(batch, batch, "calibration")
            self._finish([job])
            on_accelerator += job.seconds
        return on_host / len(experts), on_accelerator / len(experts)

    def _layer(self, experts: NDArray[np.int64], tokens: int) -> LayerTensors:
        """A layer whose ``tokens`` all go to these experts."""
        accelerator = self.computers.accelerator
        assert accelerator is not None
        routing = np.tile(experts, (tokens, 1))
        groups = Groups.of(routing, self.store.shape.experts)
        x = torch.ones(tokens, self.hidden, dtype=self.dtype, device=accelerator.device)
        return LayerTensors(self.computers, None, groups, 0, x, time.perf_counter)

    def _finish(self, tickets: Sequence[Ticket]) -> None:
        while True:
            seen = self.bell.count()
            if all(ticket.done for ticket in tickets):
                break
            self.bell.wait_beyond(seen)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error


def _batches(experts: Sequence[int], size: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, len(experts), size):
        yield np.array(experts[begin : begin + size], dtype=np.int64)
