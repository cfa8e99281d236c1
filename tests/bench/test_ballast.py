"""The memory limit on a small scale: 64 MB locked, and freed."""

from __future__ import annotations

import psutil
import pytest

from moespac.bench.ballast import Ballast, LockedMemory
from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError

MEGABYTES = 1 << 20
CONFIG = DecodeBenchConfig(ballast_chunk=4 * MEGABYTES)


def locked() -> int:
    """Bytes locked by this process, by the kernel's books."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmLck"))


@pytest.fixture
def memory() -> LockedMemory:
    memory = LockedMemory(CONFIG)
    try:
        memory.grow(16)
    except ConfigError as error:
        memory.shrink(16)
        pytest.skip(f"memory cannot be locked here: {error}")
    return memory


def test_chunks_are_locked_and_freed(memory: LockedMemory) -> None:
    assert memory.nbytes == 64 * MEGABYTES and locked() >= 64 * MEGABYTES
    memory.shrink(10)
    assert memory.nbytes == 24 * MEGABYTES
    memory.shrink(99)
    assert memory.nbytes == 0 and locked() == 0


def test_more_is_left_by_freeing_and_less_by_locking(
    memory: LockedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a machine of 1,000 MB that nobody else uses: a real one changes while one looks."""

    class Machine:
        @property
        def available(self) -> int:
            return 1000 * MEGABYTES - memory.nbytes

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    for wanted in (900, 980, 950, 1000):
        assert wanted <= memory.leave(wanted * MEGABYTES) / MEGABYTES < wanted + 4
    with pytest.raises(ConfigError, match="only 1000 MiB of memory are available where 1100"):
        memory.leave(1100 * MEGABYTES)


def test_a_lock_that_is_refused_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mlock(self, address: object, size: object) -> int:
            return -1

    memory = LockedMemory(CONFIG)
    monkeypatch.setattr(memory, "_libc", Refusing())
    with pytest.raises(ConfigError, match="0 MiB of memory could be locked and no more"):
        memory.grow(1)


def test_the_process_says_what_is_wrong_and_goes_with_its_owner() -> None:
    with Ballast() as ballast:
        with pytest.raises(ConfigError, match="are available where"):
            ballast.leave(1 << 60)
        assert ballast.holds
    assert not ballast.holds
    with pytest.raises((ConfigError, ValueError)):
        ballast.leave(0)
