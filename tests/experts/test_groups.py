"""Tokens by expert: native code and its twin, and what the host makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moespac.config import DispatchConfig
from moespac.experts.desk import Desks
from moespac.experts.groups import Groups
from moespac.experts.kernels.library import address, load_library

needs_library = pytest.mark.skipif(load_library() is None, reason="no native code on this machine")
EXPERTS = 7


@st.composite
def routings(draw: st.DrawFn) -> np.ndarray:
    tokens, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    low, high = draw(st.sampled_from([(0, EXPERTS - 1), (-2, EXPERTS + 2)]))  # some know "no expert"
    numbers = st.lists(st.integers(low, high), min_size=tokens * top_k, max_size=tokens * top_k)
    return np.array(draw(numbers), np.int64).reshape(tokens, top_k)


@needs_library
@settings(deadline=None)
@given(routings(), routings())
def test_both_group_alike(first: np.ndarray, second: np.ndarray) -> None:
    """One after the other in the same buffers, where the sizes are the same."""
    for routing in (first, second.repeat(9, axis=0)[: len(first), :1].repeat(first.shape[1], axis=1)):
        twins = [Groups(*routing.shape, EXPERTS) for _ in range(2)]
        known = [np.empty_like(routing) for _ in range(2)]
        twins[0].fill(torch.from_numpy(routing), known[0], address(known[0]))
        within = twins[1].fill_in_python(routing, known[1])
        np.testing.assert_array_equal(twins[0].numbers, twins[1].numbers)
        np.testing.assert_array_equal(known[0], known[1])
        assert twins[0].complete == (within == routing.size) == bool((known[0] >= 0).all())


@settings(deadline=None)
@given(routings())
def test_every_row_is_somebodys_or_nobodys(routing: np.ndarray) -> None:
    groups = Groups.of(routing, EXPERTS)
    flat = routing.reshape(-1)
    for expert in range(EXPERTS):
        assert groups.rows(expert).tolist() == np.flatnonzero(flat == expert).tolist()
    nobody = np.flatnonzero((flat < 0) | (flat >= EXPERTS)).tolist()
    assert sorted(groups.nowhere.tolist()) == nobody
    assert groups.complete == (not nobody)
    some = np.arange(EXPERTS) % 2 == 0
    assert sorted(groups.rows_of(some).tolist()) == [row for row, e in enumerate(flat) if e in (0, 2, 4, 6)]


def test_what_a_router_says_in_another_way() -> None:
    """On no copy of which the routing that is kept depends."""
    routing = torch.tensor([[3, 1, 0], [6, 5, 2]])
    for index in (routing.int(), torch.stack([routing, routing])[1], torch.cat([routing, routing], 1)[:, :3]):
        known = np.empty((2, 3), np.int64)
        groups = Groups(2, 3, EXPERTS)
        groups.fill(index, known, address(known))
        index.zero_()
        assert known.tolist() == [[3, 1, 0], [6, 5, 2]]
        assert groups.counts.tolist() == [1, 1, 1, 1, 0, 1, 1]
        routing = torch.tensor([[3, 1, 0], [6, 5, 2]])


def test_buffers_of_windows_are_kept_and_those_of_prompts_are_not() -> None:
    desks, most = Desks(2, EXPERTS), DispatchConfig.kept_tokens
    assert desks.of(5) is desks.of(5) and desks.of(most) is desks.of(most)
    assert desks.of(5) is not desks.of(6) and desks.of(most + 1) is not desks.of(most + 1)


def test_rows_that_nobody_fills_are_zero() -> None:
    desk, x = Desks(2, EXPERTS).of(3), torch.empty(3, 4)
    with torch.inference_mode():
        rows = desk.rows(x)
    assert rows.shape == (6, 4)
    rows.fill_(1.0)
    known = np.empty((3, 2), np.int64)
    desk.groups.fill(torch.tensor([[0, 1], [2, EXPERTS], [3, 4]]), known, address(known))
    assert desk.rows(x) is rows and not rows.any()
    assert desk.rows(x.bfloat16()).dtype == torch.bfloat16
