from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moespac.config import PolicyConfig
from moespac.experts.kernels.library import load_library
from moespac.policy.cost import CostModel
from moespac.policy.planner import MoeSpacPolicy
from moespac.types import Capacity, Observation, Window
from tests.policy.small import SHAPE, observation, resident, routing

CONFIG = PolicyConfig()
HOST_ONLY = Capacity(host=8)


def _policy(capacity: Capacity = HOST_ONLY, config: PolicyConfig = CONFIG) -> MoeSpacPolicy:
    return MoeSpacPolicy(SHAPE, capacity, CostModel(config.cost, SHAPE.record_bytes), config)


def _teach(policy: MoeSpacPolicy, passes: int = 20) -> None:
    """Token 1 goes to experts 0 and 1 of every layer, token 2 to experts 4 and 5; both come as often."""
    for _ in range(passes):
        policy.observe(observation([1, 2], [0, 4]))


def test_the_drafted_tokens_decide_what_is_fetched() -> None:
    policy = _policy()
    _teach(policy)
    plan = policy.plan(Window(np.array([2, 2]), drafted=1), resident(HOST_ONLY))
    assert set(plan.host[:6]) == {4, 5, 12, 13, 20, 21}
    assert len(plan.host) == 8, "left-over slots are filled too"


def test_a_full_tier_gives_up_only_what_is_worth_less() -> None:
    policy = _policy()
    _teach(policy)
    best = [4, 5, 12, 13, 20, 21]
    window = Window(np.array([2, 2]), drafted=1)
    assert set(policy.plan(window, resident(HOST_ONLY, [*best, 0, 1])).host) <= {8, 9, 16, 17}
    useless = [2, 3, 10, 11, 18, 19, 6, 7]
    plan = policy.plan(window, resident(HOST_ONLY, useless))
    assert set(plan.host[:6]) == set(best)


@pytest.mark.parametrize("seed", range(8))
def test_each_replacement_is_worth_it_and_above_its_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy = _policy()
    for _ in range(12):
        tokens = rng.integers(0, 6, 3)
        held = rng.permutation(SHAPE.total)[: rng.integers(4, 9)]
        plan = policy.plan(Window(tokens), resident(HOST_ONLY, held))
        value = policy.retention("host", -1)
        replacing = plan.host[8 - len(held) :]
        assert (value[replacing] > np.sort(value[held])[: len(replacing)]).all()
        above = policy._utility.highest >= policy._thresholds["host"][:, None]
        assert above.ravel()[replacing].all()
        policy.observe(Observation(Window(tokens), routing(3, rng), 0))


def test_what_is_resident_or_arriving_is_not_fetched() -> None:
    policy = _policy(Capacity(SHAPE.total))
    full = resident(Capacity(SHAPE.total), range(SHAPE.total))
    assert not len(policy.plan(Window(np.array([1])), full).host)


def test_the_accelerator_is_filled_from_the_host() -> None:
    capacity = Capacity(host=SHAPE.total, accelerator=6)
    policy = _policy(capacity)
    _teach(policy)
    plan = policy.plan(Window(np.array([2])), resident(capacity, host=range(21)))
    assert set(plan.accelerator) >= {4, 5, 12, 13, 20}
    assert 21 not in plan.accelerator and 21 in plan.host


def test_the_host_computes_what_it_holds_while_the_rest_is_read() -> None:
    policy = _policy()
    counts = np.array([1, 3, 0, 2, 5, 0, 0, 0])
    placement = policy.place(1, counts, resident(HOST_ONLY, host=[8, 9]))
    np.testing.assert_array_equal(placement.host, [9, 8, 12, 11])


def test_what_the_accelerator_holds_is_computed_there() -> None:
    capacity = Capacity(host=SHAPE.total, accelerator=4)
    placement = _policy(capacity).place(
        0, np.array([1, 1, 0, 0, 0, 0, 0, 0]), resident(capacity, range(SHAPE.total), [0])
    )
    assert 0 in placement.accelerator


def test_layer_order_is_a_clock() -> None:
    policy = _policy()
    _teach(policy)
    policy.plan(Window(np.array([1, 2])), resident(HOST_ONLY))
    value = policy.retention("host", layer=1).reshape(SHAPE.layers, -1)
    assert value[1].min() > max(value[0].max(), value[2].max()), "the layer that runs is frozen"
    assert (value[2, :2] > value[0, :2]).all(), "the layer to come is needed before the one that has run"


def test_layers_that_ran_are_valued_by_the_next_window_not_by_this_one() -> None:
    policy = _policy()
    _teach(policy)
    policy.plan(Window(np.array([2, 2])), resident(HOST_ONLY))
    value = policy.retention("host", layer=1).reshape(SHAPE.layers, -1)
    assert value[2, 4] > 2 * value[2, 0], "this window holds token 2 only"
    assert value[0, 0] > 0.5 * value[0, 4], "the next one may hold either"


def test_a_copy_in_the_accelerator_makes_the_host_copy_worth_less() -> None:
    capacity = Capacity(host=8, accelerator=2)
    policy = _policy(capacity)
    _teach(policy)
    policy.plan(Window(np.array([1, 2])), resident(capacity, host=[0, 1], accelerator=[0]))
    value = policy.retention("host", -1)
    assert value[0] == pytest.approx(CONFIG.utility.copy_worth * value[1], rel=0.05)
    saved = policy.retention("accelerator", -1)
    assert saved[0] == pytest.approx(saved[1], rel=0.05), "there they are worth the same"


def test_it_learns_without_being_asked_to_plan() -> None:
    policy = _policy()
    for _ in range(5):
        policy.observe(observation([1], [6]))
    assert set(policy.retention("host", -1).argsort()[-6:]) == {6, 7, 14, 15, 22, 23}


def test_a_host_learns_what_can_wait_once_the_next_pass_is_planned() -> None:
    """The averages know the pass at once; the token table knows it only when there is time."""
    policy, sensor = _policy(), _policy()._demand
    for tokens in ([1], [2]):
        policy.plan(Window(np.array(tokens)), resident(HOST_ONLY))
        policy.learn()
        before = policy._demand.rate()
        policy.observe(observation(tokens, [6]))
        assert (policy._demand.rate() != before).any()
        assert len(policy._demand.table) == tokens[0] - 1
    policy.plan(Window(np.array([3])), resident(HOST_ONLY))
    policy.learn()
    assert len(policy._demand.table) == 2
    for tokens in ([1], [2]):
        sensor.expected(Window(np.array(tokens)))
        sensor.observe(observation(tokens, [6]))
    learned, expected = (part.table.frequencies for part in (policy._demand, sensor))
    np.testing.assert_array_equal(learned, expected)


def test_levels_do_not_overrule_demand() -> None:
    no_levels = dataclasses.replace(CONFIG.utility, level_weight=0.0)
    with_levels, without = _policy(), _policy(config=dataclasses.replace(CONFIG, utility=no_levels))
    for policy in (with_levels, without):
        _teach(policy)
    assert set(with_levels.retention("host", -1).argsort()[-12:]) == set(
        without.retention("host", -1).argsort()[-12:]
    )


def test_turns_are_what_is_retained() -> None:
    capacity = Capacity(host=20, accelerator=6)
    policy = _policy(capacity)
    _teach(policy)
    now = resident(capacity, range(20), range(6))
    policy.plan(Window(np.array([2, 2]), drafted=1), now)
    policy.place(0, np.bincount([0, 4, 5], minlength=SHAPE.experts), now)
    assert policy.turns("host", 0) is None
    for layer in (-1, 0, SHAPE.layers - 1):
        turns = policy.turns("accelerator", layer)
        assert turns is not None
        whole = np.concatenate([turns.ran[: turns.first], turns.to_come[turns.first :]])
        np.testing.assert_array_equal(whole, policy.retention("accelerator", layer))
    assert not np.array_equal(policy.retention("accelerator", -1), policy.retention("accelerator", 0))


def test_who_replaces_place_is_asked() -> None:
    class Elsewhere(MoeSpacPolicy):
        def place(self, layer, counts, residency):  # type: ignore[no-untyped-def]
            return super().place(layer, counts, residency)

    capacity = Capacity(host=20, accelerator=6)
    now, counts = resident(capacity, range(20), range(6)), np.bincount([0, 4], minlength=SHAPE.experts)
    for kind, native in ((MoeSpacPolicy, load_library() is not None), (Elsewhere, False)):
        policy = kind(SHAPE, capacity, CostModel(CONFIG.cost, SHAPE.record_bytes), CONFIG)
        assert policy.places(0, now) is None, "the first layer is placed by hand"
        policy.place(0, counts, now)
        assert (policy.places(1, now) is not None) == native
