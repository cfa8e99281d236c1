"""How much host memory can be page-locked is found by trying, and said once."""

from __future__ import annotations

import logging

import pytest
import torch

from moespac.experts.cuda.page_lock import PageLock
from moespac.experts.movers import host_arena
from tests.experts.fake_cuda import PAGE, FakeRegistrar


@pytest.mark.parametrize("slots", [1, 2, 7, 100])
@pytest.mark.parametrize("limit", [0, 1, PAGE - 1, PAGE, 5 * PAGE + 1, 37 * PAGE, 99 * PAGE, 1 << 40])
def test_as_many_whole_slots_as_the_system_allows(slots: int, limit: int, caplog) -> None:
    registrar, arena = FakeRegistrar(limit), host_arena(slots, PAGE)
    with caplog.at_level(logging.INFO, logger="moespac"):
        lock = PageLock(arena, registrar)
        lock.report()
    expected = min(slots, limit // PAGE)
    assert lock.share == expected / slots
    assert [lock.covers(arena[slot]) for slot in range(slots)] == [slot < expected for slot in range(slots)]
    assert registrar.calls <= 16, "halving, not slot by slot"
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == ("INFO" if expected == slots else "WARNING")
    assert len(lock.staging(2)) == (0 if expected == slots else 2)
    lock.close()
    assert not registrar.locked and not lock.covers(arena[0])


def test_memory_elsewhere_is_not_covered() -> None:
    lock = PageLock(host_arena(4, PAGE), FakeRegistrar(1 << 40))
    assert not lock.covers(torch.empty(PAGE, dtype=torch.uint8))


def test_no_buffer_either() -> None:
    lock = PageLock(host_arena(4, PAGE), FakeRegistrar(0, buffers=1))
    assert len(lock.staging(2)) == 1
    assert lock.staging(2) == []
