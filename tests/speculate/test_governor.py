"""The governor against worlds in which the best K is known."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from moespac.config import GovernorConfig
from moespac.policy.windows import NOTHING, LookedBack
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


def uneven(governor: Governor, looks_back: bool, seed: int) -> float:
    """Tokens per second of 200 passes of a world in which no draft pays, but chance hides it: the first token's
    experts take anything from half to twice of what a further token's take."""
    rng = random.Random(seed)
    tokens = seconds = 0.0
    extra = [0.85 * further for further in range(5)]  # K = 1 loses 3%
    for _ in range(200):
        k = governor.choose()
        accepted = 0
        while accepted < k and rng.random() < 0.8:
            accepted += 1
        first = rng.uniform(0.4, 1.6)
        spent = 0.1 + first + extra[k] * rng.uniform(0.9, 1.1)
        told = LookedBack(first, extra) if looks_back else NOTHING
        governor.observe(k, accepted, 0.1 * k, spent, told)
        tokens += accepted + 1
        seconds += spent + 0.1 * k
    return tokens / seconds


def test_looking_back_finds_out_that_drafting_does_not_pay_without_drafting() -> None:
    config = GovernorConfig(most=4)
    plain = 1 / (0.1 + 1.0)
    told = [uneven(Governor(config), True, seed) / plain for seed in range(20)]
    blind = [uneven(Governor(config), False, seed) / plain for seed in range(20)]
    assert sum(told) / len(told) > 0.985
    assert sum(told) > sum(blind)


def test_looking_back_does_not_keep_it_from_drafts_that_pay() -> None:
    governor = Governor(GovernorConfig(most=4))
    for _ in range(60):
        k = governor.choose()
        governor.observe(k, k, 0.01 * k, 1.1 + 0.3 * k, LookedBack(1.0, [0, 0.3, 0.6, 0.9, 1.2]))
    assert governor._best() == 4
