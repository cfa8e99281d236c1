"""The native dispatch and its twin decide the same, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespac.config import CostConfig, PolicyConfig
from moespac.experts.kernels.library import load_library
from moespac.policy import native
from moespac.policy.balance import Freshening, SavedSeconds, freshen_in_python
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.policy.split import Stakes, place_in_python
from moespac.types import Capacity, ModelShape, Observation, Window
from tests.policy.small import residency, routing

pytestmark = pytest.mark.skipif(load_library() is None, reason="no native code on this machine")

SHAPE = ModelShape(layers=3, experts=40, top_k=4, record_bytes=1 << 20)


def _costs(rng: np.random.Generator) -> CostModel:
    costs = CostModel(CostConfig(), SHAPE.record_bytes)
    costs.observe_link(rng.uniform(0.1, 3))
    costs.observe_storage(rng.uniform(0.1, 6))
    for tokens in (1, 2, 8):
        costs.observe_host(tokens, rng.uniform(0.5, 2) * (1 + tokens / 2))
        costs.observe_accelerator(tokens, rng.uniform(0.05, 1) * (1 + tokens / 8))
    costs.observe_host_beside_copy(1, float(costs.host_expert(np.array([1]))[0]) * rng.uniform(0.9, 3))
    return costs


@given(st.integers(0, 2**32), st.integers(0, 60), st.sampled_from(["no stakes", "distinct", "with ties"]))
def test_both_place_alike(seed: int, slots: int, stakes: str) -> None:
    rng = np.random.default_rng(seed)
    costs, now = _costs(rng), residency(Capacity(int(rng.integers(1, SHAPE.total + 1)), slots), rng, SHAPE)
    counts = rng.integers(0, 9, SHAPE.experts) * rng.integers(0, 2, SHAPE.experts)
    at_stake = None
    if stakes != "no stakes":
        worth = (
            rng.uniform(0, 2, SHAPE.total) if stakes == "distinct" else rng.integers(0, 3, SHAPE.total) / 3
        )
        at_stake = Stakes(worth, np.sort(worth[now.accelerator.ravel()]))
    for layer in range(SHAPE.layers):
        placer = native.placer(now, costs, at_stake)
        assert placer is not None and placer is native.placer(now, costs, at_stake)
        placed = placer(layer, counts)
        assert placed is not None
        order, there = place_in_python(layer, counts, now, costs, at_stake)
        np.testing.assert_array_equal(placed[0], order)
        assert placed[1] == there


@given(st.integers(0, 2**32), st.floats(1, 40), st.floats(0, 1))
def test_both_freshen_alike(seed: int, tokens: float, step: float) -> None:
    rng = np.random.default_rng(seed)
    curve = SavedSeconds(rng.uniform(1, 9), _costs(rng), passes=7)
    counts = np.minimum(rng.integers(0, 9, SHAPE.experts), int(tokens))
    lasting = rng.uniform(0, 1, SHAPE.total).astype(np.float32)
    kinds = [(Freshening(tokens, step, curve, lasting.copy()), np.zeros(SHAPE.total)) for _ in range(3)]
    (python, saved), (alone, saved_alone), (placing, saved_placing) = kinds
    freshen_in_python(1, counts, python, saved)
    assert native.freshen(1, counts, alone, saved_alone)
    now = residency(Capacity(SHAPE.total, 9), rng, SHAPE)
    placer = native.placer(now, _costs(rng), Stakes(saved_placing, np.zeros(0), placing))
    assert placer is not None and placer(1, counts) is not None
    for freshening, worth in kinds:
        np.testing.assert_array_equal(freshening.lasting, python.lasting)
        np.testing.assert_array_equal(worth, saved)


def test_a_prefill_that_is_too_long_is_left_to_the_twin() -> None:
    rng = np.random.default_rng(0)
    now = residency(Capacity(SHAPE.total, 30), rng, SHAPE)
    counts = np.zeros(SHAPE.experts, np.int64)
    counts[3] = 64
    placer = native.placer(now, _costs(rng), None)
    assert placer is not None and placer(0, counts) is None
    counts[3] = 63
    assert placer(0, counts) is not None


def test_a_policy_decides_the_same_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def decided() -> list[np.ndarray]:
        rng, found, config = np.random.default_rng(1), [], PolicyConfig()
        capacity = Capacity(SHAPE.total // 2, 20)
        policy = MoeSpacPolicy(SHAPE, capacity, CostModel(config.cost, SHAPE.record_bytes), config)
        for _ in range(20):
            window, now = Window(rng.integers(0, 9, 5), drafted=4), residency(capacity, rng, SHAPE)
            plan, routed = policy.plan(window, now), routing(5, rng, SHAPE)
            found += [plan.host, plan.accelerator]
            for layer, chosen in enumerate(routed):
                counts = np.bincount(chosen.ravel(), minlength=SHAPE.experts)
                placement = policy.place(layer, counts, now)
                found += [placement.host, placement.accelerator, policy.retention("accelerator", layer)]
            policy.observe(Observation(window, routed, accepted=3))
        return found

    natively = decided()
    monkeypatch.setattr(native, "load_library", lambda: None)
    for here, there in zip(natively, decided(), strict=True):
        np.testing.assert_array_equal(here, there)
