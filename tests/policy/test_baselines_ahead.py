"""Those that look a layer or more ahead: mixtral-offloading, Fate, MoE-Infinity, HybriMoE, SP-MoE, Specter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moespac.config import BaselineConfig
from moespac.policy.baselines.hybrimoe import Scores, schedule
from moespac.policy.baselines.layered import prefer_in_each_layer
from moespac.policy.baselines.moe_infinity import Collection
from moespac.policy.baselines.order import Active
from moespac.types import Capacity, Observation, Window
from tests.policy.small import SHAPE, counts, make, resident

HOST_ONLY = Capacity(8)
MACHINE = Capacity(SHAPE.total, 8)
EVERYWHERE = range(SHAPE.total)


def _now(accelerator=(), arriving=()):
    return resident(MACHINE, EVERYWHERE, accelerator, arriving)


def test_each_layer_keeps_its_best() -> None:
    worth = np.array([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    order = np.argsort(prefer_in_each_layer(worth, 1)).tolist()
    assert order[-3:] == [3, 0, 8], "the best of each layer, by worth"
    assert order[-6:-3] == [4, 2, 1], "then the others"
    assert np.array_equal(prefer_in_each_layer(worth, 0), worth.ravel())
    assert (np.argsort(prefer_in_each_layer(worth, 7)) == np.argsort(worth.ravel())).all()


# ---- mixtral-offloading ------------------------------------------------------------------------------------


def test_mixtral_offloading_keeps_k_of_each_layer() -> None:
    """10 slots less 2 for staging: 2 in each of 3 layers."""
    policy = make("mixtral-offloading", Capacity(SHAPE.total, 10))
    policy.place(1, counts([7]), _now())
    for expert in (0, 1, 2):
        policy.place(0, counts([expert]), _now())
    order = np.argsort(policy.retention("accelerator", -1)).tolist()
    assert order[-3:] == [15, 1, 2] and order[-4] == 0, "the older of another layer's cache is worth more"


def test_mixtral_offloading_stages_two_and_promotes_what_is_used() -> None:
    policy = make("mixtral-offloading", MACHINE)
    policy.place(1, counts([1]), _now())
    policy.foresee_layer(1, counts({3: 1, 4: 3, 5: 2}))
    placement = policy.place(0, counts([0]), _now([12]))
    np.testing.assert_array_equal(placement.prefetch.accelerator, [13])
    value = policy.retention("accelerator", 0)
    assert set(value.argsort()[-2:]) == {12, 13}, "staged until their layer has run"
    policy.place(1, counts([4]), _now([12, 13]))
    value = policy.retention("accelerator", 1)
    assert value[12] > value[0] > value[9] > value[13] == 0, "used: recent; not used: first to go"


def test_an_expert_that_no_token_is_guessed_to_want_is_not_staged() -> None:
    policy = make("mixtral-offloading", MACHINE)
    policy.foresee_layer(1, counts([3]))
    np.testing.assert_array_equal(policy.place(0, counts([0]), _now()).prefetch.accelerator, [11])


def test_without_an_accelerator_the_guess_is_read_into_host_memory() -> None:
    policy = make("mixtral-offloading", HOST_ONLY)
    policy.foresee_layer(1, counts([3, 4]))
    plan = policy.place(0, counts([0]), resident(HOST_ONLY, [11])).prefetch
    assert (plan.host, len(plan.accelerator)) == ([12], 0)


# ---- Fate --------------------------------------------------------------------------------------------------


def test_fate_keeps_shallow_layers_before_all_others() -> None:
    """Half of 16 slots is one whole layer."""
    policy = make("fate", Capacity(SHAPE.total, 16))
    for layer, expert in ((0, 3), (1, 1), (2, 1), (1, 1)):
        policy.place(layer, counts([expert]), _now())
    value = policy.retention("accelerator", -1)
    assert value[3] > value[9] > value[17] > 0, "layer 0; then ARC: seen again, seen once"
    assert value[:8].min() > value[8:].max()


def test_fate_prefetches_all_that_the_next_gate_names() -> None:
    policy = make("fate", MACHINE)
    policy.foresee_layer(2, counts({0: 1, 1: 3, 2: 2, 6: 1}))
    placement = policy.place(1, counts([0]), _now([18], arriving=[22]))
    np.testing.assert_array_equal(placement.prefetch.accelerator, [17, 16])
    assert set(policy.retention("accelerator", 1).argsort()[-4:]) == {16, 17, 18, 22}
    policy.place(2, counts([1]), _now([16, 17, 18, 22]))
    value = policy.retention("accelerator", 2)
    assert value[17] > value[16] == 0, "a wrong guess is not kept"


# ---- MoE-Infinity ------------------------------------------------------------------------------------------


def _pass(experts: list[list[int]], prefill: bool = False, tokens: int = 1, kept: int | None = None):
    """An observation in which every token goes to ``experts[layer]``; the tokens after ``kept`` are rejected."""
    kept = tokens if kept is None else kept
    routed = np.repeat(np.array(experts)[:, None, :], tokens, axis=1)
    return Observation(Window(np.arange(tokens), 0 if prefill else tokens - 1, prefill), routed, kept - 1)


def _moe_infinity(capacity: Capacity = MACHINE, **settings):
    """It knows two sequences; a third has begun."""
    policy = make("moe-infinity", capacity, **settings)
    policy.observe(_pass([[0, 1], [0, 1], [0, 1]], prefill=True))
    policy.observe(_pass([[0, 1], [0, 2], [0, 1]]))
    policy.observe(_pass([[0, 1], [0, 3], [0, 1]]))
    policy.observe(_pass([[6, 7], [6, 5], [6, 7]], prefill=True))
    policy.observe(_pass([[6, 7], [6, 7], [6, 7]]))
    policy.observe(_pass([[2, 3], [2, 3], [2, 3]], prefill=True))
    return policy


def test_moe_infinity_prefetches_what_the_nearest_sequence_did_next() -> None:
    policy = _moe_infinity()
    ahead = policy.place(0, counts([0, 1]), _now()).prefetch.accelerator
    # Row 1 of the first sequence: shares 1/2, 1/6, 1/6, 1/6 times 3/4; row 2: 1/2, 1/2 times 2/4.
    np.testing.assert_array_equal(ahead, [8, 16, 17, 9, 10, 11])
    other = _moe_infinity().place(0, counts([6, 7]), _now([14])).prefetch.accelerator
    np.testing.assert_array_equal(other, [22, 23, 13, 15])


@pytest.mark.parametrize(
    ("row_1", "expected"),
    [
        ([[0, 1], [2, 3]], [16, 17, 8, 9, 10, 11]),  # 1/4 * 3/4 each, less than 1/2 * 2/4
        ([[0, 1], [0, 1], [0, 2], [1, 2]], [8, 9, 16, 17, 10]),  # 3/8 * 3/4, and 2/8 * 3/4
    ],
)
def test_moe_infinitys_priority_by_hand(row_1: list[list[int]], expected: list[int]) -> None:
    policy = make("moe-infinity", MACHINE)
    for pair in row_1:
        policy.observe(_pass([[0, 1], pair, [0, 1]]))
    policy.observe(_pass([[0, 1], [0, 1], [0, 1]], prefill=True))
    np.testing.assert_array_equal(policy.place(0, counts([0, 1]), _now()).prefetch.accelerator, expected)


def test_moe_infinity_judges_by_all_rows_so_far() -> None:
    policy = _moe_infinity()
    policy.place(0, counts([0, 6]), _now())  # like either
    ahead = policy.place(1, counts([6]), _now()).prefetch.accelerator
    np.testing.assert_array_equal(ahead, [22, 23])
    policy.place(0, counts([0, 1]), _now())  # by .71 to 0 like the first, and then by .29 to .61
    ahead = policy.place(1, counts([6, 7]), _now()).prefetch.accelerator
    np.testing.assert_array_equal(ahead, [16, 17])
    assert not len(policy.place(2, counts([0]), _now()).prefetch.accelerator)


def test_moe_infinity_keeps_what_it_listed_before_and_has() -> None:
    policy = _moe_infinity(prefetch_list=1)
    placement = policy.place(0, counts([0, 1]), _now([8]))
    np.testing.assert_array_equal(placement.prefetch.accelerator, [16, 17], "equals come along")
    order = policy.retention("accelerator", 0).argsort()
    assert set(order[-3:].tolist()) == {8, 16, 17}, "8 is more urgent than what is listed, and there"


def test_moe_infinity_without_a_past_foresees_nothing() -> None:
    policy = make("moe-infinity", MACHINE)
    policy.observe(_pass([[0, 1], [0, 1], [0, 1]], prefill=True))
    policy.observe(_pass([[0, 1], [0, 1], [0, 1]], prefill=True))  # the prompt's second part
    policy.observe(_pass([[0, 1], [0, 1], [0, 1]]))
    assert not len(policy.place(0, counts([0, 1]), _now()).prefetch.accelerator)


def test_moe_infinity_learns_nothing_from_rejected_tokens() -> None:
    policy = make("moe-infinity", MACHINE)
    routed = _pass([[0, 1], [0, 1], [0, 1]], tokens=4, kept=2)
    routed.routing[:, 2:] = 5
    policy.observe(routed)
    policy.observe(_pass([[2, 3], [2, 3], [2, 3]], prefill=True))
    np.testing.assert_array_equal(policy.place(0, counts([0]), _now()).prefetch.accelerator, [8, 9, 16, 17])


def test_moe_infinity_evicts_the_least_visited_since_it_came_deep_layers_first() -> None:
    policy = make("moe-infinity", MACHINE)
    for held in ([], [0], [0]):
        policy.place(0, counts([0, 1]), _now(held))
    policy.place(1, counts([1]), _now())
    policy.place(2, counts([1]), _now())
    value = policy.retention("accelerator", -1)
    np.testing.assert_allclose(value[[0, 1, 9, 17]], [3, 1, 2 / 3, 1 / 3])


def test_a_full_collection_gives_up_the_most_similar() -> None:
    def matrix(expert: int, further: int) -> np.ndarray:
        one = np.zeros((SHAPE.layers, SHAPE.experts))
        one[:, expert], one[:, further] = 3, 1
        return one

    collection = Collection(SHAPE, 2)
    for expert, further in ((0, 1), (4, 5), (4, 6)):
        collection.add(matrix(expert, further))
    assert len(collection) == 2
    assert collection[0][0, 1] > 0 and collection[1][0, 6] > 0 and collection[1][0, 5] == 0
    np.testing.assert_allclose(collection.cosines(1, matrix(4, 6)[1]), [0, 1])


# ---- HybriMoE ----------------------------------------------------------------------------------------------


def test_hybrimoes_score_by_hand() -> None:
    """S <- a TopP(s) + (1 - a) S, a = 0.5, here with p = 1."""
    order = Scores(SHAPE, 2, BaselineConfig(score_top=1))
    order.use(Active(np.array([8, 9]), np.array([4, 2]), np.array([False, False])))
    order.use(Active(np.array([9, 10]), np.array([6, 1]), np.array([False, False])))
    np.testing.assert_allclose(order.scores[1, :3], [1, 3, 0])
    assert not order.scores[[0, 2]].any(), "other layers do not fade"


COSTS = SimpleNamespace(
    host_expert=lambda tokens: tokens * 1.0,
    accelerator_expert=lambda tokens: np.full(len(tokens), 0.5),
    link=2.0,
)  # seconds


def test_hybrimoes_schedule_by_hand() -> None:
    """Of the loads 5, 1, 4, 2 the third is cached. CPU: 1 (done at 1); the link brings 5 (2.5) rather than the CPU
    2 (3); then the CPU takes 2 (3) rather than the link (4.5)."""
    tokens, held = np.array([5, 1, 4, 2]), np.array([False, False, True, False])
    assert schedule(tokens, held, COSTS, slots=8) == ([1, 3], [2, 0], 3.0)
    assert schedule(tokens, held, COSTS, slots=1) == ([1, 3, 0], [2], 8.0)
    equal, nothing = np.array([9, 9, 9]), np.zeros(3, np.bool_)
    assert schedule(equal, nothing, COSTS, slots=8) == ([], [0, 1, 2], 6.5), "the link does not wait"
    cached = np.ones(4, np.bool_)
    assert schedule(tokens, cached, COSTS, slots=8) == ([], [0, 2, 3, 1], 2.0), "cached: by load descending"


def test_hybrimoe_dispatches_by_its_schedule() -> None:
    policy = make("hybrimoe", MACHINE)
    policy.costs = COSTS
    placement = policy.place(1, counts({0: 5, 1: 1, 2: 4, 3: 2}), _now([10]))
    np.testing.assert_array_equal(placement.host, [9, 11])
    np.testing.assert_array_equal(placement.accelerator, [10, 8])


def test_hybrimoe_prefetches_the_next_layers_best_by_what_they_save() -> None:
    policy = make("hybrimoe", MACHINE)
    policy.costs = COSTS
    for _ in range(10):
        policy.place(2, counts({1: 5, 2: 1, 3: 7}), _now())
    # The scores are the loads, top 2: 7 and 5. As it is: the link brings 7 (2.5) and 5 (4.5). Cached 7: 5 comes at
    # 2.5. Cached 5: 7 comes at 2.5.
    np.testing.assert_array_equal(policy.place(1, counts([0]), _now()).prefetch.accelerator, [19, 17])
    np.testing.assert_array_equal(policy.place(1, counts([0]), _now([19])).prefetch.accelerator, [17])
    assert not len(policy.place(2, counts([1]), _now()).prefetch.accelerator), "nothing after the last layer"


def test_hybrimoe_orders_by_saving_not_by_score() -> None:
    """Loads 1 and 5: the CPU has done 1 when the link brings 5, so only 5 is worth having."""
    policy = make("hybrimoe", MACHINE)
    policy.costs = COSTS
    order = policy._by_impact(np.array([1.0, 5.0]), np.array([False, False]))
    np.testing.assert_array_equal(order, [1, 0])


def test_hybrimoe_evicts_the_least_score_of_each_layer() -> None:
    """8 slots: 2 in each layer."""
    policy = make("hybrimoe", MACHINE)
    policy.place(0, counts({0: 9, 1: 8, 2: 7}), _now())
    policy.place(1, counts({0: 2, 1: 1}), _now())
    order = policy.retention("accelerator", 2).argsort().tolist()
    assert order[-5:] == [2, 9, 8, 1, 0]


# ---- SP-MoE and Specter ------------------------------------------------------------------------------------


def _drafted(name: str, capacity: Capacity = MACHINE):
    """Drafting a token takes a second, and so does a transfer."""
    policy = make(name, capacity, draft_token_seconds=1.0)
    policy.costs.observe_link(1.0)
    policy.costs.observe_storage(0.5)
    return policy


def _suggest(policy, *layers: dict[int, int]) -> None:
    policy.foresee_window(np.stack([counts(layer) for layer in layers]))


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [((), [1, 0]), ((8,), [1, 0, 9]), ((0, 8), [1, 9]), ((0, 8, 9), [1, 16, 17])],
)
def test_sp_moe_prefetches_down_to_the_layer_that_still_fits(accelerator, expected) -> None:
    """Three drafted tokens are three transfers; each layer wants two experts."""
    policy = _drafted("sp-moe")
    _suggest(policy, {0: 1, 1: 3}, {0: 1, 1: 1}, {0: 2, 1: 1})
    plan = policy.plan(Window(np.arange(4), drafted=3), _now(accelerator))
    np.testing.assert_array_equal(plan.accelerator, expected)


def test_sp_moe_reads_from_storage_where_there_is_no_accelerator() -> None:
    policy = _drafted("sp-moe", HOST_ONLY)
    _suggest(policy, {0: 1, 1: 3}, {0: 1, 1: 1}, {0: 2, 1: 1})
    plan = policy.plan(Window(np.arange(3), drafted=2), resident(HOST_ONLY))
    np.testing.assert_array_equal(plan.host, [1, 0, 8, 9])


@pytest.mark.parametrize("name", ["sp-moe", "specter"])
def test_what_the_draft_suggests_is_kept_until_its_layer_has_run(name: str) -> None:
    policy = _drafted(name)
    _suggest(policy, {0: 2}, {3: 2}, {})
    policy.plan(Window(np.arange(6), drafted=5), _now([0]))
    policy.place(0, counts([5]), _now([0]))
    value = policy.retention("accelerator", 0)
    assert value[11] > value[5] > value[0], "11 is to come, 5 was used, 0 was not wanted after all"
    plan = policy.plan(Window(np.arange(6), drafted=5), _now())
    assert not len(plan.accelerator), "a suggestion is for one pass"


def test_specter_fetches_the_most_counted_that_the_draft_leaves_time_for() -> None:
    """Five tokens less the first plan's fifth: four transfers."""
    policy = _drafted("specter")
    _suggest(policy, {0: 1, 1: 2}, {0: 5, 1: 1}, {0: 2, 1: 1, 2: 4})
    plan = policy.plan(Window(np.arange(6), drafted=5), _now([8]))
    np.testing.assert_array_equal(plan.accelerator, [18, 1, 16, 0])
    assert policy.retention("accelerator", -1)[8] > 0, "what is there and counted is kept too"
