"""The tensors of one layer in one pass, and the two devices that compute its experts.

Every expert writes its own rows of one (tokens * k, hidden) buffer that is reduced once, so the result does not
depend on who computed what, or when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.experts.accelerator import Accelerator
from moespac.experts.compute import ExpertMath
from moespac.experts.desk import Desk
from moespac.experts.grouped import GroupedExperts
from moespac.experts.groups import Groups
from moespac.experts.kernels.host import HostKernel
from moespac.experts.resident import JobKernels
from moespac.schedule.ports import Ticket


@dataclass(frozen=True)
class Computers:
    """What computes the experts of all layers, and where their records lie."""

    math: ExpertMath
    kernel: HostKernel | None  # None: the host computes in torch too
    host: torch.Tensor  # the host tier's arena, (slots, record_bytes) uint8
    accelerator: Accelerator | None
    host_threads: int
    grouped: GroupedExperts | None = None  # None: the accelerator computes its experts one by one in torch
    job_kernels: JobKernels | None = None  # its kernels, for jobs that are made on the device


class LayerTensors:
    """Implements ``schedule.ports.Devices`` over torch and the native kernel."""

    def __init__(
        self,
        computers: Computers,
        norm: nn.Module | None,
        groups: Groups,
        first_id: int,
        x: torch.Tensor,
        now: Callable[[], float],
        desk: Desk | None = None,
    ) -> None:
        """``first_id``: flat id of this layer's expert 0; x (T, hidden); ``desk``: whose ``groups`` these are."""
        self.host_threads = computers.host_threads
        self.in_order = computers.accelerator is not None and computers.accelerator.in_order
        self._computers = computers
        self._kernel = computers.kernel
        self._norm = norm
        self._groups = groups
        self._first_id = first_id
        self._x = x
        self._x_host = x
        # On another device than the host, its experts' rows are gathered there and brought over once.
        self._apart = not x.is_cpu
        if self._apart or (self._kernel is not None and x.dtype is not torch.float32):
            self._x_host = x.to("cpu", torch.float32 if self._kernel is not None else x.dtype)
        self._now = now
        self._on_host: list[NDArray[np.int64]] = []  # experts that the host has computed
        self._grouped = computers.grouped
        self._rows = None
        if self._grouped is not None:
            self._rows = self._grouped.layer(groups.tokens, groups.top_k)
            self._out, self._out_device = self._rows.host, self._rows.device
            return
        self._out = (desk or Desk(groups)).rows(self._x_host)
        self._out_device = torch.zeros_like(self._out, device=x.device) if self._apart else self._out

    def join(self, weights: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """(T, hidden), like x: the sum over a token's experts, weighted by ``weights`` (T, k). In ``into`` if that
        is given and can be."""
        kernel, top_k = self._kernel, self._groups.top_k
        if self._grouped is not None and self._rows is not None:
            host, nowhere = self._rows_on_host(), self._groups.nowhere
            return self._grouped.join(self._rows, weights, self._x, host, nowhere, into)
        if kernel is not None and not self._apart:
            if weights.dtype is not torch.float32 or not weights.is_contiguous():
                weights = weights.float().contiguous()
            joined = kernel.join(self._out, weights, top_k, into)
            return joined if self._x_host is self._x else joined.to(self._x.dtype)
        rows = self._gathered().view(-1, top_k, self._x.shape[1])
        return (rows * weights.unsqueeze(-1)).sum(dim=1).to(self._x.dtype)

    def _gathered(self) -> torch.Tensor:
        """All rows (T * k, hidden), on x's device."""
        if self._apart and self._on_host:
            rows = torch.from_numpy(self._rows_on_host())
            self._out_device[rows.to(self._x.device)] = self._out[rows].to(self._x.device)
        return self._out_device

    def _rows_on_host(self) -> NDArray[np.int64]:
        chosen = np.zeros(self._groups.experts, dtype=bool)
        for experts in self._on_host:
            chosen[experts - self._first_id] = True
        return self._groups.rows_of(chosen)

    def compute_on_host(self, experts: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
        self._on_host.append(experts)
        if self._kernel is None:
            jobs = zip(experts.tolist(), slots.tolist(), strict=True)
            return np.array([self._compute_in_torch(expert - self._first_id, slot) for expert, slot in jobs])
        x, arena, groups = self._x_host.contiguous(), self._computers.host, self._groups
        return self._kernel.run_share(x, groups, arena, slots, experts, self._first_id, self._out)

    def compute_on_accelerator(
        self, experts: NDArray[np.int64], slots: NDArray[np.int64], name: str
    ) -> Ticket:
        accelerator = self._computers.accelerator
        assert accelerator is not None

        def job() -> None:
            local = experts - self._first_id
            if self._grouped is not None:
                self._compute_grouped(self._grouped, accelerator.arena, local, slots)
                return
            for expert, slot in zip(local.tolist(), slots.tolist(), strict=True):
                rows, y = self._expert(expert, self._x, accelerator.arena[slot])
                self._out_device[rows.to(y.device)] = y.to(self._out_device.dtype)

        return accelerator.compute(name, job)

    def _compute_grouped(
        self,
        grouped: GroupedExperts,
        arena: torch.Tensor,
        experts: NDArray[np.int64],
        slots: NDArray[np.int64],
    ) -> None:
        groups = self._groups
        begins, counts = groups.begins[experts], groups.counts[experts]
        x = self._x.contiguous()
        grouped.run(x, groups.top_k, arena, slots, groups.order, begins, counts, self._out_device)

    def _compute_in_torch(self, expert: int, slot: int) -> float:
        start = self._now()
        rows, y = self._expert(expert, self._x_host, self._computers.host[slot])
        self._out[rows] = y
        return self._now() - start

    def _expert(
        self, expert: int, x: torch.Tensor, record: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of ``expert`` in the buffer, and what they become, on x's device."""
        rows = self._groups.rows(expert)
        tokens = (rows // self._groups.top_k).to(x.device)
        return rows, self._computers.math(x[tokens], record, self._norm)
