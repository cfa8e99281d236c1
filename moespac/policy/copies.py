"""PREFETCH to the accelerator: which copies save more than they take."""

from __future__ import annotations

import numpy as np

from moespac.policy.cost import Seconds
from moespac.types import Ids, Residency


def worth_copying(worth: Seconds, residency: Residency, price: float) -> Ids:
    """Experts to copy from host memory to the accelerator, most useful first: as many as it has free slots, then
    those that save ``price`` seconds more than what makes way for them.

    ``worth`` (layers * experts,) is what each saves while it is there, seconds.
    """
    present = (residency.accelerator | residency.arriving_accelerator).ravel()
    free = free_slots(residency)
    victims = np.sort(worth[residency.accelerator.ravel()])
    candidates = residency.host.ravel() & ~present
    if not free:
        if not len(victims):
            return np.empty(0, np.int64)
        candidates &= worth > victims[0] + price
    ids = np.flatnonzero(candidates)
    ids = ids[np.argsort(-worth[ids], kind="stable")]
    replacing = ids[free : free + len(victims)]
    pays = worth[replacing] > victims[: len(replacing)] + price
    return ids[: min(free, len(ids)) + int(np.argmin(np.append(pays, False)))]


def free_slots(residency: Residency) -> int:
    """Of the accelerator: neither taken nor being filled."""
    used = np.count_nonzero(residency.accelerator) + np.count_nonzero(residency.arriving_accelerator)
    return max(residency.capacity.accelerator - int(used), 0)
