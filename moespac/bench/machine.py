"""MEASURE this machine: a hardware profile for the simulator, from what the engine's own parts reach here.

Others may be using the machine too: times are lower quartiles of several, rates are sustained ones.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import moespac
from moespac.bench.beside_probe import Slowdowns, measure_slowdowns
from moespac.bench.compute_probe import (
    expert_overhead,
    host_expert_seconds,
    memory_bandwidth,
)
from moespac.bench.cuda_probe import CudaSpeed, measure_cuda
from moespac.bench.overhead_probe import Overheads, measure_overheads
from moespac.bench.storage_probe import StorageSpeed, fit_storage, measure_file, storage_file
from moespac.config import MeasureConfig
from moespac.experts.format import PACK_FORMATS
from moespac.sim.hardware import Curve, HardwareProfile

_NOT_SIMULATED = ("device", "pageable_bandwidth")  # of what a card is measured for


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured: bytes/s and seconds."""

    memory: dict[int, float]  # read bandwidth by threads
    storage: StorageSpeed
    experts: dict[str, dict[int, float]]  # one expert on the host, by record format and tokens
    expert_overhead: float  # of an expert whose arithmetic takes no time
    overheads: Overheads
    slowdowns: Slowdowns
    cuda: CudaSpeed | None


def measure_machine(
    directory: Path, config: MeasureConfig, progress: Callable[[int, int], None]
) -> Measurement:
    """Measure memory, storage, experts, a layer, and a GPU if there is one.

    Storage is read from temporary files in ``directory``. ``progress`` is told how many of how many parts are
    done. Raises ConfigError when ``directory`` cannot take the file.
    """
    parts = len(config.block_bytes) * len(config.depths) + 1 + 1 + (config.repeats + 1) + 2
    advance = _counter(parts, progress)
    with storage_file(directory, config) as file:  # first: the one part that can be refused
        storage, slowdowns = measure_file(file, config, advance), measure_slowdowns(file, config)
    advance()
    memory = {n: memory_bandwidth(n, config) for n in sorted({1, len(os.sched_getaffinity(0))})}
    advance()
    experts = host_expert_seconds(PACK_FORMATS, config, advance)
    overheads = measure_overheads(directory, max(memory.values()), config)
    advance()
    cuda = measure_cuda(config)
    advance()
    return Measurement(memory, storage, experts, expert_overhead(config), overheads, slowdowns, cuda)


def to_profile(name: str, measured: Measurement, config: MeasureConfig) -> HardwareProfile:
    """What the simulator takes from a measurement that was made with ``config``."""
    storage = fit_storage(measured.storage.rates, config.depth_slack)
    weights = 3 * config.expert_hidden * config.expert_width
    most = max(config.expert_tokens)
    figures: dict[str, Any] = {
        "host_memory": psutil.virtual_memory().total,
        "host_bandwidth": measured.memory[max(measured.memory)],
        "host_flops": 2 * most * weights / min(seconds[most] for seconds in measured.experts.values()),
        "host_expert_overhead": measured.expert_overhead,
        **{f"{part}_overhead": value for part, value in asdict(measured.overheads).items()},
        "storage_bandwidth": storage.bandwidth,
        "storage_latency": storage.latency,
        "storage_depth": storage.depth,
        "storage_slowdown": measured.slowdowns.storage,
        "expert_slowdown": measured.slowdowns.experts,
        "host_seconds_per_weight": {
            format: _curve(seconds, measured.expert_overhead, weights)
            for format, seconds in measured.experts.items()
        },
    }
    figures |= _of_accelerator(measured.cuda)
    return HardwareProfile(name=name, **figures, sources=dict.fromkeys(figures, _source()))


def _of_accelerator(cuda: CudaSpeed | None) -> dict[str, Any]:
    """The profile's fields are called as the probe's, ``accelerator_`` before those that are not the link's."""
    if cuda is None:
        return {}
    figures = {name: value for name, value in asdict(cuda).items() if name not in _NOT_SIMULATED}
    return {
        name if name.startswith("link_") else f"accelerator_{name}": value for name, value in figures.items()
    }


def _curve(seconds: dict[int, float], overhead: float, weights: int) -> Curve:
    """Seconds per weight by tokens; more tokens are never cheaper, whatever else the machine did meanwhile."""
    rising, slowest = [], 0.0
    for tokens, spent in sorted(seconds.items()):
        slowest = max(slowest, spent - min(overhead, spent / 2))
        rising.append((tokens, slowest / weights))
    return tuple(rising)


def _source() -> str:
    return (
        f"measured on this machine, {datetime.date.today().isoformat()}; moespac {moespac.__version__},"
        f" torch {torch.__version__} with {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )


def _counter(total: int, progress: Callable[[int, int], None]) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return advance
