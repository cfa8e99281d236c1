"""How fast a directory's disk reads whole records from random places, by size and reads in flight."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from moespac.atomic import write_all
from moespac.config import MeasureConfig
from moespac.errors import ConfigError
from moespac.experts.movers import host_arena

_FILL = 16 << 20  # bytes written at once
_ARENA = 64 << 20  # bytes that are read into: one of a few MiB is hardly in huge pages, of 2 MiB and aligned


@dataclass(frozen=True)
class StorageSpeed:
    """Read bandwidth, bytes/s, by (block bytes, reads in flight)."""

    rates: dict[tuple[int, int], float]
    direct: bool  # past the page cache; False where the file system refuses, and figures may be the cache's


@dataclass(frozen=True)
class StorageModel:
    """The three figures of a hardware profile."""

    bandwidth: float
    latency: float
    depth: int


@dataclass(frozen=True)
class StorageFile:
    """A temporary file to read. It has no name: whatever happens to this process, nothing stays."""

    descriptor: int
    nbytes: int
    direct: bool  # as in ``StorageSpeed``


@contextmanager
def storage_file(directory: Path, config: MeasureConfig) -> Iterator[StorageFile]:
    """In ``directory``. Raises ConfigError when that cannot take it, or when it cannot be read."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            fd = file.fileno()
            _fill(fd, config.storage_bytes)
            direct_fd = reopen_direct(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            descriptor, direct = (fd, False) if direct_fd is None else (direct_fd, True)
            try:
                yield StorageFile(descriptor, config.storage_bytes, direct)
            finally:
                if direct_fd is not None:
                    os.close(direct_fd)
    except OSError as error:
        raise ConfigError(
            f"--directory {directory}: cannot hold {config.storage_bytes >> 20} MiB to read ({error.strerror});"
            " name another place"
        ) from None


def measure_storage(directory: Path, config: MeasureConfig, advance: Callable[[], None]) -> StorageSpeed:
    """Of a temporary file in ``directory``: see ``storage_file`` and ``measure_file``."""
    with storage_file(directory, config) as file:
        return measure_file(file, config, advance)


def measure_file(file: StorageFile, config: MeasureConfig, advance: Callable[[], None]) -> StorageSpeed:
    """Random reads of all block sizes and depths; ``advance`` is called after each of these measurements."""
    rates = {}
    for block in config.block_bytes:
        for depth in config.depths:
            blocks = file.nbytes // block
            rates[block, depth] = read_rate(file.descriptor, block, blocks, depth, config.storage_seconds)
            advance()
    return StorageSpeed(rates, file.direct)


def fit_storage(rates: dict[tuple[int, int], float], slack: float) -> StorageModel:
    """Bandwidth, latency and depth that explain the measured rates (see ``StorageSpeed``).

    The depth is the least whose rate, in the median over block sizes, is within ``slack`` of the best. A single
    read takes its latency and then its bytes at the full bandwidth; so the latency follows from the rate at the
    least depth.
    """
    blocks, depths = ({key[i] for key in rates} for i in (0, 1))
    typical = {depth: median(rates[block, depth] for block in blocks) for depth in sorted(depths)}
    best = max(typical.values())
    depth = next(depth for depth, rate in typical.items() if rate * slack >= best)
    alone = min(depths)
    waits = (block * alone / rates[block, alone] - block * alone / typical[depth] for block in blocks)
    return StorageModel(typical[depth], max(0.0, median(waits)), depth)


def _fill(fd: int, nbytes: int) -> None:
    """With bytes that no disk can compress, written through to the disk."""
    rng = np.random.default_rng(0)
    for at in range(0, nbytes, _FILL):
        write_all(fd, rng.bytes(min(_FILL, nbytes - at)))
    os.fsync(fd)


def reopen_direct(fd: int) -> int | None:
    """The same file past the page cache, or None where its file system refuses."""
    try:
        direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # some file systems refuse at the first read only
            os.preadv(direct_fd, [page], 0)
    except OSError:
        os.close(direct_fd)
        return None
    return direct_fd


def read_rate(fd: int, block: int, blocks: int, depth: int, seconds: float) -> float:
    """Bytes/s of ``depth`` threads that read random ones of a file's first ``blocks`` for so many seconds."""
    # As the engine reads: into an arena that stays, in huge pages. Into small ones a disk gives a third as much.
    turns = max(1, _ARENA // (block * depth))
    arena = host_arena(turns * depth, block).numpy()
    arena[:] = 0  # a page is made when it is first written: not in the time that counts

    def read(thread: int) -> int:
        places = np.random.default_rng([block, depth, thread])
        done = 0
        for slot in itertools.cycle(range(thread, turns * depth, depth)):
            if time.perf_counter() >= deadline:
                break
            done += os.preadv(fd, [arena[slot]], int(places.integers(blocks)) * block)
        return done

    start = time.perf_counter()
    deadline = start + seconds
    with ThreadPoolExecutor(depth) as pool:
        done = sum(pool.map(read, range(depth)))
    return done / (time.perf_counter() - start)
