from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespac.config import SensorConfig
from moespac.policy.pairs import PairMemory
from moespac.types import ModelShape
from tests.policy.small import SHAPE

ONE = ModelShape(layers=1, experts=4, top_k=1, record_bytes=1)
EVEN = np.full((1, 4), 0.25, np.float32)


def test_a_pair_by_hand() -> None:
    pairs = PairMemory(ONE, SensorConfig(pair_prior=2.0, pair_fade=0.5))
    pairs.learn(np.array([1, 2, 3, 2, 1, 2, 1]), np.array([[0], [1], [0], [3], [0], [2], [0]]))
    # after 1, token 2 went to 2 lately and to 1 before; after 3 it went to 3, which is another pair
    np.testing.assert_allclose(
        pairs.blend(EVEN, np.array([2]))[0], np.array([0.5, 0.5 + 0.5, 0.5 + 1, 0.5]) / 3.5
    )


def test_the_predecessor_of_a_drafted_token_is_the_draft_before_it() -> None:
    pairs = PairMemory(ONE, SensorConfig(pair_prior=1.0))
    pairs.learn(np.array([1, 2, 7]), np.array([[0], [3], [0]]))
    both = pairs.blend(np.repeat(EVEN, 2, axis=0), np.array([1, 2]))
    np.testing.assert_allclose(both, [EVEN[0], (EVEN[0] + [0, 0, 0, 1]) / 2])


def test_what_is_not_known_stays_as_it_is() -> None:
    pairs = PairMemory(ONE, SensorConfig())
    assert pairs.blend(EVEN, np.array([5])) is EVEN
    pairs.learn(np.array([1, 1]), np.array([[-1], [-1]]))  # a layer that did not route
    assert pairs.blend(EVEN, np.array([1]))[0] == pytest.approx(3 * 0.25 / 4)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12))
def test_the_ring_remembers_the_latest_tokens(tokens: list[int], room: int) -> None:
    config = SensorConfig(pair_bytes=room, pair_sightings=3)  # one byte a token in this shape
    pairs = PairMemory(ONE, config)
    experts = np.random.default_rng(1).integers(0, 4, len(tokens))
    pairs.learn(np.array(tokens, np.int64), experts[:, None])
    np.testing.assert_array_equal(pairs.tokens, tokens[-room:])
    np.testing.assert_array_equal(pairs.routed[:, 0], experts[-room:])
    for coming in range(4):
        seen, total, weight = np.zeros(4), 0.0, 1.0
        last = tokens[-1] if tokens else -1
        for at in range(len(tokens) - 1, max(len(tokens) - room, 0) - 1, -1):
            before = tokens[at - 1] if at else -1
            if (before, tokens[at]) == (last, coming) and weight > config.pair_fade**2.5:
                seen[experts[at]] += weight
                total, weight = total + weight, weight * config.pair_fade
        expected = (config.pair_prior * EVEN[0] + seen) / (config.pair_prior + total)
        np.testing.assert_allclose(pairs.blend(EVEN, np.array([coming]))[0], expected, rtol=1e-5)


def test_memory_is_bounded() -> None:
    pairs = PairMemory(SHAPE, SensorConfig(pair_bytes=6 * 10))  # 10 tokens of 3 layers, top 2
    for start in range(0, 1000, 50):
        pairs.learn(np.arange(start, start + 50), np.zeros((50, 6), np.int64))
    assert len(pairs.tokens) == len(pairs._latest) == len(pairs._pair) == 10
