"""How often drafts are accepted, in texts that differ and in texts that do not."""

from __future__ import annotations

import random

import pytest

from moespac.config import GovernorConfig
from moespac.speculate.acceptance import Acceptance

CONFIG = GovernorConfig()


def after(texts: list[float], seed: int, drafts: int = 20) -> Acceptance:
    """Texts of ``drafts`` drafts that are accepted so often, and a new one begun."""
    rng = random.Random(seed)
    acceptance = Acceptance(CONFIG)
    for rate in texts:
        acceptance.begin()
        for _ in range(drafts):
            acceptance.see(float(rng.random() < rate), step=1 / 16)
    acceptance.begin()
    return acceptance


@pytest.mark.parametrize("seed", range(5))
def test_where_texts_are_alike_a_few_lucky_drafts_say_little(seed: int) -> None:
    alike, mixed = after([0.7] * 30, seed), after([0.45, 0.95] * 15, seed)
    assert alike.prior_drafts > 20 and mixed.prior_drafts < 12
    assert alike.rate == pytest.approx(0.7, abs=0.1) and mixed.rate == pytest.approx(0.7, abs=0.1)
    for acceptance in (alike, mixed):
        for _ in range(5):
            acceptance.see(1.0, step=1 / 16)
    assert alike.rate < 0.8 and mixed.rate > alike.rate


def test_a_text_of_three_drafts_says_nothing_of_how_texts_differ() -> None:
    assert (
        after([0.0, 1.0] * 20, seed=0, drafts=CONFIG.judged_least - 1).prior_drafts
        == CONFIG.acceptance_drafts
    )


def test_a_text_that_turns_is_followed_the_sooner_the_less_texts_are_alike() -> None:
    alike, mixed = after([0.9] * 30, 1), after([0.5, 0.9] * 15, 1)
    for acceptance in (alike, mixed):
        for _ in range(30):
            acceptance.see(0.0, step=1 / 16)
    assert mixed.rate < 0.15 < alike.rate < 0.5
