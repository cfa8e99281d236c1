"""An engine whose layers are dispatched natively, and one whose layers Python and the event loop dispatch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moespac
from moespac.experts import groups
from moespac.experts.kernels.library import load_library
from moespac.policy import cost
from moespac.policy import native as policy_native
from moespac.schedule import at_hand, tiers
from moespac.schedule.at_hand import AtHand, Taken
from moespac.types import Observation
from tests.costs import keep_costs
from tests.families import save_checkpoint
from tests.schedule.test_at_hand import InTheLoop

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native code on this machine")


def run(path: Path, policy: str, drafts: int) -> tuple:
    """What came out, what the policy saw, what was found where, what moved."""
    seen: list[Observation] = []
    settings = {"draft": "lookup", "window": drafts, "profile": None, "policy": policy, "asynchronous": False}
    with moespac.load(path, host_memory="70%", accelerator_memory="40%", **settings) as engine:
        engine.runtime.recorder = seen.append
        result = engine.generate((5, 17, 3, 60, 17, 3, 5, 17), max_new_tokens=24)
        memory = engine.runtime.memory
        memory.check_integrity()
        assert not any(tier._pins.any() for tier in memory.tiers)
        resident = [np.flatnonzero(tier.ready).tolist() for tier in memory.tiers]
        routing = [(s.routing.tolist(), s.accepted) for s in seen]
        stats = asdict(engine.runtime.stats)
        return result.token_ids, routing, stats, resident, memory.bytes_read


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("policy", ["lru", "mixtral-offloading", "moe-spac"])
def test_both_do_the_same(family: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_costs(monkeypatch)
    path = save_checkpoint(family, tmp_path)
    taken: list[Taken] = []
    placed: list[Taken] = []
    take, place_and_take = AtHand.take, AtHand.place_and_take

    def note(self: AtHand, *given: Any) -> Any:
        placement, found = place_and_take(self, *given)
        placed.append(found)
        return placement, found

    monkeypatch.setattr(AtHand, "take", lambda *given: taken.append(take(*given)) or taken[-1])
    monkeypatch.setattr(AtHand, "place_and_take", note)
    native = run(path, policy, drafts=2)
    at_once = sum(found.host is not None for found in taken + placed)
    assert 0 < at_once < len(taken + placed), "some layers are at hand, and some miss something"
    assert bool(placed) == (policy == "moe-spac") and len(placed) < len(taken + placed)
    monkeypatch.setattr(AtHand, "take", InTheLoop.take)
    for module in (groups, at_hand, tiers, cost, policy_native):
        monkeypatch.setattr(module, "load_library", lambda: None)
    assert run(path, policy, drafts=2) == native
