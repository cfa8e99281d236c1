"""Baselines whose cache only uses change run in native code too: they hold what they hold when each layer asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moespac
from moespac.engine.build import DEMO
from moespac.experts.kernels.library import load_library
from moespac.experts.pack import pack
from moespac.trace.recorder import TraceRecorder

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native kernel on this machine")

PROMPT = "The river ran past the mill and"
SETTINGS: dict[str, Any] = {"window": 3, "draft": DEMO / "draft", "profile": None}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "int8"
    pack(DEMO / "target", path, "int8", progress=False)
    return path


def shown(packed: Path, policy: str, asks: bool) -> dict[str, Any]:
    """What a run shows of itself but its seconds."""
    with moespac.load(packed, policy=policy, host_memory="30%", **SETTINGS) as engine:
        runtime, asked = engine.runtime, []
        if asks:
            runtime.policy.pass_retention = lambda: None  # type: ignore[method-assign]
        place = runtime.policy.place
        runtime.policy.place = lambda layer, *a: asked.append(layer) or place(layer, *a)  # type: ignore[method-assign]
        recorder = runtime.recorder = TraceRecorder(engine.shape, "a test")
        tokens = []
        for prompt in ("It was in the year", PROMPT):  # a static set is read meanwhile
            recorder.begin_sequence()
            done = engine.generate(prompt, max_new_tokens=40)
            tokens += done.token_ids
            runtime.memory.quiesce()
        runtime.memory.check_integrity()
        assert bool(asked) == asks
        assert done.summary.hit_rate is not None and 0 < done.summary.hit_rate < 1
        return {
            "tokens": tokens,
            "routing": recorder.trace().routing.tolist(),
            "read": done.summary.bytes_read["storage"],
            "hits": done.summary.hit_rate,
            "held": runtime.memory.host.ready.tolist(),
            "values": runtime.policy.retention("host", -1).tolist(),
        }


@pytest.mark.parametrize("policy", ["lru", "lfu", "freetoken", "llama.cpp+sd"])
def test_not_asking_changes_nothing(packed: Path, policy: str) -> None:
    assert shown(packed, policy, asks=True) == shown(packed, policy, asks=False)
