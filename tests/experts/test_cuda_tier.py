"""The CUDA tier over a card that is not there: what is on the streams, in which order, and when it is done."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moespac.experts.cuda.accelerator import CudaAccelerator
from moespac.experts.movers import host_arena
from moespac.experts.workers import Bell, Priority
from moespac.schedule.tiers import Move
from tests.experts.fake_cuda import PAGE, FakeDriver, FakeRegistrar, fake_cuda

SLOTS = 8


class Card:
    """An accelerator over a fake, with a host arena whose slots are all different."""

    def __init__(self, locked: int = SLOTS, buffers: int = 99, asynchronous: bool = True) -> None:
        self.driver = FakeDriver()
        self.bell = Bell()
        self.host = host_arena(SLOTS, PAGE)
        self.host.copy_(torch.arange(1, SLOTS + 1, dtype=torch.uint8)[:, None].expand(SLOTS, PAGE))
        self.registrar = FakeRegistrar(locked * PAGE, buffers)
        self.accelerator: CudaAccelerator = fake_cuda(
            self.driver, self.host, SLOTS, self.bell, asynchronous, registrar=self.registrar
        )

    def copy(self, slot: int, priority: Priority = Priority.SPECULATIVE):
        """Host slot ``slot`` into the same slot of the card."""
        return self.accelerator.copy_in(f"copy {slot}", self.host[slot], slot, priority)

    def wait(self, *tickets) -> None:
        while True:
            seen = self.bell.count()
            if all(ticket.done for ticket in tickets):
                return
            self.bell.wait_beyond(seen)

    def holds(self, slot: int) -> bool:
        return bool((self.accelerator.arena[slot] == slot + 1).all())


@pytest.fixture(params=["page-locked", "half page-locked", "staged", "pageable"])
def card(request):
    locked, buffers = {
        "page-locked": (SLOTS, 0), "half page-locked": (SLOTS // 2, 99), "staged": (0, 99), "pageable": (0, 0),
    }[request.param]  # fmt: skip
    before = threading.active_count()
    card = Card(locked, buffers)
    yield card
    card.driver.copy_stream.gate.set()
    card.accelerator.close()
    card.driver.close()
    assert threading.active_count() == before, "no thread outlives close()"
    assert not card.registrar.locked, "what was locked is unlocked"


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_a_copy_is_done_when_the_device_is(card: Card) -> None:
    card.driver.copy_stream.gate.clear()
    ticket = card.copy(3)
    until(lambda: card.driver.copy_stream.put == 1)
    time.sleep(0.02)
    assert not ticket.done and not card.holds(3)
    card.driver.copy_stream.gate.set()
    card.wait(ticket)
    assert card.holds(3) and ticket.error is None
    assert 0 < ticket.seconds < 0.02, "the device's time: waiting for it is not in it"


def test_few_copies_are_on_the_stream_and_a_demand_overtakes_the_rest(card: Card) -> None:
    card.driver.copy_stream.gate.clear()
    order: list[str] = []
    card.accelerator.link._tape.record = lambda lane, name, start, seconds: order.append(name)
    prefetches = [card.copy(slot) for slot in range(4)]
    until(lambda: card.driver.copy_stream.put == 2)
    demand = card.copy(7, Priority.DEMAND)
    prefetches[3].hurry()
    assert card.driver.copy_stream.put == 2, "one runs, one is behind it"
    assert [ticket.cancel() for ticket in prefetches] == [False, False, True, True]
    card.driver.copy_stream.gate.set()
    card.wait(*prefetches, demand)
    until(lambda: len(order) == 3)
    assert order == ["copy 0", "copy 1", "copy 7"]
    assert card.holds(7) and not card.holds(2) and not card.holds(3)


def test_a_prefetch_that_is_needed_now_goes_first(card: Card) -> None:
    card.driver.copy_stream.gate.clear()
    order: list[str] = []
    card.accelerator.link._tape.record = lambda lane, name, start, seconds: order.append(name)
    tickets = [card.copy(slot) for slot in range(5)]
    until(lambda: card.driver.copy_stream.put == 2)
    tickets[4].hurry()
    card.driver.copy_stream.gate.set()
    card.wait(*tickets)
    until(lambda: len(order) == 5)
    assert order == [f"copy {slot}" for slot in (0, 1, 4, 2, 3)]
    assert all(card.holds(slot) for slot in range(5))


def test_nothing_is_made_in_the_loop(card: Card) -> None:
    """Events and buffers are used again, however many copies and jobs there are."""
    made, buffers = card.driver.events, card.registrar.buffers
    for _ in range(20):
        jobs = [card.accelerator.compute("job", lambda: None) for _ in range(3)]
        card.wait(*[card.copy(slot) for slot in range(SLOTS)], *jobs)
    assert (card.driver.events, card.registrar.buffers) == (made, buffers)


def test_a_slot_may_be_filled_again_once_its_job_is_done(card: Card) -> None:
    """And not before: the copy waits for nothing on the device."""
    card.wait(card.copy(2))
    seen: list[int] = []
    card.driver.trunk_stream.gate.clear()
    job = card.accelerator.compute("job", lambda: seen.append(int(card.accelerator.arena[2, 0])))
    time.sleep(0.02)
    assert not job.done, "who holds the slot for the job must go on holding it"
    card.driver.trunk_stream.gate.set()
    card.wait(job)
    card.wait(card.accelerator.copy_in("other", card.host[5], 2, Priority.DEMAND))
    assert seen == [3] and int(card.accelerator.arena[2, 0]) == 6


def test_a_job_that_cannot_be_launched_ends_after_what_was_launched(card: Card) -> None:
    card.driver.trunk_stream.gate.clear()
    launched = threading.Event()

    def run(job, stream) -> None:
        stream.enqueue(launched.set)
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")

    card.driver.run = run
    ticket = card.accelerator.compute("job", lambda: None)
    time.sleep(0.02)
    assert not ticket.done, "kernels before the failure still read their slots"
    card.driver.trunk_stream.gate.set()
    card.wait(ticket)
    assert launched.is_set() and isinstance(ticket.error, torch.OutOfMemoryError)


def test_a_device_that_fails_says_so(card: Card) -> None:
    def job() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ticket = card.accelerator.compute("job", job)
    card.wait(ticket)
    assert "illegal memory access" in str(ticket.error)


def test_closing_cancels_what_waits(card: Card) -> None:
    card.driver.copy_stream.gate.clear()
    tickets = [card.copy(slot) for slot in range(5)]
    until(lambda: card.driver.copy_stream.put == 2)
    closing = threading.Thread(target=card.accelerator.link.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive(), "what is on the stream reads host memory"
    card.driver.copy_stream.gate.set()
    closing.join()
    assert all(ticket.done for ticket in tickets)
    assert [ticket.seconds > 0 for ticket in tickets] == [True, True, False, False, False]


def test_shrinking_moves_what_stays(card: Card) -> None:
    card.wait(*[card.copy(slot) for slot in range(SLOTS)])
    card.accelerator.shrink(4, [Move(6, 1)])
    assert card.accelerator.arena.shape == (4, PAGE)
    assert card.accelerator.arena[:, 0].tolist() == [1, 7, 3, 4]
    card.wait(card.accelerator.copy_in("again", card.host[7], 3, Priority.DEMAND))
    assert card.accelerator.arena[:, 0].tolist() == [1, 7, 3, 8]


@pytest.mark.parametrize("locked", [0, 3, SLOTS])
def test_the_synchronous_twin(locked: int) -> None:
    card = Card(locked, asynchronous=False)
    for slot in range(SLOTS):
        ticket = card.copy(slot)
        assert ticket.done and card.holds(slot) and ticket.seconds > 0
    assert card.accelerator.compute("job", lambda: None).done
    card.accelerator.close()
    card.driver.close()
