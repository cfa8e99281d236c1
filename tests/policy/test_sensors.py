from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespac.config import ContextConfig, SensorConfig
from moespac.policy.sensors import Acceptance, DemandSensor, RoutingRate
from moespac.policy.token_table import TokenTable
from moespac.types import Observation, Window
from tests.policy.small import SHAPE, observation, routing

CONFIG = SensorConfig()
EVEN = np.full(SHAPE.total, 0.25, np.float32)


def test_a_rate_does_not_depend_on_how_tokens_are_cut_into_windows() -> None:
    routed = routing(60, np.random.default_rng(1))[0]  # flat ids of layer 0
    whole, pieces = RoutingRate(EVEN, 7.0), RoutingRate(EVEN, 7.0)
    whole.observe(routed, 60)
    for begin, end in ((0, 1), (1, 6), (6, 50), (50, 60)):
        pieces.observe(routed[begin:end], end - begin)
    np.testing.assert_allclose(whole.rate, pieces.rate, rtol=1e-5, atol=1e-7)


def test_a_rate_by_hand() -> None:
    average = RoutingRate(np.zeros(4, np.float32), mean_life=1 / np.log(2))  # halves with each token
    average.observe(np.array([[0], [1], [-1]]), 3)
    np.testing.assert_allclose(average.rate, [0.125, 0.25, 0, 0], rtol=1e-6)


def test_drafts_weigh_what_their_position_is_accepted() -> None:
    acceptance = Acceptance(SensorConfig(acceptance_prior=0.5, acceptance_passes=1.0))
    window = Window(np.arange(4), drafted=2)
    np.testing.assert_allclose(acceptance.weights(window), [1, 1, 0.5, 0.25])
    acceptance.observe(
        drafted=2, accepted=1
    )  # the first was right, the second wrong; one pass is all it remembers
    np.testing.assert_allclose(acceptance.weights(window), [1, 1, 1, 0])


def test_a_draft_after_a_rejected_one_was_never_tried() -> None:
    acceptance = Acceptance(SensorConfig(acceptance_prior=0.5, acceptance_passes=1.0))
    acceptance.observe(drafted=3, accepted=3)
    acceptance.observe(drafted=3, accepted=0)
    window = Window(np.arange(4), drafted=3)
    assert acceptance.weights(window)[1] == 0
    acceptance.observe(drafted=1, accepted=1)
    np.testing.assert_allclose(acceptance.weights(window), 1)  # the later two kept their rate


def test_rejected_tokens_teach_nothing() -> None:
    accepted, rejected = DemandSensor(SHAPE, CONFIG), DemandSensor(SHAPE, CONFIG)
    accepted.observe(observation([1, 2], [0, 2]))
    rejected.observe(observation([1, 2, 3], [0, 2, 5], drafted=2, accepted=1))
    np.testing.assert_array_equal(accepted.rate(), rejected.rate())
    assert len(rejected.table) == 2
    assert rejected.pairs.tokens.tolist() == [1, 2]


def test_the_tokens_of_a_window_tell_its_demand() -> None:
    sensor = DemandSensor(SHAPE, CONFIG)
    for _ in range(20):
        sensor.observe(observation([1, 2], [0, 4]))
    counts = sensor.expected(Window(np.array([2, 2, 2]))).counts.reshape(SHAPE.layers, -1)
    assert (counts[:, 4:6] > 2.5).all()
    assert (counts[:, :4] < 0.5).all() and (counts[:, 6:] < 0.1).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_expected_counts_are_those_of_top_k_routing(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    sensor = DemandSensor(SHAPE, CONFIG)
    for _ in range(3):
        window = Window(rng.integers(0, 9, size))
        sensor.observe(Observation(window, routing(size, rng), 0))
    expected = sensor.expected(Window(rng.integers(0, 12, size)))
    assert expected.tokens == min(size, CONFIG.plan_tokens)
    by_layer = expected.per_token.reshape(SHAPE.layers, -1)
    assert (by_layer >= 0).all() and (by_layer <= 1 + 1e-6).all()
    assert (by_layer.sum(axis=1) <= SHAPE.top_k + 1e-5).all()
    assert (by_layer.sum(axis=1) > 0.8 * SHAPE.top_k).all()


def test_a_layer_that_did_not_route_is_no_demand() -> None:
    sensor = DemandSensor(SHAPE, CONFIG)
    seen = observation([1, 2], [0, 6])
    seen.routing[1] = -1
    before = sensor.rate().reshape(SHAPE.layers, -1)[1].sum()
    sensor.observe(seen)
    assert sensor.rate().reshape(SHAPE.layers, -1)[1].sum() < before
    table = sensor.table.frequencies.reshape(2, SHAPE.layers, -1).sum(axis=-1)
    np.testing.assert_array_equal(table, [[2, 0, 2], [2, 0, 2]])


def test_a_long_prefill_counts_by_its_last_tokens() -> None:
    sensor = DemandSensor(SHAPE, CONFIG)
    sensor.observe(observation([1] * 1000 + [2] * 1000, [0] * 1000 + [4] * 1000))
    rate = sensor.rate().reshape(SHAPE.layers, -1)
    assert (rate[:, 4] > 0.8).all() and (rate[:, 0] < 0.2).all()


def test_the_context_learns_from_what_was_expected_and_kept() -> None:
    config = SensorConfig(context=ContextConfig(block=1))
    planned, unplanned, other_draft = (DemandSensor(SHAPE, config) for _ in range(3))
    for sensor in (planned, unplanned, other_draft):
        sensor.observe(observation([1, 2, 3, 4], [0, 2, 4, 6]))
    seen = observation([1, 2, 3], [0, 2, 5], drafted=2, accepted=1)
    planned.expected(seen.window)
    planned.observe(seen)
    unplanned.observe(seen)
    assert planned.context.state()["basis"].any() and not unplanned.context.state()["basis"].any()
    rejected_otherwise = observation([1, 2, 4], [0, 2, 7], drafted=2, accepted=1)
    other_draft.expected(rejected_otherwise.window)
    other_draft.observe(rejected_otherwise)
    for name, array in planned.context.state().items():
        np.testing.assert_array_equal(other_draft.context.state()[name], array)


def test_what_was_expected_of_another_window_teaches_nothing() -> None:
    sensor = DemandSensor(SHAPE, SensorConfig(context=ContextConfig(block=1)))
    sensor.expected(Window(np.array([1, 2])))
    sensor.observe(observation([1, 3], [0, 2]))
    sensor.observe(observation([1, 2], [0, 2]))
    assert not sensor.context.state()["basis"].any()


def _counts(expert: int, times: int = 1) -> np.ndarray:
    counts = np.zeros((1, SHAPE.total), np.float32)
    counts[0, expert] = times
    return counts


def test_an_unknown_token_is_expected_to_route_as_all_do() -> None:
    table = TokenTable(SHAPE, CONFIG)
    np.testing.assert_allclose(table.lookup(np.array([5]), EVEN), EVEN[None])


def test_a_row_by_hand() -> None:
    table = TokenTable(SHAPE, SensorConfig(recent_memory=1.0, recent_weight=1.0, table_prior=1.0))
    table.learn(np.array([5]), _counts(0), np.array([1]))
    table.learn(np.array([5]), _counts(1), np.array([1]))
    row = table.lookup(np.array([5]), EVEN)[0]
    # all sightings (2 of them: half and half), the latest (1: expert 1), the prior (1: a quarter)
    np.testing.assert_allclose(row[:3], [(1 + 0 + 0.25) / 4, (1 + 1 + 0.25) / 4, 0.25 / 4], rtol=1e-3)


def test_a_full_table_gives_up_the_least_seen_token() -> None:
    three_rows = SensorConfig(table_bytes=3 * SHAPE.total * 4)
    table = TokenTable(SHAPE, three_rows)
    for token, times in ((1, 5), (2, 1), (3, 2), (4, 1)):
        table.learn(np.array([token]), _counts(token, times), np.array([times]))
    assert sorted(table.tokens) == [1, 3, 4]
    np.testing.assert_array_equal(table.lookup(np.array([2]), EVEN)[0], EVEN)
    assert table.lookup(np.array([4]), EVEN)[0].argmax() == 4


def test_a_window_of_more_new_tokens_than_rows_is_survived() -> None:
    table = TokenTable(SHAPE, SensorConfig(table_bytes=3 * SHAPE.total * 4))
    table.learn(np.arange(10), np.ones((10, SHAPE.total), np.float32), np.ones(10, np.int64))
    assert len(table) == 3


def test_a_table_grows_without_forgetting() -> None:
    table = TokenTable(SHAPE, CONFIG)
    table.learn(np.array([7]), _counts(3), np.array([1]))
    before = table.lookup(np.array([7]), EVEN)
    for token in range(1000, 1600):
        table.learn(np.array([token]), _counts(0), np.array([1]))
    assert len(table) == 601
    assert table.lookup(np.array([7]), EVEN) == pytest.approx(before)
