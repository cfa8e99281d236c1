"""What experts on the host and reads from storage cost each other: they share memory and cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from moespac.bench.compute_probe import ExpertProbe
from moespac.bench.storage_probe import StorageFile, read_rate
from moespac.config import MeasureConfig, MemoryConfig

_FORMAT = "int8"  # between those that memory bounds and those that arithmetic does


@dataclass(frozen=True)
class Slowdowns:
    """Shares of their own speed that both lose while the other is at work."""

    storage: float
    experts: float


def measure_slowdowns(file: StorageFile, config: MeasureConfig) -> Slowdowns:
    """Alone and side by side in turn; medians of the turns, as disks and machines vary within seconds."""
    hidden, width = config.expert_hidden, config.expert_width
    probe = ExpertProbe(hidden, width, _FORMAT, config.records_bytes, config.experts_each)
    x = torch.ones(1, hidden)
    engine, each = MemoryConfig(), config.beside_seconds

    def read() -> float:
        block = min(engine.stripe_bytes, file.nbytes)
        return read_rate(file.descriptor, block, file.nbytes // block, engine.readers, each)

    storage, experts = [], []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(config.beside_turns):
            reads, runs = read(), _runs_a_second(lambda: probe.run(x), lambda began: perf_counter() - began < each)
            reading: Future[float] = pool.submit(read)
            runs_beside = _runs_a_second(lambda: probe.run(x), lambda began, reading=reading: not reading.done())
            storage.append(1 - reading.result() / reads)
            experts.append(1 - runs_beside / runs)
    return Slowdowns(*(max(0.0, median(lost)) for lost in (storage, experts)))


def _runs_a_second(work: Callable[[], object], goes_on: Callable[[float], bool]) -> float:
    began, runs = perf_counter(), 0
    while goes_on(began):
        work()
        runs += 1
    return runs / (perf_counter() - began)
