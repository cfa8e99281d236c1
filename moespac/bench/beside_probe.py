"""What experts on the host and reads from storage cost each other: they share memory and cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    probe = ExpertProbe(
        config.expert_hidden, config.expert_width, _FORMAT, config.records_bytes, config.experts_each
    )
    x = torch.ones(1, config.expert_hidden)
    storage, experts = [], []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(config.beside_turns):
            reads = _read(file, config.beside_seconds)
            runs = _runs_a_second(probe, x, _past(perf_counter() + config.beside_seconds))
            reading = pool.submit(_read, file, config.beside_seconds)
            experts.append(1 - _runs_a_second(probe, x, reading.done) / runs)
            storage.append(1 - reading.result() / reads)
    return Slowdowns(*(max(0.0, median(lost)) for lost in (storage, experts)))


def _read(file: StorageFile, seconds: float) -> float:
    """Bytes/s, as the engine reads."""
    engine = MemoryConfig()
    block = min(engine.stripe_bytes, file.nbytes)
    return read_rate(file.descriptor, block, file.nbytes // block, engine.readers, seconds)


def _past(moment: float) -> Callable[[], bool]:
    return lambda: perf_counter() > moment


def _runs_a_second(probe: ExpertProbe, x: torch.Tensor, is_over: Callable[[], bool]) -> float:
    began, runs = perf_counter(), 0
    while not is_over() or not runs:
        probe.run(x)
        runs += 1
    return runs / (perf_counter() - began)
