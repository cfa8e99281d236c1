from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespac.config import CostConfig
from moespac.experts.kernels.library import load_library
from moespac.policy.cost import CostModel, MeasuredCosts, _Curve

MEGABYTE = 1 << 20


def test_priors_follow_from_size_and_bandwidth() -> None:
    config = CostConfig(host_bandwidth=1e9, host_token_share=0.5, link_bandwidth=2e9, storage_bandwidth=0.5e9)
    costs = CostModel(config, record_bytes=1_000_000)
    assert costs.link == pytest.approx(0.5e-3)
    assert costs.storage == pytest.approx(2e-3)
    assert costs.host_expert(np.array([1, 3, 5000])) == pytest.approx([1e-3, 2e-3, 2500.5e-3])


def test_a_measurement_replaces_the_prior_and_scales_what_was_not_measured() -> None:
    costs = CostModel(CostConfig(host_bandwidth=1e9, host_token_share=0.5), record_bytes=1_000_000)
    costs.observe_host(4, 25e-3)  # ten times the prior
    assert costs.host_expert(np.array([1, 4, 8])) == pytest.approx([10e-3, 25e-3, 45e-3])


def test_an_odd_number_of_tokens_is_scaled_to_its_bucket() -> None:
    costs = CostModel(CostConfig(host_bandwidth=1e9, host_token_share=0.5), record_bytes=1_000_000)
    costs.observe_host(5, 30e-3)  # ten times the prior
    assert costs.host_expert(np.array([5])) == pytest.approx([30e-3])


def test_a_stray_measurement_does_nothing() -> None:
    costs = CostModel(CostConfig(), MEGABYTE)
    for seconds in (1e-3, 1e-3, 5.0, 1e-3, 1e-3):
        costs.observe_link(seconds)
        costs.observe_storage(seconds)
        costs.observe_accelerator(1, seconds)
    assert costs.link == costs.storage == 1e-3
    assert costs.accelerator_expert(np.array([1])) == pytest.approx([1e-3])


def test_it_follows_a_change_that_lasts() -> None:
    costs = CostModel(CostConfig(samples=5), MEGABYTE)
    for seconds in [1e-3] * 20 + [3e-3] * 3:
        costs.observe_link(seconds)
    assert costs.link == 3e-3


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 10)), max_size=12))
def test_more_tokens_are_never_cheaper(measured: list[tuple[int, float]]) -> None:
    costs = CostModel(CostConfig(), MEGABYTE)
    for tokens, seconds in measured:
        costs.observe_host(tokens, seconds)
    curve = costs.host_expert(np.arange(1, 6000, 7))
    assert (curve > 0).all() and (np.diff(curve) >= 0).all()


def test_copies_take_bandwidth_from_the_host() -> None:
    costs = CostModel(CostConfig(), MEGABYTE)
    costs.observe_host(1, 1.0)
    costs.observe_link(3.0)
    assert (costs.copy_toll, costs.copy_price) == (1.0, 0.0), "until it is measured"
    costs.observe_host_beside_copy(1, 1.5)
    assert costs.copy_toll == pytest.approx(1.5)
    assert costs.copy_price == pytest.approx(1.0), "in 3 seconds it does the work of 2"
    assert costs.host_expert(np.array([1])) == pytest.approx([1.0]), "alone it is as fast as before"


def test_measured_costs_are_where_it_starts_from() -> None:
    config = CostConfig(host_bandwidth=1e9, host_token_share=0.5)
    costs = CostModel(
        config, record_bytes=1_000_000
    )  # by sizes: 1 ms for a token, and 0.5 ms for each further one
    measured = MeasuredCosts(host={1: 2e-3, 4: 5e-3}, accelerator={1: 1e-5}, link=3e-4, storage=4e-3)
    costs.start_from(measured)
    assert costs.host_expert(np.array([1, 4])) == pytest.approx([2e-3, 5e-3])
    assert 2e-3 < costs.host_expert(np.array([2]))[0] < 5e-3
    assert costs.host_expert(np.array([64]))[0] == pytest.approx(2 * 32.5e-3), "beyond, the prior's own slope"
    assert costs.accelerator_expert(np.array([1]))[0] == pytest.approx(1e-5)
    assert (costs.link, costs.storage) == (3e-4, 4e-3)
    costs.observe_link(1e-4)
    costs.observe_host(4, 10e-3)
    assert costs.link == 1e-4, "what is observed counts from then on"
    assert costs.host_expert(np.array([1, 4])) == pytest.approx([4e-3, 10e-3]), "and scales the rest"


def test_measured_costs_never_fall_with_tokens() -> None:
    costs = CostModel(CostConfig(), MEGABYTE)
    costs.start_from(MeasuredCosts({1: 5e-3, 4: 1e-3, 16: 2e-3}, {1: 1e-3, 4: 1e-5}, 1e-4, 1e-3))
    for curve in (costs.host_expert, costs.accelerator_expert):
        assert (np.diff(curve(np.arange(1, 600))) >= 0).all()


def test_a_curve_follows_many_measurements_at_a_time() -> None:
    costs = CostModel(CostConfig(samples=1, redraw=8), MEGABYTE)

    def later(measurements: int, seconds: float) -> float:
        for _ in range(measurements):
            costs.observe_host(1, seconds)
        return round(float(costs.host_expert(np.array([1]))[0]), 6)

    assert [later(1, 1.0), later(1, 2.0), later(1, 3.0)] == [1.0, 2.0, 3.0], "at first at once"
    for _ in range(50):
        later(1, 4.0)
    waited = next(n for n in range(1, 20) if later(1, 5.0) == 5.0)
    assert 1 < waited <= 8
    assert [later(7, 6.0), later(1, 6.0)] == [5.0, 6.0]


@pytest.mark.skipif(load_library() is None, reason="no native code on this machine")
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-7, 10)), min_size=1, max_size=30), max_size=9
    ),
    st.dictionaries(st.sampled_from([1, 3, 8, 17, 500]), st.floats(1e-7, 10), max_size=3),
    st.integers(2, 9),
)
def test_both_draw_the_same_curve(
    batches: list[list[tuple[int, float]]], measured: dict[int, float], buckets: int
) -> None:
    config = CostConfig(samples=5, buckets=buckets, redraw=7)
    native, python = (_Curve(1e-3, 4e-4, config) for _ in range(2))
    python._library = None
    for curve in (native, python):
        if measured:
            curve.start_from(measured)
    for batch in batches:
        tokens, seconds = (np.array(column) for column in zip(*batch, strict=True))
        native.observe(tokens, np.stack([seconds, seconds], axis=1)[:, 0])  # not contiguous
        python.observe(tokens, seconds)
        np.testing.assert_array_equal(native._latest, python._latest)
        np.testing.assert_array_equal(native.table(), python.table())
        far = np.array([1, 64, 1000, 10**6])
        np.testing.assert_array_equal(native(far), python(far))
    assert (native._state.measured, native._state.due) == (python._state.measured, python._state.due)
