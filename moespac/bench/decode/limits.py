"""What the machine reaches in this very round: the figures that the bound is made of."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moespac.bench.compute_probe import memory_bandwidth
from moespac.bench.decode.files import ModelFiles
from moespac.bench.storage_probe import read_rate, reopen_direct
from moespac.config import DecodeBenchConfig, MeasureConfig


@dataclass(frozen=True)
class Limits:
    """Bytes/s."""

    storage: float  # random whole records from the pack, past the page cache where the file system allows
    memory: float  # read by as many threads as the contenders have


def measure_limits(files: ModelFiles, threads: int, config: DecodeBenchConfig) -> Limits:
    """Some two seconds, in which nothing else should run."""
    fd = os.open(files.records, os.O_RDONLY)
    direct_fd = reopen_direct(fd)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        storage = read_rate(
            fd if direct_fd is None else direct_fd,
            files.shape.record_bytes,
            files.shape.total,
            config.storage_depth,
            config.storage_seconds,
        )
    finally:
        os.close(fd)
        if direct_fd is not None:
            os.close(direct_fd)
    return Limits(storage, memory_bandwidth(threads, MeasureConfig(memory_bytes=config.memory_bytes)))
