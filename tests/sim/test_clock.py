"""Virtual time: what happens when, and what shares a resource."""

from __future__ import annotations

import pytest

from moespac.sim.clock import PacedClock, SharedResource, VirtualBell, VirtualClock
from moespac.sim.workers import VirtualWorkers
from moespac.timeline import Timeline


def test_the_bell_rings_when_something_happens() -> None:
    clock = VirtualClock()
    bell = VirtualBell(clock)
    heard = bell.count()
    clock.after(3.0, bell.ring)
    clock.after(5.0, bell.ring)
    bell.wait_beyond(heard)
    assert clock.now() == 3.0
    bell.wait_beyond(heard)  # has rung: no time passes
    assert clock.now() == 3.0
    bell.wait_beyond(bell.count())
    assert clock.now() == 5.0


def test_what_happens_at_once_happens_in_order_and_before_a_sleeper_wakes() -> None:
    clock, seen = VirtualClock(), []
    for name in "abc":
        clock.after(2.0, lambda name=name: seen.append(name))
    clock.sleep(2.0)
    assert seen == ["a", "b", "c"]


def test_two_share_equally_and_the_rest_goes_on_alone() -> None:
    clock = VirtualClock()
    disk = SharedResource(clock, lambda user, users: 1 / len(users))
    ends: dict[str, float] = {}

    def begin(name: str, seconds: float) -> None:
        disk.work("read", seconds, lambda: ends.__setitem__(name, clock.now()))

    begin("long", 10.0)
    clock.after(4.0, lambda: begin("short", 2.0))
    clock.sleep(100.0)
    # alone until 4 (6 s left), then both at half speed until the short one has had its 2 s at 8 (4 s left)
    assert ends == {"short": pytest.approx(8.0), "long": pytest.approx(12.0)}


def test_a_slow_pace_makes_the_world_wait() -> None:
    world = VirtualClock()
    clock, seen = PacedClock(world), {}
    clock.after(4.0, lambda: seen.setdefault("late", (world.now(), clock.now())))
    clock.after(2.0, lambda: seen.setdefault("soon", (world.now(), clock.now())))
    world.after(1.0, lambda: setattr(clock, "pace", 0.25))
    world.after(7.0, lambda: setattr(clock, "pace", 1.0))
    world.sleep(20.0)
    # 1 s, then 6 s at a quarter; so at 7 it is 2.5 there
    assert seen == {
        "soon": (pytest.approx(5.0), pytest.approx(2.0)),
        "late": (pytest.approx(8.5), pytest.approx(4.0)),
    }
    assert clock.now() == pytest.approx(15.5) and clock.pace == 1.0


def test_demands_go_first_and_a_hurried_job_is_one() -> None:
    clock = VirtualClock()
    bell, timeline = VirtualBell(clock), Timeline()
    workers = VirtualWorkers("lane", 1, clock, bell, timeline.record)

    def submit(name: str, speculative: bool):
        return workers.submit(name, lambda done: clock.after(1.0, done), speculative)

    submit("first", speculative=True)  # begins at once
    a, b, c = (submit(name, speculative=True) for name in "abc")
    submit("demand", speculative=False)
    c.hurry()
    assert b.cancel() and not b.cancel()
    clock.sleep(10.0)
    assert [(event.name, event.start) for event in timeline.events] == [
        ("first", 0.0),
        ("demand", 1.0),
        ("c", 2.0),
        ("a", 3.0),
    ]
    assert bell.count() == 4 and not a.cancel() and a.seconds == 1.0


def test_without_workers_a_job_takes_the_callers_time() -> None:
    clock = VirtualClock()
    timeline = Timeline()
    workers = VirtualWorkers("lane", 0, clock, VirtualBell(clock), timeline.record)
    for _ in range(2):
        assert workers.submit("job", lambda done: clock.after(2.0, done)).done
    assert clock.now() == 4.0
    assert [event.lane for event in timeline.events] == ["lane", "lane"]
