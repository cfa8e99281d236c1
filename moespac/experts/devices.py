"""The tensors of one layer in one pass, and the two devices that compute its experts.

Every expert writes its own rows of one (tokens * k, hidden) buffer that is reduced once, so the result does not
depend on who computed what, or when.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.experts.accelerator import Accelerator
from moespac.experts.compute import ExpertMath
from moespac.experts.workers import Ticket
from moespac.timeline import expert_name


class Groups:
    """The tokens of each expert of one layer. ``routing`` is (T, k) expert numbers."""

    def __init__(self, routing: NDArray[np.int64], experts: int) -> None:
        flat = routing.reshape(-1)
        self.top_k = routing.shape[1]
        self.counts = np.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        self._order = np.argsort(flat, kind="stable")
        # Some families route a token to "no expert" with a number outside the range; such rows stay zero.
        self._ends = np.count_nonzero(flat < 0) + np.cumsum(self.counts)

    def rows(self, expert: int) -> torch.Tensor:
        """Rows of the (T * k) buffer that belong to ``expert``."""
        end = self._ends[expert]
        return torch.from_numpy(self._order[end - self.counts[expert] : end])


class LayerTensors:
    """Implements ``schedule.ports.Devices`` over torch."""

    def __init__(
        self,
        math: ExpertMath,
        norm: nn.Module | None,
        groups: Groups,
        first_id: int,
        x: torch.Tensor,
        host: torch.Tensor,
        accelerator: Accelerator | None,
        now: Callable[[], float],
    ) -> None:
        self._math = math
        self._norm = norm
        self._groups = groups
        self._first_id = first_id  # flat id of this layer's expert 0
        self._x = x  # (T, hidden)
        self._x_host = x.to("cpu")
        self._host = host  # the host tier's arena
        self._accelerator = accelerator
        self._now = now
        self._out = x.new_zeros(x.shape[0] * groups.top_k, x.shape[1])  # (T * k, hidden)

    def result(self) -> torch.Tensor:
        """(T, k, hidden), not yet weighted."""
        return self._out.view(self._x.shape[0], self._groups.top_k, -1)

    def compute_on_host(self, expert: int, slot: int) -> float:
        start = self._now()
        self._compute(expert, self._x_host, self._host[slot])
        return self._now() - start

    def compute_on_accelerator(self, experts: list[int], slots: list[int]) -> Ticket:
        accelerator = self._accelerator
        assert accelerator is not None

        def job() -> None:
            x = self._x.to(accelerator.device)
            for expert, slot in zip(experts, slots, strict=True):
                self._compute(expert, x, accelerator.arena[slot])

        name = " ".join(expert_name(expert, len(self._groups.counts)) for expert in experts)
        return accelerator.compute(name, job)

    def _compute(self, expert: int, x: torch.Tensor, record: torch.Tensor) -> None:
        rows = self._groups.rows(expert - self._first_id)
        y = self._math(x[rows // self._groups.top_k], record, self._norm)
        self._out[rows] = y.to(self._out.device)
