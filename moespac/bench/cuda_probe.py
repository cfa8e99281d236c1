"""What a CUDA device and the way to it reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moespac.bench.compute_probe import ExpertProbe, typical_seconds
from moespac.config import MeasureConfig

_LAUNCHES = 100  # kernels queued between two synchronisations: launching them is what takes the time
_TINY = 64  # hidden size and width of an expert whose arithmetic takes no time
_SMALL_COPY = 4096  # bytes: all latency


@dataclass(frozen=True)
class CudaSpeed:
    """Bytes, bytes/s, operations/s, seconds: the accelerator's fields of a hardware profile."""

    device: str
    memory: int
    bandwidth: float  # of a matrix-vector product in bfloat16, as decoding does
    flops: float  # of a matrix product in bfloat16
    launch: float  # of one expert
    link_bandwidth: float  # from page-locked memory
    link_latency: float
    pageable_bandwidth: float  # from memory that is not page-locked


def measure_cuda(config: MeasureConfig) -> CudaSpeed | None:
    """The first CUDA device, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    latency = _finished_seconds(_copy(_SMALL_COPY), config.repeats)
    copying = _finished_seconds(_copy(config.records_bytes), config.repeats) - latency
    pageable = _finished_seconds(_copy(config.records_bytes, pinned=False), config.repeats) - latency
    return CudaSpeed(
        device=properties.name,
        memory=properties.total_memory,
        bandwidth=config.memory_bytes
        / _finished_seconds(_matrix_vector(config.memory_bytes), config.repeats),
        flops=_matrix_flops(config),
        launch=_finished_seconds(_launches(), config.repeats) / _LAUNCHES,
        link_bandwidth=config.records_bytes / copying,
        link_latency=latency,
        pageable_bandwidth=config.records_bytes / pageable,
    )


def _copy(nbytes: int, pinned: bool = True) -> Callable[[], object]:
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source, non_blocking=True)


def _matrix_vector(nbytes: int) -> Callable[[], object]:
    columns = 4096
    matrix = torch.ones(nbytes // 2 // columns, columns, dtype=torch.bfloat16, device="cuda")
    vector = torch.ones(columns, dtype=torch.bfloat16, device="cuda")
    return lambda: matrix @ vector


def _matrix_flops(config: MeasureConfig) -> float:
    size = 4096
    square = torch.ones(size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / _finished_seconds(lambda: square @ square, config.repeats)


def _launches() -> Callable[[], object]:
    probe = ExpertProbe(_TINY, _TINY, "bf16", nbytes=1, device="cuda")
    x = torch.ones(1, _TINY, dtype=torch.bfloat16, device="cuda")
    return lambda: [probe.run(x) for _ in range(_LAUNCHES)]


def _finished_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of ``repeats`` runs that the device has finished, after one that does not count."""

    def finish() -> None:
        work()
        torch.cuda.synchronize()

    return typical_seconds(finish, repeats)
