"""What the schedule asks of the world: somebody to move bytes, somebody to compute, and a bell."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Ticket(Protocol):
    """One job in flight. Once ``done``, ``error`` and ``seconds`` (its own duration) are final."""

    error: Exception | None
    seconds: float

    @property
    def done(self) -> bool: ...

    def cancel(self) -> bool:
        """Take the job back if nobody has begun it; True when it will never run."""
        ...

    def hurry(self) -> None:
        """The job was speculative and is needed now: put it in front of the others."""
        ...


class Bell(Protocol):
    """Rings whenever any job is done, so that the one deciding thread can wait for whichever comes first."""

    def count(self) -> int: ...

    def wait_beyond(self, count: int) -> None:
        """Return once it has rung more than ``count`` times."""
        ...


class Mover(Protocol):
    """Brings records into the slots of one tier from the tier below."""

    sharing: int  # transfers that share its bandwidth at once; those beyond that wait for their turn

    def move(self, expert: int, slot: int, source_slot: int | None, speculative: bool) -> Ticket:
        """Fill ``slot``; ``source_slot`` is where the tier below has the record, None if that is storage."""
        ...

    def close(self) -> None: ...


class Devices(Protocol):
    """Computes the experts of one layer in one pass."""

    host_threads: int  # experts that the host computes at once
    in_order: bool  # what the accelerator is asked later finds a job's results: nobody has to wait for them

    def compute_on_host(self, experts: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
        """Run these experts here and now; returns how much each added to the time (together: all of it)."""
        ...

    def compute_on_accelerator(
        self, experts: NDArray[np.int64], slots: NDArray[np.int64], name: str
    ) -> Ticket:
        """Start a job that runs these experts, in this order; ``name`` is what a timeline shows."""
        ...


class NativeReads(Bell, Protocol):
    """Reads from storage that native code begins and collects (csrc/reads.c); rings when one is over."""

    address: int  # of the library's own ``Reads``
    errors: dict[int, Exception]  # by expert, the latest of those that failed
    lanes: list[str]  # what a timeline calls who reads

    def close(self) -> None: ...
