"""Layers whose experts are all in memory run in the native kernel without asking; nothing else may differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import moespac
from moespac.engine.engine import Engine
from moespac.experts.kernels.library import load_library
from moespac.trace.recorder import TraceRecorder

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")

PROMPT = "The river ran past the mill and"


def engine(host_memory: str, window: int) -> Engine:
    return moespac.load(host_memory=host_memory, window=window, profile=None, asynchronous=False)


def told(engine: Engine, peace: bool) -> Iterator[Any]:
    """What a run shows of itself; its seconds apart."""
    if not peace:
        engine.runtime.in_host_memory = lambda: None  # type: ignore[method-assign]
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
