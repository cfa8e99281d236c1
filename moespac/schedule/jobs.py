"""Jobs on the accelerator, until it is through with them: what they read stays pinned so long.

A job outlives its layer where the accelerator works in order: what is asked of it next finds the results without
anybody having waited for them on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.policy.cost import CostModel
from moespac.schedule.ports import Bell, Ticket
from moespac.schedule.stats import PassClock
from moespac.schedule.tiers import Tier


class _Job(NamedTuple):
    ticket: Ticket
    tier: Tier
    experts: NDArray[np.int64]  # whose records it has pinned
    tokens: int  # of all of them
    costs: CostModel


class Jobs:
    """Those of all layers that are in flight."""

    def __init__(self, bell: Bell, clock: PassClock) -> None:
        self._bell = bell
        self._clock = clock
        self._jobs: list[_Job] = []
        self._error: Exception | None = None

    def add(
        self, ticket: Ticket, tier: Tier, experts: NDArray[np.int64], tokens: int, costs: CostModel
    ) -> None:
        """The pins that the experts have in ``tier`` are the job's now; ``costs`` will learn what it took."""
        self._jobs.append(_Job(ticket, tier, experts, tokens, costs))

    def reap(self) -> None:
        """Release what the jobs that are done had pinned."""
        if not self._jobs:
            return
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            if job.ticket.done:  # asked once: it may become so at any moment
                self._release(job)
            else:
                self._jobs.append(job)

    @property
    def in_flight(self) -> bool:
        return bool(self._jobs)

    def finish(self) -> None:
        """Wait until none is in flight."""
        while self._jobs:
            seen = self._bell.count()
            self.reap()
            if self._jobs:
                self._bell.wait_beyond(seen)

    def check(self) -> None:
        """Raises the error of a job that has failed, once no other is in flight."""
        if self._error is None:
            for job in self._jobs:
                if job.ticket.error is not None:
                    break
            else:
                return
        self.finish()
        error, self._error = self._error, None
        assert error is not None
        raise error

    def abandon(self) -> None:
        """Their pass is given up: wait, and forget what failed."""
        self.finish()
        self._error = None

    def _release(self, job: _Job) -> None:
        ticket, tier, experts, tokens, costs = job
        if ticket.error is not None:
            tier.release_all(experts)
            self._error = ticket.error
            return
        self._clock.add("accelerator_experts", ticket.seconds)
        tier.job_is_over(experts, tokens, ticket.seconds, costs)
