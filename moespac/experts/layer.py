"""One layer's experts: route -> place -> execute on both devices -> JOIN.

The event loop of ``LayerRun`` is the asynchronous execution engine of the paper (section 3): fetch what is
missing, compute what is there, on both devices at once. Every expert writes its own rows of one
(tokens, k, hidden) buffer that is reduced once, so the result does not depend on who computed what, or when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moespac.experts.compute import ExpertMath
from moespac.experts.memory import ExpertMemory, Retention
from moespac.experts.stats import PassClock
from moespac.experts.tiers import Tier
from moespac.experts.workers import Ticket
from moespac.policy.base import TierName
from moespac.policy.cost import CostModel
from moespac.types import Placement


class Groups:
    """The tokens of each expert of one layer. ``routing`` is (T, k) expert numbers."""

    def __init__(self, routing: NDArray[np.int64], experts: int) -> None:
        flat = routing.reshape(-1)
        self.top_k = routing.shape[1]
        self.counts = np.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        self._order = np.argsort(flat, kind="stable")
        # Some families route a token to "no expert" with a number outside the range; such slots stay zero.
        self._start = int(np.count_nonzero(flat < 0))
        self._ends = self._start + np.cumsum(self.counts)

    def rows(self, expert: int) -> torch.Tensor:
        """Rows of the flattened (T * k) buffer that belong to ``expert``."""
        end = self._ends[expert]
        return torch.from_numpy(self._order[end - self.counts[expert] : end])


@dataclass
class Side:
    """The experts that one device computes in this layer, from missing over flying to ready (and pinned)."""

    tier: Tier
    missing: deque[int]
    flying: set[int] = field(default_factory=set)
    ready: deque[int] = field(default_factory=deque)

    def sort_out(self) -> None:
        """What is resident already is pinned, so that fetching the rest cannot evict it."""
        resident = [expert for expert in self.missing if self.tier.ready[expert]]
        self.missing = deque(expert for expert in self.missing if not self.tier.ready[expert])
        for expert in resident:
            self._take(expert)

    def arrived(self, expert: int) -> None:
        if expert in self.flying:
            self.flying.remove(expert)
            self._take(expert)

    def fetch(self, demand: Callable[[int, Retention], bool], retention: Retention) -> None:
        """Ask for what is missing, in order, as far as there are slots."""
        for _ in range(len(self.missing)):
            expert = self.missing.popleft()
            if self.tier.ready[expert]:  # read for the other device in the meantime
                self._take(expert)
            elif demand(expert, retention):
                self.flying.add(expert)
            else:
                self.missing.append(expert)

    def _take(self, expert: int) -> None:
        self.tier.pin(expert)
        self.ready.append(expert)

    @property
    def outstanding(self) -> bool:
        return bool(self.missing or self.flying or self.ready)


class LayerRun:
    """The execution of one layer's experts in one pass."""

    def __init__(
        self,
        memory: ExpertMemory,
        math: ExpertMath,
        costs: CostModel,
        clock: PassClock,
        norm: nn.Module | None,
        groups: Groups,
        first_id: int,
        x: torch.Tensor,
    ) -> None:
        self._memory = memory
        self._math = math
        self._costs = costs
        self._clock = clock
        self._norm = norm
        self._groups = groups
        self._first_id = first_id  # flat id of this layer's expert 0
        self._x = x  # (T, hidden)
        self._x_host = x.to("cpu")
        self._out = x.new_zeros(x.shape[0] * groups.top_k, x.shape[1])  # (T * k, hidden)
        self._jobs: list[tuple[Ticket, list[int]]] = []  # accelerator jobs in flight and the records they pin
        self._job_error: Exception | None = None

    def execute(self, placement: Placement, retention: Retention) -> torch.Tensor:
        """Compute every active expert where it is placed; returns (T, k, hidden), not yet weighted.

        Raises StorageError or CheckpointError when an expert cannot be had; nothing stays pinned then.
        """
        host = Side(self._memory.host, deque(placement.host.tolist()))
        sides: dict[TierName, Side] = {"host": host}
        device = None
        if self._memory.accelerator is not None:
            device = Side(self._memory.accelerator.tier, deque(placement.accelerator.tolist()))
            sides["accelerator"] = device
        else:
            assert placement.accelerator.size == 0, "no accelerator to compute on"
        try:
            self._run(sides, host, device, retention)
        finally:
            self._finish_jobs()
            for side in sides.values():
                for expert in side.ready:
                    side.tier.release(expert)
        return self._out.view(self._x.shape[0], self._groups.top_k, -1)

    def _run(
        self, sides: dict[TierName, Side], host: Side, device: Side | None, retention: Retention
    ) -> None:
        for side in sides.values():
            side.sort_out()
        while True:
            seen = self._memory.bell.count()
            for name, expert in self._memory.settle():
                sides[name].arrived(expert)
            self._reap_jobs()
            if device is not None:
                device.fetch(self._memory.demand_accelerator, retention)
                self._launch(device)
            host.fetch(self._memory.demand_host, retention)
            if not host.missing and not (device and device.missing):
                self._memory.pump(retention)  # nobody here waits for a slot: prefetch while computing
            if host.ready:
                self._compute_on_host(host)
            elif host.outstanding or (device is not None and device.outstanding):
                with self._clock.measure("wait_for_experts"):
                    self._memory.bell.wait_beyond(seen)
            else:
                break
        with self._clock.measure("wait_for_accelerator"):
            self._finish_jobs()
        if self._job_error is not None:
            raise self._job_error

    def _compute_on_host(self, side: Side) -> None:
        expert = side.ready[0]
        rows = self._rows(expert)
        with self._clock.measure("host_experts") as elapsed:
            y = self._math(
                self._x_host[rows // self._groups.top_k], self._memory.host.record(expert), self._norm
            )
            self._out[rows] = y.to(self._out.device)
        self._costs.observe_host(len(rows), elapsed.seconds)
        side.ready.popleft()
        side.tier.release(expert)

    def _launch(self, side: Side) -> None:
        """Hand all experts that are ready on the accelerator to its worker, as one job."""
        if not side.ready:
            return
        accelerator = self._memory.accelerator
        assert accelerator is not None
        experts = list(side.ready)
        side.ready.clear()  # their pins now belong to the job

        def job() -> None:
            x = self._x.to(accelerator.device)
            for expert in experts:
                rows = self._rows(expert)
                y = self._math(x[rows // self._groups.top_k], accelerator.tier.record(expert), self._norm)
                self._out[rows] = y.to(self._out.device)

        self._jobs.append((accelerator.compute(job), experts))

    def _reap_jobs(self) -> None:
        done = [job for job in self._jobs if job[0].done]
        self._jobs = [job for job in self._jobs if not job[0].done]
        for ticket, experts in done:
            for expert in experts:
                self._device.release(expert)
            if ticket.error is not None:
                self._job_error = ticket.error
                continue
            self._clock.add("accelerator_experts", ticket.seconds)
            tokens = sum(len(self._rows(expert)) for expert in experts)
            self._costs.observe_accelerator(
                max(1, round(tokens / len(experts))), ticket.seconds / len(experts)
            )

    def _finish_jobs(self) -> None:
        while self._jobs:
            seen = self._memory.bell.count()
            self._reap_jobs()
            if self._jobs:
                self._memory.bell.wait_beyond(seen)

    @property
    def _device(self) -> Tier:
        assert self._memory.accelerator is not None
        return self._memory.accelerator.tier

    def _rows(self, expert: int) -> torch.Tensor:
        return self._groups.rows(expert - self._first_id)
