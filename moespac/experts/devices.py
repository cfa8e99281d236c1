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
from moespac.experts.grouped import GroupedExperts
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


class Groups:
    """The tokens of each expert of one layer. ``routing`` is (T, k) expert numbers."""

    def __init__(self, routing: NDArray[np.int64], experts: int) -> None:
        flat = routing.reshape(-1)
        self.top_k = routing.shape[1]
        self.order = flat.argsort(kind="stable")  # rows of the (T * k) buffer, expert by expert
        # Some families route a token to "no expert" with a number outside the range; nobody computes such rows.
        self.complete = not flat.size or bool(flat[self.order[0]] >= 0 and flat[self.order[-1]] < experts)
        within = flat if self.complete else flat[(flat >= 0) & (flat < experts)]
        self.counts = np.bincount(within, minlength=experts)
        self.begins = self.counts.cumsum() - self.counts
        if not self.complete:
            self.begins += np.count_nonzero(flat < 0)

    @property
    def nowhere(self) -> NDArray[np.int64]:
        """Rows of the (T * k) buffer that belong to no expert."""
        if self.complete:
            return self.order[:0]
        first = self.begins[0]
        return np.concatenate([self.order[:first], self.order[first + self.counts.sum() :]])

    def rows_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows of the (T * k) buffer that belong to the ``chosen`` (experts,), a flag each."""
        first = self.begins[0]
        return self.order[first : first + self.counts.sum()][chosen.repeat(self.counts)]

    def rows(self, expert: int) -> torch.Tensor:
        """Rows of the (T * k) buffer that belong to ``expert``."""
        begin = self.begins[expert]
        return torch.from_numpy(self.order[begin : begin + self.counts[expert]])


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
    ) -> None:
        """``first_id``: flat id of this layer's expert 0; x (T, hidden)."""
        self.host_threads = computers.host_threads
        self.in_order = computers.accelerator is not None and computers.accelerator.in_order
        self._computers = computers
        self._norm = norm
        self._groups = groups
        self._first_id = first_id
        self._x = x
        self._x_host = x
        if x.device.type != "cpu" or (computers.kernel and x.dtype != torch.float32):
            self._x_host = x.to("cpu", torch.float32 if computers.kernel else x.dtype)
        self._now = now
        self._on_host = np.zeros(len(groups.counts), dtype=bool)  # experts that the host has computed
        # On another device than the host, its experts' rows are gathered there and brought over once.
        self._apart = x.device.type != "cpu"
        self._grouped = computers.grouped
        self._rows = self._grouped.layer(x.shape[0], groups.top_k) if self._grouped else None
        if self._rows is not None:
            self._out, self._out_device = self._rows.host, self._rows.device
            return
        buffer = torch.empty if groups.complete else torch.zeros
        self._out = buffer(x.shape[0] * groups.top_k, x.shape[1], dtype=self._x_host.dtype)
        self._out_device = torch.zeros_like(self._out, device=x.device) if self._apart else self._out

    def join(self, weights: torch.Tensor) -> torch.Tensor:
        """(T, hidden): the sum over a token's experts, weighted by ``weights`` (T, k)."""
        kernel, top_k = self._computers.kernel, self._groups.top_k
        if self._grouped is not None and self._rows is not None:
            return self._grouped.join(
                self._rows, weights, self._x, self._groups.rows_of(self._on_host), self._groups.nowhere
            )
        if kernel is not None and not self._apart:
            joined = kernel.join(self._out, weights.float().contiguous(), top_k)
            return joined if joined.dtype == self._x.dtype else joined.to(self._x.dtype)
        rows = self._gathered().view(-1, top_k, self._x.shape[1])
        return (rows * weights.unsqueeze(-1)).sum(dim=1).to(self._x.dtype)

    def _gathered(self) -> torch.Tensor:
        """All rows (T * k, hidden), on x's device."""
        if self._apart and self._on_host.any():
            rows = torch.from_numpy(self._groups.rows_of(self._on_host))
            self._out_device[rows.to(self._x.device)] = self._out[rows].to(self._x.device)
        return self._out_device

    def compute_on_host(self, experts: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
        local = experts - self._first_id
        self._on_host[local] = True
        start = self._now()
        if self._computers.kernel is None:
            jobs = zip(local.tolist(), slots.tolist(), strict=True)
            seconds = np.array([self._compute_in_torch(expert, slot) for expert, slot in jobs])
        else:
            seconds = self._compute_in_kernel(self._computers.kernel, local, slots)
        # On several threads at once, an expert costs the layer its share of the time that all took.
        return seconds * ((self._now() - start) / max(sum(seconds.tolist()), 1e-9))

    def compute_on_accelerator(
        self, experts: NDArray[np.int64], slots: NDArray[np.int64], name: str
    ) -> Ticket:
        accelerator = self._computers.accelerator
        assert accelerator is not None
        local = experts - self._first_id

        def job() -> None:
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

    def _compute_in_kernel(
        self, kernel: HostKernel, experts: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        groups = self._groups
        begins, counts = groups.begins[experts], groups.counts[experts]
        x, arena = self._x_host, self._computers.host
        return kernel.run(x, groups.top_k, arena, slots, groups.order, begins, counts, self._out)

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
