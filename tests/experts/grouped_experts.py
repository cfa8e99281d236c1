"""What the tests of the grouped kernels share: kernels in Triton's interpreter or on a card, and routing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moespac.config import GroupedConfig
from moespac.experts.grouped import GroupedExperts, constants
from moespac.experts.grouped.gates import apply_gate
from moespac.experts.kernels.gates import match_gate
from tests.experts.test_kernels import Experts, error

KERNELS = "moespac.experts.grouped.kernels"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forget_kernels() -> None:
    """What a kernel is (compiled or interpreted) is decided when its module is imported."""
    for name in [name for name in sys.modules if name.startswith(KERNELS)]:
        del sys.modules[name]


def interpret() -> Iterator[None]:
    """Until the end: without a card, kernels run in Python, on this machine's memory."""
    if DEVICE.type == "cuda":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch_language, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        """The interpreter exchanges the language's parts at every call of a device function: half of its time."""
        seen = tuple(value is language for value in function.__globals__.values() if value in languages)
        if seen not in scopes:
            scopes[seen] = patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    languages = [language, language.core]
    forget_kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
    for scope in reversed(scopes.values()):
        scope.restore()
    forget_kernels()


def few_programs(patch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program: the same kernels, in fewer and larger ones."""
    if DEVICE.type == "cuda":
        return
    patch.setattr(constants, "_LANE_WEIGHTS", 1 << 20)
    patch.setattr(constants, "_MOST_ROWS", 64)


def grouped(experts: Experts, dtype: torch.dtype = torch.float32) -> GroupedExperts:
    """Without the trial that ``build`` makes, which takes the interpreter a while."""
    gate = match_gate(experts.module, apply_gate)
    assert gate is not None
    return GroupedExperts(experts.module, experts.layout, gate, DEVICE, dtype, GroupedConfig())


class Routed:
    """(T, k) slots, as ``run`` wants them; -1 is no expert."""

    def __init__(self, routing: list[list[int]]) -> None:
        self.flat = np.array(routing).reshape(-1)
        self.top_k = len(routing[0])
        self.rows = np.argsort(self.flat, kind="stable")
        self.slots, counts = np.unique(self.flat, return_counts=True)
        self.begins, self.counts = counts.cumsum() - counts, counts

    def of(self, slot: int) -> NDArray[np.int64]:
        """Its rows of the (T * k) buffer."""
        (job,) = np.flatnonzero(self.slots == slot)
        return self.rows[self.begins[job] :][: self.counts[job]]

    def only(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """slots, rows, begins, counts of some of the experts."""
        chosen = np.isin(self.slots, slots)
        return self.slots[chosen], self.rows, self.begins[chosen], self.counts[chosen]


def run(
    kernels: GroupedExperts,
    experts: Experts,
    x: torch.Tensor,
    routing: list[list[int]] | None = None,
    slots: NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """x (T, hidden), routing (T, k) slots (none: all to slot 0) -> (T * k, hidden), by way of DEVICE."""
    routed = Routed(routing or [[0]] * len(x))
    mine = routed.slots[routed.slots >= 0] if slots is None else slots
    out = torch.full((len(routed.flat), x.shape[1]), np.nan, device=DEVICE)
    kernels.run(x.to(DEVICE), routed.top_k, experts.arena.to(DEVICE), *routed.only(mine), out)
    return out.cpu()


def worst_error(found: torch.Tensor, experts: Experts, x: torch.Tensor, routing: list[list[int]]) -> float:
    """Of all experts' rows against float64, relative to the norm."""
    routed, worst = Routed(routing), 0.0
    for slot, begin, count in zip(routed.slots, routed.begins, routed.counts, strict=True):
        rows = routed.rows[begin : begin + count]
        if slot >= 0:
            tokens = x[rows // routed.top_k]
            worst = max(worst, error(found[rows], experts.expected(int(slot), tokens)))
        else:
            assert found[rows].isnan().all(), "rows that nobody computes were written"
    return worst


def staircase(counts: tuple[int, ...]) -> list[list[int]]:
    """(T, k): slot s has the first ``counts[s]`` tokens."""
    return [
        [slot if token < count else -1 for slot, count in enumerate(counts)] for token in range(max(counts))
    ]
