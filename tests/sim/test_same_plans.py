"""One event loop, two worlds: what the engine recorded makes the simulator decide the same, call for call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest

import moespac
from moespac.engine.build import DEMO
from moespac.engine.engine import Engine
from moespac.policy.base import Policy
from moespac.policy.registry import make_policy
from moespac.sim import simulator
from moespac.sim.hardware import find_profile
from moespac.sim.shapes import read_model
from moespac.sim.simulator import Setting
from moespac.trace import Trace, TraceRecorder
from tests.costs import keep_costs

PROMPTS = ("The sea was the sea was", "once upon a time, once upon a")
Log = list[tuple[str, list[np.ndarray]]]


@pytest.fixture(autouse=True)
def _costs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans follow from what is measured, which differs between the worlds."""
    keep_costs(monkeypatch)


def logged(policy: Policy) -> Log:
    """Everything that ``policy`` decides from now on."""
    log: Log = []

    def wrap(name: str) -> None:
        decide = getattr(policy, name)

        def call(*arguments: Any) -> Any:
            decision = decide(*arguments)
            log.append((name, list(_arrays(astuple(decision)))))
            return decision

        setattr(policy, name, call)

    wrap("plan")
    wrap("place")
    return log


def _arrays(parts: tuple) -> Iterator[np.ndarray]:
    for part in parts:
        yield from _arrays(part) if isinstance(part, tuple) else (part.copy(),)


def recorded(engine: Engine) -> Trace:
    recorder = engine.runtime.recorder = TraceRecorder(engine.shape, "a test")
    for prompt in PROMPTS:
        recorder.begin_sequence()
        engine.generate(prompt, max_new_tokens=24)
    return recorder.trace()


@pytest.mark.parametrize("policy", ["moe-spac", "lru", "hybrimoe"])
@pytest.mark.parametrize("draft", ["auto", "lookup", "none"])
@pytest.mark.parametrize("accelerator", ["none", "10%"])
def test_the_simulator_decides_as_the_engine_did(policy: str, draft: str, accelerator: str) -> None:
    memory = {"host_memory": "30%", "accelerator_memory": accelerator}
    with moespac.load(
        draft=draft, policy=policy, window=4, profile=None, asynchronous=False, **memory
    ) as engine:
        in_engine = logged(engine.runtime.policy)
        trace = recorded(engine)
        residency = engine.runtime.memory.residency
        setting = Setting(
            find_profile("rtx4090-pcie4"),
            replace(read_model(DEMO / "target", "f32"), expert_bytes=engine.shape.record_bytes),
            residency.capacity,
            window=0 if draft == "none" else 4,
            governed=frozenset(),
            draft="lookup" if draft == "lookup" else "model",
            draft_seconds=1e-3,
            warm=False,
            engine=engine.config,
        )
        decider = make_policy(policy, engine.shape, residency.capacity, engine.config.method)
        # The engine drafts for every policy; the simulator knows which systems do not.
        decider.speculates = True  # type: ignore[misc]
        in_simulator = logged(decider)
        simulator.run(decider, trace, setting, range(trace.sequences))

    assert len(in_engine) > 100
    assert len(in_simulator) == len(in_engine)
    for call, (here, there) in enumerate(zip(in_simulator, in_engine, strict=True)):
        assert here[0] == there[0], call
        for mine, own in zip(here[1], there[1], strict=True):
            np.testing.assert_array_equal(mine, own, err_msg=f"{here[0]}, call {call}")
