"""The governor against worlds in which the best K is known."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from moespac.config import GovernorConfig
from moespac.speculate.governor import Governor

PASSES = 600


def run(choose, observe, acceptance: float, slope: float, draft: float, seed: int = 0) -> float:
    """Tokens per second of a world where a pass of T tokens takes 1 + slope (T - 1), give or take 10%."""
    rng = random.Random(seed)
    tokens = seconds = 0.0
    for _ in range(PASSES):
        k = choose()
        accepted = 0
        while accepted < k and rng.random() < acceptance:
            accepted += 1
        drafting = k * draft
        verifying = (1 + slope * k) * rng.uniform(0.9, 1.1)
        observe(k, accepted, drafting, verifying)
        tokens += accepted + 1
        seconds += drafting + verifying
    return tokens / seconds


def fixed(k: int, **world) -> float:
    return run(lambda: k, lambda *seen: None, **world)


@pytest.mark.parametrize("draft", [0.0, 0.05])
@pytest.mark.parametrize("slope", [0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.8, 0.97])
def test_never_slower_than_the_best_fixed_k_by_more_than_5_percent(acceptance, slope, draft) -> None:
    world = {"acceptance": acceptance, "slope": slope, "draft": draft}
    governor = Governor(GovernorConfig())
    governed = run(governor.choose, governor.observe, **world)
    best = max(fixed(k, **world) for k in range(9))
    assert governed > 0.95 * best


def test_it_follows_a_change_of_text() -> None:
    governor = Governor(GovernorConfig())
    run(governor.choose, governor.observe, acceptance=0.95, slope=0.05, draft=0.0)
    assert governor.choose() >= 5
    run(governor.choose, governor.observe, acceptance=0.05, slope=0.6, draft=0.05)
    assert governor._best() == 0
    run(governor.choose, governor.observe, acceptance=0.95, slope=0.05, draft=0.0)
    assert governor._best() >= 5


def test_one_stall_does_not_change_its_mind() -> None:
    governor = Governor(GovernorConfig(most=4))
    run(governor.choose, governor.observe, acceptance=0.9, slope=0.05, draft=0.0)
    before = governor._best()
    governor.observe(before, before, 0.0, 100.0)
    assert governor._best() >= before - 1


def test_it_does_not_load_torch() -> None:
    code = "import sys, moespac.speculate.governor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
