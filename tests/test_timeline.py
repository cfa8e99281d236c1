"""Who did what when: the file, and that the engine tells the truth."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import moespac
from moespac.cli import app
from moespac.schedule.stats import PassClock
from moespac.timeline import Event, Tape, Timeline

PROMPT = "It was a dark and stormy night"
DECIDING = ("draft", "trunk", "host experts", "decide", "wait")  # lanes of the one deciding thread


def test_a_timeline_is_a_chrome_trace() -> None:
    timeline = Timeline()
    timeline.record("storage 10", "0.3", 1.5, 0.25)
    timeline.record("storage 2", "0.1", 1.0, 1.0)
    timeline.record("trunk", "layer 0", 0.0, 2.0)
    names, order, events = {}, {}, []
    for entry in timeline.to_chrome()["traceEvents"]:
        if entry["name"] == "thread_name":
            names[entry["tid"]] = entry["args"]["name"]
        elif entry["name"] == "thread_sort_index":
            order[entry["tid"]] = entry["args"]["sort_index"]
        else:
            events.append((names[entry["tid"]], entry["name"], entry["ts"], entry["dur"]))
    assert events == [
        ("storage 10", "0.3", 1.5e6, 0.25e6),
        ("storage 2", "0.1", 1e6, 1e6),
        ("trunk", "layer 0", 0.0, 2e6),
    ]
    assert [names[thread] for thread in sorted(order, key=order.__getitem__)] == [
        "trunk",
        "storage 2",
        "storage 10",
    ]


def test_a_bounded_timeline_keeps_the_last_events_while_others_write() -> None:
    timeline = Timeline(most=100)

    def write(lane: str) -> None:
        for i in range(2000):
            timeline.record(lane, str(i), float(i), 1.0)

    threads = [threading.Thread(target=write, args=[lane]) for lane in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(timeline.events) <= 100
    assert len(timeline.events) == 100
    assert {event.name for event in timeline.events} >= {"1999"}


def test_a_block_inside_another_cuts_it_in_two() -> None:
    now = iter([1.0, 3.0, 4.0, 9.0])
    timeline = Timeline()
    clock = PassClock(lambda: next(now), tape=Tape(timeline.record))
    with clock.measure("trunk"), pytest.raises(RuntimeError), clock.measure("host_experts", "0.7"):
        raise RuntimeError
    assert timeline.events == [
        Event("trunk", "trunk", 1.0, 2.0),
        Event("host experts", "0.7", 3.0, 1.0),
        Event("trunk", "trunk", 4.0, 5.0),
    ]
    assert clock.seconds == {"trunk": 7.0, "host_experts": 1.0}


@pytest.mark.parametrize(
    "settings",
    [{"host_memory": "25%"}, {"host_memory": "50%", "accelerator_memory": "20%"}],
    ids=["host", "accelerator"],
)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_engine_tells_everything_once(settings: dict, asynchronous: bool) -> None:
    timeline = Timeline()
    with moespac.load(profile=None, asynchronous=asynchronous, **settings) as engine:
        engine.record_timeline(timeline.record)
        summary = engine.generate(PROMPT, max_new_tokens=24).summary
        engine.record_timeline(None)
        told = len(timeline.events)
        engine.generate(PROMPT, max_new_tokens=2)
        assert len(timeline.events) == told  # switched off
    events = timeline.events
    _assert_lanes_never_overlap(events)

    prefill, decode = (event for event in events if event.lane == "request")
    assert (prefill.name, decode.name) == ("prefill", "decode")
    seconds = summary.seconds
    assert prefill.duration == pytest.approx(seconds["prefill"], abs=1e-5)
    assert prefill.duration + decode.duration == pytest.approx(seconds["total"], abs=1e-5)

    decoding = [event for event in events if event.start >= decode.start and event is not decode]
    of_lanes: dict[str, float] = defaultdict(float)
    for event in decoding:
        of_lanes[event.lane] += event.duration
    expected = {
        "draft": seconds["draft"],
        "trunk": seconds["trunk"],
        "host experts": seconds["host_experts"],
        "decide": seconds["decide"] + seconds["verify"],
        "wait": seconds.get("wait_for_experts", 0.0) + seconds.get("wait_for_accelerator", 0.0),
        "accelerator experts": seconds.get("accelerator_experts", 0.0),
    }
    for lane, spent in expected.items():
        assert of_lanes[lane] == pytest.approx(spent, abs=1e-5), lane

    covered = sum(of_lanes[lane] for lane in DECIDING)  # they take turns, so nothing is counted twice
    _assert_lanes_never_overlap(
        [event._replace(lane="one thread") for event in decoding if event.lane in DECIDING]
    )
    assert covered + seconds["other"] == pytest.approx(decode.duration, abs=1e-4)
    assert covered > 0.8 * decode.duration

    moved = {lane: sum(event.lane.split()[0] == lane for event in decoding) for lane in ("storage", "link")}
    record = engine.shape.record_bytes
    for (
        lane,
        nbytes,
    ) in summary.bytes_read.items():  # of the prefill too, and the last prefetch may not be over
        total = sum(event.lane.split()[0] == lane for event in events)
        assert 0 <= total - nbytes // record <= 16 and (moved[lane] > 0) == (nbytes > 0)


def _assert_lanes_never_overlap(events: list[Event]) -> None:
    ends: dict[str, float] = {}
    for event in sorted(events, key=lambda event: event.start):
        assert event.start >= ends.get(event.lane, 0.0) - 1e-9, event
        ends[event.lane] = event.start + event.duration


def test_the_command_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    run = CliRunner().invoke(
        app,
        [
            "generate",
            "--host-memory",
            "25%",
            "--max-new-tokens",
            "8",
            "--timeline",
            str(file),
            "--no-profile",
        ],
    )
    assert run.exit_code == 0, run.output
    events = [SimpleNamespace(**event) for event in json.loads(file.read_text())["traceEvents"]]
    lanes = {event.args["name"] for event in events if event.name == "thread_name"}
    assert {"request", "draft", "trunk", "host experts", "decide", "storage 1"} <= lanes
    refused = CliRunner().invoke(app, ["generate", "--timeline", str(tmp_path)])
    assert refused.exit_code == 2 and "--timeline" in refused.output
