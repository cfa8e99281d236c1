"""Sampled decoding with speculation draws from the target's own distribution: a chi-square test over the engine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

import moespac
from moespac.config import SamplingConfig
from moespac.speculate.drafters import ModelDrafter
from moespac.speculate.sampling import probabilities
from moespac.speculate.verify import Verdict
from tests.families import VOCABULARY, build_model, save_checkpoint

PROMPT = (5, 17, 3, 17)
SETTINGS = {"temperature": 1.5, "top_k": 3}
RUNS = 500


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    path = save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("target"))
    with moespac.load(path, draft="none", host_memory="50%", window=2, profile=None) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, int, int], float]:
    """The joint distribution of the first three tokens, from the whole model."""
    model = build_model("qwen3_moe")
    sampling = SamplingConfig(**SETTINGS)

    @torch.inference_mode()
    def following(tokens: tuple[int, ...]) -> dict[int, float]:
        (row,) = probabilities(model(torch.tensor([tokens])).logits[0, -1:], sampling)
        return {int(token): float(row[token]) for token in row.nonzero()}

    return {
        (a, b, c): p_a * p_b * p_c
        for a, p_a in following(PROMPT).items()
        for b, p_b in following((*PROMPT, a)).items()
        for c, p_c in following((*PROMPT, a, b)).items()
    }


class CertainDrafter(ModelDrafter):
    """Always drafts its most likely token, as prompt lookup does: a draft without a distribution."""

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        super().begin(SamplingConfig(), generator)


def drafters():
    other = build_model("qwen3_moe", num_hidden_layers=2)  # same vocabulary, other opinions
    return {"drawn": ModelDrafter(other, VOCABULARY), "certain": CertainDrafter(other, VOCABULARY)}


def p_value(engine, expected) -> float:
    counts = Counter(
        tuple(engine.generate(PROMPT, max_new_tokens=3, seed=seed, **SETTINGS).token_ids)
        for seed in range(RUNS)
    )
    if set(counts) - set(expected):
        return 0.0  # a token that the target would never draw
    # Rare outcomes together, so that every cell expects enough for the chi-square approximation.
    common = [key for key, p in expected.items() if p * RUNS >= 5]
    observed = [counts[key] for key in common]
    predicted = [expected[key] * RUNS for key in common]
    rest = RUNS - sum(predicted)
    if rest > 1:
        observed.append(RUNS - sum(observed))
        predicted.append(rest)
    else:
        predicted = [p * sum(observed) / sum(predicted) for p in predicted]
    return float(chisquare(observed, predicted).pvalue)


@pytest.mark.parametrize("drafter", ["drawn", "certain"])
def test_joint_distribution_is_the_targets(engine, expected, drafter: str) -> None:
    engine.drafter = drafters()[drafter]
    assert p_value(engine, expected) > 1e-3


@pytest.mark.parametrize("drafter", ["drawn", "certain"])
def test_a_broken_acceptance_rule_is_caught(
    engine, expected, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same test fails when every draft is kept, so it can fail."""

    def keep_everything(draft_tokens, draft_probs, target_probs, generator) -> Verdict:
        own = torch.multinomial(target_probs[-1], 1, generator=generator)
        return Verdict(len(draft_tokens), [*draft_tokens, int(own)])

    monkeypatch.setattr("moespac.engine.engine.verify_sampled", keep_everything)
    engine.drafter = drafters()[drafter]
    assert p_value(engine, expected) < 1e-6


def test_a_seed_fixes_the_tokens(engine) -> None:
    engine.drafter = drafters()["drawn"]
    first, again = (
        engine.generate(PROMPT, max_new_tokens=12, seed=4, **SETTINGS).token_ids for _ in range(2)
    )
    others = {
        tuple(engine.generate(PROMPT, max_new_tokens=12, seed=s, **SETTINGS).token_ids) for s in range(8)
    }
    assert first == again
    assert len(others) > 1
