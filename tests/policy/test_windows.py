"""Looking back on passes: what windows of several tokens would have cost."""

from __future__ import annotations

import numpy as np
import pytest

from moespac.config import CostConfig
from moespac.policy.cost import CostModel
from moespac.policy.windows import WindowCosts
from moespac.types import Capacity, ModelShape, Observation, Residency, Window

SHAPE = ModelShape(layers=2, experts=4, top_k=1, record_bytes=1 << 20)
HOST, ACCELERATOR = 4.0, 1.0  # seconds of one expert there, whatever its tokens


class FlatCosts(CostModel):
    def host_expert(self, tokens: np.ndarray) -> np.ndarray:
        return np.full(len(tokens), HOST)

    def accelerator_expert(self, tokens: np.ndarray) -> np.ndarray:
        return np.full(len(tokens), ACCELERATOR)


def residency(*resident: tuple[int, int]) -> Residency:
    grid = np.zeros((SHAPE.layers, SHAPE.experts), np.bool_)
    accelerator = grid.copy()
    for layer, expert in resident:
        accelerator[layer, expert] = True
    return Residency(~grid, accelerator, grid, grid, Capacity(SHAPE.total, len(resident)))


def seen(*experts: int, drafted: int = 0, accepted: int = 0, prefill: bool = False) -> Observation:
    """A pass whose tokens go to these experts, the same in both layers."""
    routing = np.tile(np.array(experts)[None, :, None], (SHAPE.layers, 1, 1))
    return Observation(Window(np.arange(len(experts)), drafted, prefill), routing, accepted)


def look_back(passes: list[Observation], where: Residency, most: int = 3) -> WindowCosts:
    windows = WindowCosts(SHAPE, FlatCosts(CostConfig(), SHAPE.record_bytes), most, memory=1e9)
    for each in passes:
        windows.begin(each.window, where)
        windows.observe(each)
    return windows


def test_a_further_token_costs_the_experts_that_only_it_needs() -> None:
    # Tokens go to 0 (resident), 1, 1, 2, 2, 3, 3 ...: a second token needs a new expert every other time.
    found = look_back(
        [seen(e) for e in (0, 1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3)], residency((0, 0), (1, 0))
    ).latest()
    assert found.first == 2 * HOST  # the last pass: a layer each
    # windows 0-1-1, 1-1-2, 1-2-2 begin at passes 0, 1, 2; then again three at a time
    assert found.extra[0] == 0
    assert 0 < found.extra[1] <= 2 * HOST
    assert found.extra[1] < found.extra[2]


def test_one_window_by_hand() -> None:
    # 0 is on the accelerator, beside which the host computes 1: the layer takes as long as the host. 2: one more.
    passes = [seen(0, 1, 2, drafted=2, accepted=2)] * 3
    found = look_back(passes, residency((0, 0), (1, 0))).latest()
    assert found.first == 2 * ACCELERATOR
    assert found.extra == pytest.approx([0, 2 * (HOST - ACCELERATOR), 2 * (2 * HOST - ACCELERATOR)])


def test_rejected_drafts_are_no_tokens_of_the_text() -> None:
    found = look_back([seen(0, 3, drafted=1, accepted=0), seen(0)] * 3, residency()).latest()
    assert found.extra == [0, 0, 0]  # 3 never counted


def test_too_few_windows_say_nothing_and_another_text_begins_anew() -> None:
    assert look_back([seen(0), seen(1)], residency()).latest().extra == [0]
    texts = [seen(0), seen(1), seen(0, 1, 2, prefill=True)] * 2 + [seen(0), seen(1)]
    assert look_back(texts, residency()).latest().extra == [0, 2 * HOST]  # 0-1 three times, never 1-0
