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


def test_a_slow_begin_is_not_held_against_no_drafts() -> None:
    """Passes without drafts took three times as long in the hour in which they were measured; now none pay."""
    rng = random.Random(0)
    governor = Governor(GovernorConfig())
    chosen = []
    for number in range(400):
        k = governor.choose()
        accepted = 0
        while accepted < k and rng.random() < 0.5:
            accepted += 1
        plain = 3.0 if number < 20 else 1.0
        governor.observe(k, accepted, 0.01 * k, 1.9 + 0.05 * k if k else plain)
        chosen.append(k)
    assert chosen[20:60].count(0) == 0  # its best is 3 or 4, whose neighbours are not 0
    assert chosen[-100:].count(0) > 80


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


class Tight:
    """A world of experts that do not fit: a further token costs ``EXTRA`` of a plain pass of 1 second, known from
    looking back; but the first pass with drafts after one without finds nothing where it should be, and costs
    ``strays`` more. Drafts are right by chance, and the drafter looks back as the engine has it do."""

    EXTRA = (0.0, 0.45, 0.85, 1.2, 1.5)

    def __init__(self, strays: float = 0.0, seed: int = 0) -> None:
        self.governor = Governor(GovernorConfig(most=4))
        self.governor.begin()
        self._strays = strays
        self._rng = random.Random(seed)
        self._right: list[float] = []  # of each token that came, whether its draft would have been right
        self._undrafted = 1
        self._drafts = False
        self.looked_back = 0

    def step(self, acceptance: float) -> tuple[int, int, float]:
        """K, tokens and seconds of a pass."""
        self._right.append(float(self._rng.random() < acceptance))
        k = self.governor.choose()
        if self.governor.looks_back(k, self._undrafted):
            self.governor.saw_drafts(self._right[-self._undrafted :])
            self.looked_back += 1
            self._undrafted = 0
        self._undrafted = 0 if k else self._undrafted + 1
        accepted = 0
        while accepted < k and self._rng.random() < acceptance:
            accepted += 1
        seconds = (1 + self.EXTRA[k]) * self._rng.uniform(0.9, 1.1)
        seconds += self._strays if k and not self._drafts else 0.0
        self._drafts = k > 0
        self.governor.observe(k, accepted, 0.02 * k, seconds, LookedBack(0.8, list(self.EXTRA)))
        return k, accepted + 1, seconds + 0.02 * k

    def run(self, passes: int, acceptance: float) -> list[tuple[int, int, float]]:
        return [self.step(acceptance) for _ in range(passes)]


def drafting(passes: list[tuple[int, int, float]]) -> float:
    return sum(k > 0 for k, _, _ in passes) / len(passes)


@pytest.mark.parametrize(("new_text", "within"), [(True, 12), (False, 32)])
def test_it_comes_to_draft_though_it_drafts_nothing_when_drafts_begin_to_be_right(new_text, within) -> None:
    late = []
    for seed in range(20):
        world = Tight(seed=seed)
        world.run(150, acceptance=0.3)
        assert drafting(world.run(50, acceptance=0.3)) < 0.1
        if new_text:
            world.governor.begin()
        passes = [k > 0 for k, _, _ in world.run(within, acceptance=0.9)]
        late.append(not any(passes))
        assert drafting(world.run(60, acceptance=0.9)) > 0.75
    assert sum(late) <= 2  # nine of ten times


def test_isolated_drafted_passes_do_not_mislead_it() -> None:
    for seed in range(10):
        world = Tight(strays=3.0, seed=seed)
        world.run(150, acceptance=0.3)
        world.run(40, acceptance=0.9)
        passes = world.run(100, acceptance=0.9)
        assert drafting(passes) > 0.9
        assert world.governor._seconds(3) == pytest.approx(1.85, rel=0.15)


def test_looking_back_costs_a_small_share_and_nothing_where_no_draft_could_pay() -> None:
    world = Tight()
    world.run(100, acceptance=0.3)
    before = world.looked_back
    world.run(160, acceptance=0.3)
    assert 0 < world.looked_back - before <= 160 / GovernorConfig().look_back_passes + 2
    hopeless = Tight()
    hopeless.EXTRA = tuple(1.1 * further for further in range(5))
    hopeless.run(20, acceptance=0.3)
    before = hopeless.looked_back
    hopeless.run(160, acceptance=0.3)
    assert hopeless.looked_back == before


def test_what_catching_up_takes_is_asked_for_before_every_draft_that_follows_none() -> None:
    governor = Governor(GovernorConfig())
    assert governor.looks_back(2, 1) and governor.looks_back(1, 40) and not governor.looks_back(2, 0)


def test_a_new_text_begins_with_what_is_usual() -> None:
    governor = Governor(GovernorConfig())
    for _ in range(40):
        governor.begin()
        governor.saw_drafts([1.0, 0.0] * 10)
    governor.saw_drafts([1.0] * 40)
    assert governor._acceptance.rate > 0.8
    governor.begin()
    assert governor._acceptance.rate == pytest.approx(0.6, abs=0.12)
