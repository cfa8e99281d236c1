"""BALANCE at dispatch: the router has fired, residency is known; who computes which of this layer's experts?

The finish times that are minimised:
- the host computes one expert after the other, those in its memory first, then as reads arrive;
- the accelerator computes what it holds, then what is arriving, then what the link copies, one by one;
- a copy reads the host's memory, so the host computes slower beside it (``CostModel.copy_toll``);
- storage reads one record after the other, for the accelerator (which has the longer way) before the host.

A copy that is made for this layer stays: what it saves in passes to come (``Stakes``) is set against the time that
it takes now. Of two assignments that finish nearly together, that one is taken which leaves the better memory.

Experts are sorted by how near they are to the accelerator, then by what a copy spares the host, and the
accelerator gets the first so many of them: what other assignments gain is not seen in tokens a second
(docs/log.md). It runs in every layer, so in native code where there is any (``native``); here is its twin.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moespac.policy import native
from moespac.policy.balance import Freshening, freshen_in_python
from moespac.policy.copies import free_slots
from moespac.policy.cost import CostModel, Seconds
from moespac.types import Ids, Placement, Plan, Residency


class State(IntEnum):
    """Where an expert is when its layer is dispatched, the nearest to the accelerator first."""

    ACCELERATOR = 0
    ARRIVING = 1  # on its way to the accelerator; a complete copy is in host memory
    HOST = 2
    STORAGE = 3


_ARRIVING, _STORAGE = int(State.ARRIVING), int(State.STORAGE)  # an enumeration's members are slow to look up


_NOTHING = Plan()


class Stakes(NamedTuple):
    """What copies change beyond the layer that they are made for, in seconds saved in passes to come."""

    worth: Seconds  # (layers * experts,) of having each expert on the accelerator
    given_up: Seconds  # (m,) of the experts there that make way once it is full, the first to go first
    freshening: Freshening | None = None  # what a layer shows changes what its experts are worth first


def place_by_finish(
    layer: int,
    counts: NDArray[np.int64],
    residency: Residency,
    costs: CostModel,
    stakes: Stakes | None = None,
) -> Placement:
    """The placement of ``layer``'s active experts by earliest finish: what is near first, then the most work.

    ``counts`` (experts,) window tokens of each. Without ``stakes`` only this layer counts.
    """
    placer = native.placer(residency, costs, stakes)
    if placer is None and stakes is not None and stakes.freshening is not None:
        freshen_in_python(layer, counts, stakes.freshening, stakes.worth)
    placed = placer(layer, counts) if placer is not None else None
    ids, there = placed or place_in_python(layer, counts, residency, costs, stakes)
    return Placement(host=ids[there:], accelerator=ids[:there], prefetch=_NOTHING)


def place_in_python(
    layer: int,
    counts: NDArray[np.int64],
    residency: Residency,
    costs: CostModel,
    stakes: Stakes | None = None,
) -> tuple[Ids, int]:
    """The active experts in order, and how many of them, from the first, go to the accelerator."""
    active = np.flatnonzero(counts)
    tokens, states = counts[active], _states(layer, active, residency)
    ids = layer * len(counts) + active
    worth = np.zeros(len(ids)) if stakes is None else np.where(states >= State.HOST, stakes.worth[ids], 0.0)
    ordered = np.lexsort((-(costs.host_expert(tokens) + worth), states))
    slots = residency.capacity.accelerator
    given_up = np.zeros(0) if stakes is None else np.append(np.zeros(free_slots(residency)), stakes.given_up)
    here = Stakes(worth[ordered], given_up)
    return ids[ordered], best_prefix(tokens[ordered], states[ordered], costs, slots, here) if slots else 0


def best_prefix(
    tokens: NDArray[np.int64], states: NDArray[np.int64], costs: CostModel, slots: int, stakes: Stakes
) -> int:
    """How many experts, from the first, go to the accelerator: least makespan, less what copies are worth.

    ``tokens`` and ``states`` (n,) of the experts, sorted; ``stakes.worth`` (n,) of those that would be copied, 0 of
    the others; ``stakes.given_up`` begins with the free slots as 0; at most ``slots`` go there.
    """
    link, storage, toll = costs.link, costs.storage, costs.copy_toll
    spared = 1 - 1 / toll  # of each second of copying
    worth, given_up, state = stakes.worth.tolist(), stakes.given_up.tolist(), states.tolist()
    rest = _finishes_of_the_rest(costs.host_expert(tokens).tolist(), state, storage)

    # What is in flight arrives, wanted or not; then one copy after the other.
    copying = flight = state.count(_ARRIVING) * link
    best, least = 0, min(rest[0] * toll, rest[0] + copying * spared)
    busy = arrived = read = held_up = saved = 0.0
    copies = 0
    for number, seconds in enumerate(costs.accelerator_expert(tokens[:slots]).tolist(), start=1):
        there, where = 0.0, state[number - 1]
        if where == _ARRIVING:
            there = arrived = arrived + link
        elif where > _ARRIVING:
            if where == _STORAGE:
                read += storage
            held_up = max(held_up, read - copies * link, flight)
            saved += worth[number - 1] - (given_up[copies] if copies < len(given_up) else 0.0)
            copies += 1
            copying += link
            there = held_up + copies * link
        busy = max(busy, there) + seconds
        host = min(rest[number] * toll, rest[number] + copying * spared)
        total = max(host, busy) - saved
        if total < least:
            best, least = number, total
    return best


def _finishes_of_the_rest(seconds: list[float], state: list[int], storage: float) -> list[float]:
    """(n + 1) when the host, undisturbed, is done with all experts but the first 0, 1 ... n."""
    finishes = [0.0]
    work = latest = 0.0
    reads = state.count(_STORAGE)
    for one, where in zip(reversed(seconds), reversed(state), strict=True):
        work += one
        # The reads before it come first, whichever device they serve.
        latest = max(latest, work + reads * storage)
        reads -= where == _STORAGE
        finishes.append(latest)
    return finishes[::-1]


def _states(layer: int, active: Ids, residency: Residency) -> NDArray[np.int64]:
    """(n,) the ``State`` of each active expert of ``layer``."""
    states = np.where(residency.host[layer, active], State.HOST.value, State.STORAGE.value)
    states[residency.arriving_accelerator[layer, active]] = State.ARRIVING.value
    states[residency.accelerator[layer, active]] = State.ACCELERATOR.value
    return states
