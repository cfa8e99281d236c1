"""Reads in stripes, against times told by hand and against a disk that is asked for one stripe after the other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from moespac.config import MemoryConfig
from moespac.sim.clock import PacedClock, VirtualBell, VirtualClock
from moespac.sim.reads import StripedRead, StripedReads
from moespac.timeline import Timeline
from tests.sim.small import MACHINE

STRIPE = 50  # bytes: 1 s
CONFIG = MemoryConfig(readers=4, stripe_bytes=STRIPE, stripes_ahead=2)
DISK = replace(MACHINE, storage_latency=0.0)  # 50 bytes a second
NEVER = float("inf")


class Disk:
    """Reads of records of 4 stripes, what they are asked told in advance."""

    def __init__(self, record_bytes: int = 4 * STRIPE, latency: float = 0.0, config: MemoryConfig = CONFIG):
        self.clock, self.timeline = VirtualClock(), Timeline()
        self.time = PacedClock(self.clock)
        self.turns: list[tuple[float, bool]] = []  # of the disk: when, and whether to work
        self.bell = VirtualBell(self.clock)
        hardware = replace(DISK, storage_latency=latency)
        self.reads = StripedReads(
            hardware, record_bytes, 100, config, self.time, self.bell, self.timeline.record, self._turn
        )
        self.tickets: dict[int, StripedRead] = {}

    def _turn(self, works: bool) -> None:
        if works != (bool(self.turns) and self.turns[-1][1]):
            self.turns.append((round(self.clock.now(), 6), works))

    def ask(self, expert: int, at: float, speculative: bool = False) -> None:
        def begin() -> None:
            self.tickets[expert] = self.reads.move(expert, 0, None, speculative)

        self.clock.after(at, begin)

    def hurry(self, expert: int, at: float) -> None:
        """Once, as ``ExpertMemory`` does."""
        self.clock.after(at, lambda: self.tickets[expert].hurry())

    def ends(self) -> dict[int, float]:
        self.clock.sleep(1000.0)
        return {int(e.name.split(".")[1]): round(e.start + e.duration, 6) for e in self.timeline.events}


def test_a_read_alone_has_the_latency_once() -> None:
    disk = Disk(latency=0.25)
    disk.ask(1, 0.0)
    assert disk.ends() == {1: 4.25}
    assert disk.tickets[1].seconds == 4.25 and disk.bell.count() == 1


def test_a_latency_longer_than_the_stripes_beside_it_keeps_the_disk_waiting() -> None:
    disk = Disk(latency=3.0)
    disk.ask(1, 0.0, speculative=True)  # two stripes in 4 s, again and again
    assert disk.ends() == {1: 3.0 + 3 * 2.0 + 1.0}


def test_records_come_one_after_the_other() -> None:
    disk = Disk()
    for expert in (1, 2, 3):
        disk.ask(expert, 0.0)
    assert disk.ends() == {1: 4.0, 2: 8.0, 3: 12.0}
    assert disk.turns == [(0.0, True), (12.0, False)]
    assert [disk.tickets[n].seconds for n in (1, 2, 3)] == [4.0, 4.0, 4.0]
    # Another is begun when only three stripes of the one before are left: it has a lane of its own by then.
    assert [(e.lane, e.start) for e in disk.timeline.events] == [
        ("storage 1", 0.0),
        ("storage 2", 1.0),
        ("storage 1", 5.0),
    ]


def test_a_demand_overtakes_a_prefetch_that_has_begun() -> None:
    disk = Disk()
    disk.ask(1, 0.0, speculative=True)
    disk.ask(2, 1.2)  # the first stripe is over, the second and third are under way
    assert disk.ends() == {2: 7.0, 1: 8.0}
    assert disk.tickets[2].seconds == pytest.approx(7.0 - 1.2)
    assert disk.tickets[1].seconds == pytest.approx(1.0)  # since the other was complete


@pytest.mark.parametrize(
    ("at", "ends"),
    [
        # The second demand comes before there is a reader for the prefetch's last stripe ...
        (3.9, {2: 7.0, 3: 11.0, 1: 12.0}),
        # ... and after that: the last three stripes of the first demand left it one at 4 s.
        (4.1, {2: 7.0, 1: 8.0, 3: 12.0}),
    ],
)
def test_a_reader_that_is_free_takes_up_what_was_overtaken(at: float, ends: dict[int, float]) -> None:
    disk = Disk()
    disk.ask(1, 0.0, speculative=True)
    disk.ask(2, 1.2)
    disk.ask(3, at)
    assert disk.ends() == ends


def test_demands_in_the_order_in_which_they_came_to_be() -> None:
    disk = Disk()
    disk.ask(1, 0.0, speculative=True)
    disk.ask(2, 0.0, speculative=True)
    disk.ask(3, 0.5)
    disk.hurry(2, 0.6)
    disk.ask(4, 0.7)
    # Two stripes of the first are under way, and go on; its others come last.
    assert disk.ends() == {3: 6.0, 2: 10.0, 4: 14.0, 1: 16.0}


def test_a_prefetch_is_hurried_on_its_way() -> None:
    disk = Disk()
    disk.ask(1, 0.0, speculative=True)
    disk.ask(2, 0.0, speculative=True)
    disk.ask(3, 0.0, speculative=True)
    disk.hurry(1, 0.5)
    disk.hurry(3, 0.5)
    assert disk.ends() == {1: 4.0, 3: 8.0, 2: 12.0}


def test_only_what_nobody_has_begun_is_taken_back() -> None:
    disk = Disk()
    for expert in (1, 2, 3):
        disk.ask(expert, 0.0, speculative=True)
    disk.clock.sleep(2.9)  # the last two stripes of the first are under way
    assert not disk.tickets[1].cancel()
    assert disk.tickets[2].cancel() and not disk.tickets[2].cancel()
    disk.clock.sleep(0.2)  # a reader is free, and takes the next
    assert not disk.tickets[3].cancel()
    assert disk.ends() == {1: 4.0, 3: 8.0}
    assert not disk.tickets[1].cancel()


@dataclass(eq=False)
class Plain:
    """One read, as csrc/reads.c has it."""

    expert: int
    speculative: bool
    turn: int
    begun: int = 0
    over: int = 0


@dataclass
class StripeByStripe:
    """What csrc/reads.c does, told without any shortcut: events in order of time, ``ends`` of what was asked."""

    stripes: list[float]  # seconds of each of a record
    latency: float
    asked: list[tuple[float, int, str]]  # when, which expert, "read", "prefetch" or "hurry"
    ends: dict[int, float] = field(default_factory=dict)

    def run(self) -> dict[int, float]:
        reads: dict[int, Plain] = {}
        turns, free_at = itertools.count(), 0.0
        flying: list[tuple[float, Plain, bool]] = []  # in the order of their ends
        asked = sorted(self.asked)
        while asked or flying:
            now = min(asked[0][0] if asked else NEVER, flying[0][0] if flying else NEVER)
            if flying and flying[0][0] == now:
                _, read, _ = flying.pop(0)
                read.over += 1
                if read.over == len(self.stripes):
                    self.ends[read.expert] = round(now, 6)
            else:
                _, expert, what = asked.pop(0)
                if what == "hurry":
                    if reads[expert].over < len(self.stripes) and reads[expert].speculative:
                        reads[expert].speculative, reads[expert].turn = False, next(turns)
                else:
                    reads[expert] = Plain(expert, what == "prefetch", next(turns))
            while len(flying) < CONFIG.readers:
                ahead = sum(speculative for _, _, speculative in flying)
                able = [
                    read
                    for read in reads.values()
                    if read.begun < len(self.stripes)
                    and not (read.speculative and ahead >= CONFIG.stripes_ahead)
                ]
                if not able:
                    break
                read = min(able, key=lambda read: (read.speculative, read.turn))
                free_at = max(now + self.latency, free_at) + self.stripes[read.begun]
                read.begun += 1
                flying.append((free_at, read, read.speculative))
        return self.ends


@pytest.mark.parametrize("last", [7, STRIPE])
@pytest.mark.parametrize("stripes", [1, 2, 3, 11])
@pytest.mark.parametrize("latency", [0.0, 0.13])
def test_shortcuts_change_nothing(stripes: int, last: int, latency: float) -> None:
    record = (stripes - 1) * STRIPE + last
    seconds = [1.0] * (stripes - 1) + [last / STRIPE]
    rng = np.random.default_rng([stripes, last])
    orders = set()
    for _ in range(40):
        asked: list[tuple[float, int, str]] = []
        for expert in range(12):
            at = rng.uniform(0, 8 * sum(seconds))
            what = str(rng.choice(["read", "prefetch"], p=[0.4, 0.6]))
            asked.append((at, expert, what))
            if what == "prefetch" and rng.random() < 0.5:
                asked.append((at + rng.uniform(0, 3 * sum(seconds)), expert, "hurry"))
        disk = Disk(record, latency)
        for at, expert, what in asked:
            if what == "hurry":
                disk.hurry(expert, at)
            else:
                disk.ask(expert, at, what == "prefetch")
        ends = disk.ends()
        assert ends == pytest.approx(StripeByStripe(seconds, latency, asked).run(), abs=1e-6)
        assert len(ends) == 12
        orders.add(tuple(sorted(ends, key=ends.__getitem__)))
    assert len(orders) > 20


def test_a_busy_disk_gives_its_whole_bandwidth() -> None:
    disk = Disk(latency=0.13)
    rng = np.random.default_rng(1)
    for expert in range(20):
        disk.ask(expert, rng.uniform(0, 10.0), speculative=bool(expert % 2))
    first = min(event.start for event in disk.timeline.events) if disk.ends() else NEVER
    assert max(disk.ends().values()) == pytest.approx(first + 0.13 + 20 * 4.0)
