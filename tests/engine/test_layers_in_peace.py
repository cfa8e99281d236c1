"""Layers whose experts are all in memory run in the native kernel without asking; nothing else may differ."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moespac
from moespac.engine.build import DEMO
from moespac.engine.engine import Engine
from moespac.errors import CheckpointError
from moespac.experts.kernels.library import load_library
from moespac.experts.pack import pack
from moespac.trace.recorder import TraceRecorder

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")

PROMPT = "The river ran past the mill and"


def engine(host_memory: str, window: int) -> Engine:
    return moespac.load(host_memory=host_memory, window=window, profile=None, asynchronous=False)


def told(engine: Engine, peace: bool) -> Iterator[Any]:
    """What a run shows of itself; its seconds apart."""
    if not peace:
        engine.runtime.in_host_memory = lambda order: None  # type: ignore[method-assign]
    recorder = engine.runtime.recorder = TraceRecorder(engine.shape, "a test")
    recorder.begin_sequence()
    done = engine.generate(PROMPT, max_new_tokens=32)
    trace = recorder.trace()
    summary = done.summary
    yield done.token_ids
    yield trace.routing.tolist()
    yield np.asarray(trace.weights, dtype=np.float32).tolist()
    yield (summary.hit_rate, summary.passes, summary.bytes_read, summary.acceptance_rate)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("host_memory", ["100%", "40%"])
def test_asking_changes_nothing(host_memory: str, window: int) -> None:
    with engine(host_memory, window) as asked, engine(host_memory, window) as in_peace:
        assert list(told(in_peace, peace=True)) == list(told(asked, peace=False))


def test_with_everything_in_memory_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine("100%", 0) as everything:
        for _ in range(6):
            everything.generate(PROMPT, max_new_tokens=32)
        assert everything.runtime.memory.all_at_hand
        monkeypatch.setattr(everything.runtime, "forward", _unexpected)
        for module in everything.model.modules():
            if hasattr(module, "attach"):
                module.attach(0, everything.runtime)
        summary = everything.generate(PROMPT[:4], max_new_tokens=8).summary
    assert summary.hit_rate == 1.0
    spent = {cause: seconds for cause, seconds in summary.seconds.items() if cause != "total"}
    assert sum(spent.values()) == pytest.approx(summary.seconds["total"], abs=1e-4)
    assert spent["host_experts"] > 0


def test_a_missing_expert_is_asked_for() -> None:
    with engine("40%", 0) as some:
        asked = []
        forward = some.runtime.forward
        some.runtime.forward = lambda *a: asked.append(a[0]) or forward(*a)  # type: ignore[method-assign]
        for layer, module in enumerate(m for m in some.model.modules() if hasattr(m, "attach")):
            module.attach(layer, some.runtime)
        summary = some.generate(PROMPT, max_new_tokens=24).summary
        layers = some.shape.layers * summary.passes
    assert 0 < len(asked) < layers, "some layers find everything, some do not"


def _unexpected(*_: Any) -> None:
    raise AssertionError("no layer has anything to ask")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "int8"
    pack(DEMO / "target", path, "int8", progress=False)
    return path


def test_a_pass_reads_what_it_misses_without_asking(packed: Path) -> None:
    """The library reads, makes room and waits by itself; tokens and routing are those of the twin in Python."""
    settings: Any = {"host_memory": "30%", "window": 3, "draft": DEMO / "draft", "profile": None}
    shown = []
    for asynchronous in (False, True):
        with moespac.load(packed, asynchronous=asynchronous, **settings) as some:
            if asynchronous:
                some.runtime.forward = _unexpected  # type: ignore[method-assign]
                for layer, module in enumerate(m for m in some.model.modules() if hasattr(m, "attach")):
                    module.attach(layer, some.runtime)
            recorder = some.runtime.recorder = TraceRecorder(some.shape, "a test")
            recorder.begin_sequence()
            done = some.generate(PROMPT, max_new_tokens=48)
            some.runtime.memory.quiesce()
            some.runtime.memory.check_integrity()
            assert not some.runtime.memory.host._pins.any()
            assert done.summary.bytes_read["storage"] > 0 and 0 < done.summary.hit_rate < 1
            spent = {cause: seconds for cause, seconds in done.summary.seconds.items() if cause != "total"}
            assert sum(spent.values()) == pytest.approx(done.summary.seconds["total"], abs=1e-4)
            shown.append((done.token_ids, recorder.trace().routing.tolist()))
    assert shown[0] == shown[1]


def test_a_record_that_is_corrupt_is_said_in_one_line(packed: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(packed, tmp_path / "damaged")
    (records,) = damaged.glob("experts-*.bin")
    content = records.read_bytes()
    records.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    with moespac.load(damaged, host_memory="30%", window=0, profile=None) as some:
        with pytest.raises(CheckpointError, match="is corrupt; pack again"):
            some.generate(PROMPT, max_new_tokens=8)
        some.runtime.memory.check_integrity()
        assert not some.runtime.memory.host._pins.any()


def test_a_timeline_shows_waits_and_reads_of_a_native_pass(packed: Path) -> None:
    spans: list[tuple[str, str]] = []
    with moespac.load(packed, host_memory="30%", window=0, profile=None) as some:
        some.record_timeline(lambda lane, name, start, seconds: spans.append((lane, name)))
        some.generate(PROMPT, max_new_tokens=12)
        some.runtime.memory.quiesce()
    lanes = {lane for lane, _ in spans}
    assert any(lane.startswith("storage") for lane in lanes), lanes
    assert "wait_for_experts" in {name for _, name in spans}
